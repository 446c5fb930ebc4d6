"""One table of an SQLite database into DuckDB, with the standard library alone.

SQLite types are per cell; a column gets the narrowest type that holds all its cells. Rows pass
through a temporary CSV, which DuckDB reads at full speed without pyarrow.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import duckdb

from upwell.analyst.schema import TABLE


def table_names(database: sqlite3.Connection) -> list[str]:
    """Tables and views with columns, without SQLite's own."""
    rows = database.execute(
        "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') "
        "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"
    )
    return [row[0] for row in rows]


def copy_table(
    database: sqlite3.Connection,
    name: str,
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    notes: list[str],
) -> None:
    """CREATE TABLE t with all rows of the SQLite table `name`."""
    database.text_factory = lambda data: data.decode("utf-8", errors="replace")
    table = _quoted(name)
    described = database.execute(f"PRAGMA table_info({table})").fetchall()
    types: dict[str, str] = {}
    for _, column, declared, *_ in described:
        quoted = _quoted(column)
        found = {row[0] for row in database.execute(f"SELECT DISTINCT typeof({quoted}) FROM {table}")} - {"null"}
        if "blob" in found:
            notes.append(f"column {column!r} holds binary data and is left out")
            continue
        types[column] = _duckdb_type(found, declared or "")
    passing = folder / "rows.csv"
    selected = ", ".join(map(_quoted, types))
    with passing.open("w", encoding="utf-8", newline="") as file:
        for row in database.execute(f"SELECT {selected} FROM {table}"):
            file.write(_line(row))
    passed = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(types) + 1))
    casts = ", ".join(
        f"CAST(c{i} AS {sql_type}) AS {_quoted(column)}" for i, (column, sql_type) in enumerate(types.items())
    )
    connection.execute(
        f"CREATE TABLE {TABLE} AS SELECT {casts} FROM read_csv(?, header = false, "
        f"auto_detect = false, delim = ',', quote = '\"', escape = '\"', "
        f"allow_quoted_nulls = false, columns = {{{passed}}})",
        [str(passing)],
    )


def _line(row: Iterable[object]) -> str:
    """NULL is an empty place, every other cell is quoted; a last cell keeps lines from being empty."""
    cells = ["" if c is None else '"' + str(c).replace('"', '""') + '"' for c in row]
    return ",".join(cells) + ",.\n"


def _duckdb_type(found: set[str], declared: str) -> str:
    if found == {"integer"}:
        return "BOOLEAN" if declared.upper().startswith("BOOL") else "BIGINT"
    return "DOUBLE" if found and found <= {"integer", "real"} else "VARCHAR"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
