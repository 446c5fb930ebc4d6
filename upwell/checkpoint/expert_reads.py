"""Reads of experts from safetensors files: which bytes of which files an expert is, and the threads that fetch them.

Files are read past the page cache (O_DIRECT): what experts take is then the memory given to them and no more, also
under a cgroup's limit, where cached pages count; and nothing is copied twice. Where a file system can't, pages are
dropped again after each read.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from upwell.checkpoint.shards import Stored

PAGE = 4096  # what direct reads are aligned to: places in files, lengths, memory
PIECE = 4 << 20  # bytes of one read
THREADS = 4  # reads at once


@dataclass(frozen=True, slots=True)
class Run:
    """file[start : start + length] goes to `at` in an expert's memory; these are multiples of PAGE. The file may end
    before `length`, but not before `needed` bytes."""

    file: Path
    start: int
    length: int
    at: int
    needed: int


@dataclass(frozen=True, slots=True)
class Extent:
    """One expert: what to read, where each of its tensors lies in the memory then, and how much memory that is."""

    runs: tuple[Run, ...]
    places: tuple[int, ...]
    nbytes: int

    @staticmethod
    def of(tensors: list[Stored]) -> Extent:
        """Neighbours in a file, a page apart at most, are read together."""
        spans: list[list[Stored]] = []
        for tensor in sorted(tensors, key=lambda t: (str(t.file), t.start)):
            last = spans[-1][-1] if spans else None
            if last is not None and last.file == tensor.file and tensor.start - last.end <= PAGE:
                spans[-1].append(tensor)
            else:
                spans.append([tensor])
        runs: list[Run] = []
        places: dict[int, int] = {}
        at = 0
        for span in spans:
            start, end = span[0].start // PAGE * PAGE, max(t.end for t in span)
            length = -(-(end - start) // PAGE) * PAGE
            runs.append(Run(span[0].file, start, length, at, end - start))
            places |= {id(t): at + t.start - start for t in span}
            at += length
        return Extent(tuple(runs), tuple(places[id(t)] for t in tensors), at)


def _pieces(run: Run, at: int) -> Iterator[Run]:
    """A run cut into even parts of at most PIECE, for memory[at:]."""
    parts = -(-run.length // PIECE)
    size = -(-run.length // parts // PAGE) * PAGE
    for cut in range(0, run.length, size):
        yield Run(run.file, run.start + cut, min(size, run.length - cut), at + run.at + cut, run.needed - cut)


@dataclass(eq=False, slots=True)
class Load:
    """An expert on its way to memory[at:]. Its pieces are taken by the readers one by one."""

    key: int
    at: int
    pieces: deque[Run]
    left: int = 0
    started: bool = False
    error: Exception | None = None
    urgent: bool = False


class Readers:
    """Threads that read into `memory`. `lock` guards everything; `finished` is called under it."""

    def __init__(
        self, memory: memoryview, lock: threading.Lock, finished: Callable[[Load], None], threads: int = THREADS
    ) -> None:
        self.read_bytes = 0
        self._memory, self._lock, self._finished = memory, lock, finished
        self._urgent: deque[Load] = deque()
        self._later: deque[Load] = deque()
        self._files: dict[Path, tuple[int, bool]] = {}
        self._work = threading.Condition(lock)
        self._closed, self._alive = False, threads
        for i in range(threads):
            threading.Thread(target=self._serve, name=f"upwell-expert-reader-{i}", daemon=True).start()

    def submit(self, key: int, extent: Extent, at: int, urgent: bool) -> Load:
        """Read an expert to memory[at:]. Under the lock, as all methods."""
        pieces = deque(piece for run in extent.runs for piece in _pieces(run, at))
        load = Load(key, at, pieces, len(pieces), urgent=urgent)
        (self._urgent if urgent else self._later).append(load)
        self._work.notify_all()
        return load

    def hurry(self, load: Load) -> None:
        """It is needed now."""
        if not load.urgent and load.pieces:
            self._later.remove(load)
            self._urgent.append(load)
        load.urgent = True

    def drop(self, load: Load) -> bool:
        """Don't read it after all; False where it has begun."""
        if load.started or load.urgent:
            return False
        self._later.remove(load)
        return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._work.notify_all()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            load, piece = taken
            error = self._read(piece)
            with self._lock:
                self.read_bytes += piece.length
                load.left -= 1
                if error is not None and load.error is None:
                    load.error = error
                    self._skip(load)
                if load.left == 0:
                    self._finished(load)

    def _take(self) -> tuple[Load, Run] | None:
        """The next piece to read; None at the end."""
        with self._lock:
            while not (self._urgent or self._later or self._closed):
                self._work.wait()
            if self._closed:
                self._alive -= 1
                if not self._alive:
                    for file, _ in self._files.values():
                        os.close(file)
                return None
            queue = self._urgent or self._later
            load = queue[0]
            load.started = True
            piece = load.pieces.popleft()
            if not load.pieces:
                queue.popleft()
            return load, piece

    def _skip(self, load: Load) -> None:
        """The rest of it is of no use any more."""
        if load.pieces:
            (self._urgent if load.urgent else self._later).remove(load)
            load.left -= len(load.pieces)
            load.pieces.clear()

    def _read(self, piece: Run) -> Exception | None:
        failed: Exception | None = None
        for _ in range(2):  # once more: some errors pass
            try:
                self._read_whole(piece)
                return None
            except Exception as error:  # whatever it is, someone waits for this piece
                failed = error
        return failed

    def _read_whole(self, piece: Run) -> None:
        file, direct = self._open(piece.file)
        done = 0
        while done < piece.length:
            view = self._memory[piece.at + done : piece.at + piece.length]
            got = os.preadv(file, [view], piece.start + done)
            done += got
            if done >= piece.needed:
                break
            if got == 0 or got % PAGE:
                raise OSError(errno.EIO, "it is shorter than it was")
        if not direct:
            os.posix_fadvise(file, piece.start, piece.length, os.POSIX_FADV_DONTNEED)

    def _open(self, file: Path) -> tuple[int, bool]:
        opened = self._files.get(file)
        if opened is None:
            direct = True
            try:
                number = os.open(file, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                number, direct = os.open(file, os.O_RDONLY), False
            opened = self._files.setdefault(file, (number, direct))
            if opened[0] != number:
                os.close(number)  # another thread was first
        return opened
