"""A user's file as one table in a sealed in-memory DuckDB.

The file is only ever read. Once loaded, the connection loses access to files and network, and its
settings are locked, so that no query can reach further than the table `t`.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from upwell.analyst.csvfile import describe_header, load_csv, readable_text
from upwell.analyst.schema import TABLE, TableProfile
from upwell.analyst.words import split_name
from upwell.errors import DataError

Connection = duckdb.DuckDBPyConnection
KNOWN = "CSV, TSV, Parquet, JSON, JSON lines, Excel or SQLite"


@dataclass(frozen=True, slots=True)
class OpenTable:
    """A loaded table: query it through `connection` under the name `t`."""

    path: Path
    connection: Connection
    profile: TableProfile
    notes: tuple[str, ...] = ()  # what had to be mended or chosen, for the user to know


def open_table(
    path: str | os.PathLike[str], table: str | None = None, memory_limit: str | None = None
) -> OpenTable:
    """Load a file (`table`: which table of a database or sheet of a workbook).

    `memory_limit`, as DuckDB writes it ("1GB"), holds for the table and its queries; None: DuckDB's own.

    Raises DataError, in one line, when there is no table to be had from it.
    """
    path = Path(path)
    kind = file_kind(path)
    connection = connect(memory_limit)
    notes: list[str] = []
    name = path.name.split(".")[0]
    try:
        if kind in ("sqlite", "excel"):
            load = load_sqlite if kind == "sqlite" else load_excel
            picked = load(connection, path, table, notes)
            name = picked if kind == "sqlite" else name
        else:
            if table is not None:
                raise DataError(f"{path} holds one table only", "leave out --table")
            _LOADERS[kind](connection, path, notes)
    except duckdb.Error as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{path} can't be read as {kind}: {reason}") from error
    except MemoryError as error:
        raise DataError(f"{path} doesn't fit into memory") from error
    tidy(connection, notes)
    n_rows = connection.execute(f"SELECT count(*) FROM {TABLE}").fetchone()
    if not n_rows or not n_rows[0]:
        raise DataError(f"{path} has columns but no rows", "there is nothing to ask about")
    seal(connection)
    profile = TableProfile.from_duckdb(connection, " ".join(split_name(name)) or name)
    return OpenTable(path, connection, profile, tuple(notes))


def connect(memory_limit: str | None = None) -> Connection:
    """An in-memory database that never spills beside the user's files nor loads extensions."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "temp_directory": "",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    if memory_limit is not None:
        config["memory_limit"] = memory_limit
    return duckdb.connect(":memory:", config=config)


def seal(connection: Connection) -> None:
    """Take away files, network and settings; this can't be undone on the connection."""
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


_BY_SUFFIX = {
    ".csv": "csv", ".tsv": "csv", ".tab": "csv", ".txt": "csv", ".psv": "csv", ".data": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".xlsx": "excel", ".xlsm": "excel", ".xls": "excel", ".xlsb": "excel", ".ods": "excel",
    ".db": "sqlite", ".sqlite": "sqlite", ".sqlite3": "sqlite", ".db3": "sqlite",
}  # fmt: skip
_MAGIC = (
    (b"PAR1", "parquet"), (b"SQLite format 3\0", "sqlite"), (b"\xd0\xcf\x11\xe0", "excel"),
    (b"PK\x03\x04", "excel"),
)  # fmt: skip


def file_kind(path: Path) -> str:
    """csv, parquet, json, excel or sqlite: by content where that is plain, else by suffix."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a directory", f"name a file: {KNOWN}")
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path} can't be opened: {error.strerror}") from error
    if not head.strip():
        raise DataError(f"{path} is empty")
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in (".gz", ".zst")]
    named = _BY_SUFFIX.get(suffixes[-1] if suffixes else "")
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            if kind == "excel" and named not in (None, "excel"):
                break
            return kind
    packed = head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd"))
    if named in ("parquet", "sqlite", "excel"):
        raise DataError(f"{path} is no {named} file in spite of its name", f"known: {KNOWN}")
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if b"\0" in head and not packed and not utf16:
        raise DataError(f"{path} is not a table (binary data)", f"known: {KNOWN}")
    if named:
        return named
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
    if packed or not start:
        raise DataError(f"{path} is not a table", f"known: {KNOWN}")
    lines = head.split(b"\n")[:-1][:5]
    if start in (b"{", b"["):
        return "json"
    for mark in (b",", b"\t", b";", b"|"):
        counts = {line.count(mark) for line in lines}
        if len(lines) > 1 and len(counts) == 1 and counts != {0}:
            return "csv"
    raise DataError(f"{path} is not a table", f"known: {KNOWN}")


@contextmanager
def plain_path(path: Path) -> Iterator[str]:
    """A path that DuckDB won't read as a pattern: a link from elsewhere where the name has any."""
    absolute = str(path.resolve())
    if not any(mark in absolute for mark in "*?[]{}"):
        yield absolute
        return
    with tempfile.TemporaryDirectory() as folder:
        alias = Path(folder, "data" + "".join(s for s in path.suffixes if s.isascii())[-16:])
        alias.symlink_to(absolute)
        yield str(alias)


def load_text_table(connection: Connection, path: Path, notes: list[str]) -> None:
    with plain_path(path) as plain, readable_text(Path(plain), path, notes) as readable:
        notes += describe_header(connection, readable)
        load_csv(connection, readable, path)


def load_parquet(connection: Connection, path: Path, notes: list[str]) -> None:
    with plain_path(path) as plain:
        connection.execute(f"CREATE TABLE {TABLE} AS SELECT * FROM read_parquet(?)", [plain])


def load_json(connection: Connection, path: Path, notes: list[str]) -> None:
    with plain_path(path) as plain, readable_text(Path(plain), path, notes) as readable:
        connection.execute(f"CREATE TABLE {TABLE} AS SELECT * FROM read_json_auto(?, sample_size = -1)", [readable])
    columns = connection.execute(f"DESCRIBE {TABLE}").fetchall()
    if [column[0] for column in columns] == ["json"] or columns[0][1] == "JSON":
        raise DataError(f"{path} holds no records", "wanted: a list of objects, or one a line")
    if len(columns) == 1 and columns[0][1].startswith("STRUCT") and columns[0][1].endswith("[]"):
        key = columns[0][0]  # {"rows": [{...}, ...]}
        quoted = '"' + key.replace('"', '""') + '"'
        connection.execute(f"CREATE OR REPLACE TABLE {TABLE} AS SELECT unnest({quoted}, max_depth := 2) FROM {TABLE}")
        notes.append(f"read the records under {key!r}")


_LOADERS: dict[str, Callable[[Connection, Path, list[str]], None]] = {
    "csv": load_text_table,
    "parquet": load_parquet,
    "json": load_json,
}


def load_excel(connection: Connection, path: Path, table: str | None, notes: list[str]) -> str:
    try:
        import fastexcel
    except ImportError as error:
        raise DataError(f"{path}: reading Excel needs fastexcel", "pip install fastexcel") from error
    try:
        book = fastexcel.read_excel(path)
        names = book.sheet_names
        if table is not None and table not in names:
            raise DataError(f"{path} has no sheet {table!r}", f"it has: {', '.join(names)}")
        filled = [n for n in names if table in (None, n)]
        sheets = {n: sheet for n in filled if (sheet := book.load_sheet(n)).width}
    except fastexcel.FastExcelError as error:
        raise DataError(f"{path} can't be read as Excel: {str(error).splitlines()[0]}") from error
    if not sheets:
        raise DataError(f"{path} is empty")
    picked, sheet = next(iter(sheets.items()))
    if len(sheets) > 1:
        rest = ", ".join(name for name in sheets if name != picked)
        notes.append(f"read sheet {picked!r}; others, by --table: {rest}")
    connection.register("sheet", sheet)
    connection.execute(f"CREATE TABLE {TABLE} AS SELECT * FROM sheet")
    connection.unregister("sheet")
    return picked


def load_sqlite(connection: Connection, path: Path, table: str | None, notes: list[str]) -> str:
    """Copy one table over. A database with a write-ahead log is read from a copy: SQLite would
    write beside the original."""
    from upwell.analyst.sqlitefile import copy_table, table_names

    with tempfile.TemporaryDirectory() as folder:
        source = path.resolve()
        log = source.with_name(source.name + "-wal")
        if log.exists() and log.stat().st_size:
            copy = Path(folder, "data.db")
            copy.write_bytes(source.read_bytes())
            copy.with_name("data.db-wal").write_bytes(log.read_bytes())
            uri = copy.as_uri()
        else:
            uri = source.as_uri() + "?mode=ro&immutable=1"
        try:
            database = sqlite3.connect(uri, uri=True)
            try:
                names = table_names(database)
                picked = _pick(path, names, table)
                copy_table(database, picked, connection, Path(folder), notes)
            finally:
                database.close()
        except (sqlite3.Error, UnicodeDecodeError) as error:  # damaged files, or names that are no text
            raise DataError(f"{path} can't be read as SQLite: {error}") from error
    return picked


def _pick(path: Path, names: list[str], table: str | None) -> str:
    if not names:
        raise DataError(f"{path} holds no tables")
    if table is not None:
        by_name = {name.lower(): name for name in names}
        if table.lower() not in by_name:
            raise DataError(f"{path} has no table {table!r}", f"it has: {', '.join(names)}")
        return by_name[table.lower()]
    if len(names) > 1:
        raise DataError(f"{path} holds {len(names)} tables: {', '.join(names[:20])}", "choose by --table NAME")
    return names[0]


def tidy(connection: Connection, notes: list[str]) -> None:
    """Give every column a usable, unique name and a plain type; say what was changed."""
    described = connection.execute(f"DESCRIBE {TABLE}").fetchall()
    seen: set[str] = {row[0].lower() for row in described}
    for i, (name, sql_type, *_) in enumerate(described, 1):
        clean = " ".join(name.split())
        if not clean:
            clean = f"column {i}"
        if clean != name:
            while clean.lower() in seen:
                clean += "_"
            seen.add(clean.lower())
            _alter(connection, f"RENAME COLUMN {_quoted(name)} TO {_quoted(clean)}")
            if not name.strip():
                notes.append(f"column {i} has no name and is called {clean!r}")
        wanted = _plain_type(connection, clean, sql_type)
        if wanted:
            _alter(connection, f"ALTER COLUMN {_quoted(clean)} SET DATA TYPE {wanted}")


def _plain_type(connection: Connection, name: str, sql_type: str) -> str | None:
    """The type to cast a column to: nested and rare types to text, midnights to days."""
    base = sql_type.upper().split("(")[0]
    if sql_type.endswith("]") or base in (
        "STRUCT", "MAP", "UNION", "ENUM", "BLOB", "BIT", "UUID", "JSON", "INTERVAL", "NULL",
        "VARIANT", '"NULL"', "GEOMETRY",
    ):  # fmt: skip
        return "VARCHAR"
    if base in ("HUGEINT", "UHUGEINT", "BIGNUM"):
        return "DOUBLE"
    if base.startswith("TIMESTAMP"):
        column = _quoted(name)
        row = connection.execute(
            f"SELECT count({column}), bool_and(CAST({column} AS TIMESTAMP) = "
            f"date_trunc('day', CAST({column} AS TIMESTAMP))) FROM {TABLE}"
        ).fetchone()
        if row and row[0] and row[1]:
            return "DATE"
        return "TIMESTAMP" if base != "TIMESTAMP" else None
    return None


def _alter(connection: Connection, change: str) -> Any:
    return connection.execute(f"ALTER TABLE {TABLE} {change}")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
