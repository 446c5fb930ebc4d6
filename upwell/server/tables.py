"""Tables that people upload to ask about: loaded once, sealed, kept in memory for a while.

The file itself lives in a temporary folder only while it is read. A table is reached by an id that can't be guessed,
and is forgotten KEEP seconds after its last use, or earlier when MAX_TABLES newer ones have come.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from upwell.analyst.ask import Answer, Asker
from upwell.analyst.query import Result, run_query
from upwell.analyst.schema import TABLE
from upwell.analyst.sources import OpenTable, file_kind
from upwell.analyst.sqlitefile import table_names
from upwell.errors import DataError, QueryError, QueueFullError, UpwellError

if TYPE_CHECKING:
    from upwell.engine import LLM

MAX_UPLOAD = 32 << 20  # bytes
MAX_UNPACKED = 512 << 20  # bytes that a workbook, which is a zip file, may say it holds
MAX_CELL = 100_000  # characters
MAX_TABLES = 16
KEEP = 3600.0  # seconds
MEMORY_LIMIT = "512MB"  # of one table and its queries
QUERY_SECONDS = 10.0
MAX_WAITING = 8  # uploads and questions that may wait for their turn
MAX_CHOICES = 50  # tables of a file that are offered, and tried


class TableNotFoundError(UpwellError):
    """An id whose table was never here, or has expired."""

    http_status = 404


class UploadTooLargeError(UpwellError):
    """A file of more than MAX_UPLOAD bytes."""

    http_status = 413


@dataclass
class Uploaded:
    """One table of one uploaded file. `choices` are the file's tables or sheets, `choice` the one that is open."""

    id: str
    name: str
    choice: str | None
    choices: list[str]
    opened: OpenTable
    asker: Asker
    last_used: float
    lock: threading.Lock = field(default_factory=threading.Lock)  # a DuckDB connection serves one thread at a time


class Turns:
    """One at a time; at most `waiting` more may wait."""

    def __init__(self, waiting: int) -> None:
        self._places = threading.Semaphore(1 + waiting)
        self._turn = threading.Lock()

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise QueueFullError(f"too many {what} are waiting", "try again in a moment")
        try:
            with self._turn:
                yield
        finally:
            self._places.release()


class Tables:
    """The uploaded tables, and a model (the embedded one, loaded at the first upload) that reads questions about them.

    For use by many threads.
    """

    def __init__(
        self, load: Callable[[], LLM] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._load, self._clock = load or _nano, clock
        self._by_id: OrderedDict[str, Uploaded] = OrderedDict()  # the longest unused first
        self._lock = threading.Lock()
        self._loading, self._asking = Turns(MAX_WAITING), Turns(MAX_WAITING)
        self._planner: LLM | None = None

    def add(self, path: Path, choice: str | None = None) -> Uploaded:
        """Load the file at `path` (`choice`: which of its tables). Raises DataError, which names the file only."""
        with self._loading.take("uploads"):
            try:
                choices = _choices(path)
                asker = Asker(self._llm())
                picked, opened = _open(asker, path, choices, choice)
            except DataError as error:
                raise DataError(error.message.replace(str(path), path.name), error.remedy) from None
            except duckdb.Error as error:
                raise DataError(f"{path.name} can't be loaded: {str(error).splitlines()[0]}") from None
        added = Uploaded(secrets.token_urlsafe(18), path.name, picked, choices, opened, asker, self._clock())
        with self._lock:
            self._forget_old()
            while len(self._by_id) >= MAX_TABLES:
                self._by_id.popitem(last=False)
            self._by_id[added.id] = added
        return added

    def ask(self, table_id: str, question: str) -> Answer:
        uploaded = self._find(table_id)
        with self._asking.take("questions"), uploaded.lock:
            return uploaded.asker.ask(question)

    def query(self, table_id: str, sql: str) -> Result:
        uploaded = self._find(table_id)
        with uploaded.lock:
            try:
                return run_query(uploaded.opened.connection, sql, time_limit=QUERY_SECONDS)
            except RecursionError:
                raise QueryError("the query is nested too deeply") from None

    def drop(self, table_id: str) -> None:
        with self._lock:
            self._by_id.pop(table_id, None)

    def _find(self, table_id: str) -> Uploaded:
        with self._lock:
            self._forget_old()
            if table_id not in self._by_id:
                raise TableNotFoundError("no such table here: it may have expired", "upload the file again")
            self._by_id.move_to_end(table_id)
            found = self._by_id[table_id]
            found.last_used = self._clock()
            return found

    def _forget_old(self) -> None:
        now = self._clock()
        for table_id in [i for i, uploaded in self._by_id.items() if now - uploaded.last_used > KEEP]:
            del self._by_id[table_id]

    def _llm(self) -> LLM:
        if self._planner is None:
            self._planner = self._load()
        return self._planner


def _nano() -> LLM:
    from upwell.engine import LLM

    return LLM(device="cpu")


def _choices(path: Path) -> list[str]:
    """The tables of a database or the sheets of a workbook; [] where a file is one table, or can't be read as any."""
    kind = file_kind(path)
    if kind == "sqlite":
        try:
            with closing(sqlite3.connect(path.resolve().as_uri() + "?mode=ro&immutable=1", uri=True)) as database:
                return table_names(database)[:MAX_CHOICES]
        except (sqlite3.Error, UnicodeDecodeError):
            return []  # opening it says what is wrong
    if kind == "excel":
        import fastexcel

        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if sum(entry.file_size for entry in archive.infolist()) > MAX_UNPACKED:
                        raise DataError(f"{path} unpacks to more than {MAX_UNPACKED >> 20} MB")
            return list(fastexcel.read_excel(path).sheet_names)[:MAX_CHOICES]
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, fastexcel.FastExcelError):
            return []
    return []


def _open(asker: Asker, path: Path, choices: list[str], choice: str | None) -> tuple[str | None, OpenTable]:
    """Open the named table, or the first that has something in it."""
    failed: DataError | None = None
    names: list[str | None] = [choice] if choice else [*choices] if choices else [None]
    for name in names:
        try:
            opened = asker.open(path, name, memory_limit=MEMORY_LIMIT)
        except DataError as error:
            failed = failed or error
            continue
        _refuse_huge_cells(opened)
        return name, opened
    assert failed is not None
    raise failed


def _refuse_huge_cells(opened: OpenTable) -> None:
    """A result repeats cells a thousand times: they have to stay small."""
    texts = [column.name for column in opened.profile.columns if column.storage == "text"]
    if not texts:
        return
    lengths = ", ".join('max(length("{}"))'.format(name.replace('"', '""')) for name in texts)
    row = opened.connection.execute(f"SELECT {lengths} FROM {TABLE}").fetchone() or ()
    for name, length in zip(texts, row, strict=False):
        if length and length > MAX_CELL:
            raise DataError(f"column {name!r} has a cell of {length} characters", f"at most {MAX_CELL} are taken")
