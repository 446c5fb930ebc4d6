"""The prefix cache on disk: a file an entry, in a folder a model. It outlives the process and bounds its own size.

A file is a checksum, then the data. It is written under another name and renamed, so a crash leaves no half of one
under its own; whatever a checksum doesn't fit is deleted and computed again. Writing goes on in a thread of its own.
Several processes may share a folder: what another deletes is a miss.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from upwell.errors import InputError

PREFIX_CACHE_DISK_BYTES = 16 << 30
_SUM = 32  # bytes of checksum before the data
_KINDS = ("block-", "state-", "whole-")
_PENDING = 256 << 20  # bytes that may wait to be written; what comes beyond is not kept on disk
_STALE = 600.0  # seconds after which an unfinished file is a crash's

logger = logging.getLogger(__name__)


class PrefixDisk:
    """Entries by name under `directory`/`identity`, oldest use first out. Raises InputError if it can't be written."""

    def __init__(self, directory: Path, identity: str, capacity: int = PREFIX_CACHE_DISK_BYTES) -> None:
        self._folder, self._capacity = directory / identity, capacity
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self.nbytes = 0
        self._waiting: dict[str, Tensor] = {}
        self._pending = 0  # their bytes
        self._lock = threading.Lock()  # over the four above
        self._queue: queue.SimpleQueue[tuple[str, Tensor] | None] = queue.SimpleQueue()
        self._failed = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / f"probe.{os.getpid()}.tmp"
            probe.write_bytes(b"")
            probe.unlink()
            self._scan()
        except OSError as error:
            raise InputError(f"the prefix cache can't use {directory}: {error.strerror or error}") from None
        self._writer = threading.Thread(target=self._write_all, name="upwell-prefix-writer", daemon=True)
        self._writer.start()
        atexit.register(self.close)  # a daemon would be cut off; a plain thread would wait for ever

    def __contains__(self, name: str) -> bool:
        return name in self._sizes or name in self._waiting

    def read(self, name: str) -> Tensor | None:
        """An entry's data, [bytes] uint8; None if it is gone or damaged, and it is forgotten then."""
        waiting = self._waiting.get(name)
        if waiting is not None:
            return waiting
        path = self._folder / name
        try:
            raw = bytearray(path.read_bytes())
            os.utime(path)
        except OSError:
            raw = bytearray()
        data = memoryview(raw)[_SUM:]
        if len(raw) < _SUM or hashlib.blake2b(data, digest_size=_SUM).digest() != raw[:_SUM]:
            if raw:
                logger.warning("a damaged entry of the prefix cache is dropped: %s", path)
            self._forget(name)
            return None
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        return torch.frombuffer(raw, dtype=torch.uint8, offset=_SUM) if len(data) else torch.empty(0, dtype=torch.uint8)

    def write(self, name: str, data: Tensor) -> None:
        """Keep an entry, soon. What would make too much wait is left out."""
        size = data.nbytes + _SUM
        with self._lock:
            if self._failed or name in self._waiting or size > self._capacity or self._pending + size > _PENDING:
                return
            self._waiting[name] = data
            self._pending += size
        self._queue.put((name, data))

    def close(self) -> None:
        """Write what waits, and end. A second call does nothing."""
        atexit.unregister(self.close)
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join()

    def _scan(self) -> None:
        found = []
        for entry in os.scandir(self._folder):
            status = entry.stat()
            if entry.name.endswith(".tmp"):
                if time.time() - status.st_mtime > _STALE:
                    os.unlink(entry)
            elif entry.name.startswith(_KINDS):
                found.append((status.st_mtime_ns, entry.name, status.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self.nbytes += size
        self._trim()

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            name, data = item
            unfinished = self._folder / f"{name}.{os.getpid()}-{threading.get_ident()}.tmp"
            try:
                with unfinished.open("wb") as file:
                    raw = data.numpy().data
                    file.write(hashlib.blake2b(raw, digest_size=_SUM).digest())
                    file.write(raw)
                os.replace(unfinished, self._folder / name)
                with self._lock:
                    self.nbytes += data.nbytes + _SUM - self._sizes.pop(name, 0)
                    self._sizes[name] = data.nbytes + _SUM
                self._trim()
            except OSError as error:
                # A full or lost disk must not stop the engine: it goes on without.
                logger.warning("the prefix cache writes no more to %s: %s", self._folder, error)
                self._failed = True
                unfinished.unlink(missing_ok=True)
            with self._lock:
                self._pending -= self._waiting.pop(name).nbytes + _SUM

    def _trim(self) -> None:
        gone = []
        with self._lock:
            while self.nbytes > self._capacity:
                name, size = self._sizes.popitem(last=False)
                gone.append(name)
                self.nbytes -= size
        for name in gone:
            (self._folder / name).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        with self._lock:
            self.nbytes -= self._sizes.pop(name, 0)
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError:
            logger.warning("can't delete %s", self._folder / name)
