"""Delimited text: whatever its encoding, delimiter and header, into DuckDB."""

from __future__ import annotations

import codecs
import csv
import gzip
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import duckdb

from upwell.analyst.schema import TABLE
from upwell.errors import DataError

_CHUNK = 1 << 20


def detect_encoding(path: Path) -> str:
    """utf-8, utf-16, gb18030 or cp1252. "utf-8 with errors" when few bytes break it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        head = file.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        file.seek(0)
        try:
            while chunk := file.read(_CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            file.seek(0)
            sample = file.read(4 * _CHUNK)
    text = sample.decode("utf-8", errors="replace")
    broken = text.count("\N{REPLACEMENT CHARACTER}")
    whole = sum(char > "\x7f" for char in text) - broken
    if whole > 10 * broken:
        return "utf-8 with errors"
    # In GB 18030 Chinese text is runs of two high bytes; Latin accents stand alone among letters.
    chinese = sample.decode("gb18030", errors="replace")
    high = [char for char in chinese if char > "\x7f"]
    common = sum("\u4e00" <= char <= "\u9fff" or "\u3000" <= char <= "\u303f" for char in high)
    pairs = sum(a > 0x7F and b > 0x7F for a, b in pairwise(sample))
    singles = sum(byte > 0x7F for byte in sample)
    if high and common >= 0.9 * len(high) and pairs >= 0.7 * singles:
        return "gb18030"
    return "cp1252"


@contextmanager
def readable_text(plain: Path, path: Path, notes: list[str]) -> Iterator[str]:
    """The path of the same text in UTF-8: the file itself, or a temporary copy, gone afterwards."""
    with plain.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed or path.name.lower().endswith(".zst"):
        yield str(plain)
        return
    encoding = detect_encoding(plain)
    if encoding == "utf-8":
        yield str(plain)
        return
    if encoding == "utf-8 with errors":
        notes.append("broken bytes in the UTF-8 text are shown as \N{REPLACEMENT CHARACTER}")
    else:
        notes.append(f"the text is not UTF-8; read as {encoding}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "data" + (path.suffix if path.suffix.isascii() else ""))
        name = encoding.removesuffix(" with errors")
        with (
            plain.open(encoding=name, errors="replace", newline="") as source,
            copy.open("w", encoding="utf-8", newline="") as target,
        ):
            while chunk := source.read(_CHUNK):
                target.write(chunk)
        yield str(copy)


def _options(connection: duckdb.DuckDBPyConnection, readable: str) -> dict[str, object]:
    """What DuckDB's own detection leaves open: tabs in .tsv, headers over text-only columns."""
    options: dict[str, object] = {}
    if Path(readable).suffix.lower() in (".tsv", ".tab"):
        options["delim"] = "\t"
    first = first_row(connection, readable)
    # Column names are words; a first row with a number or a gap may be data, for DuckDB to judge.
    if first and not any(cell == "" or _numeric(cell) for cell in first):
        options["header"] = True
    return options


def load_csv(connection: duckdb.DuckDBPyConnection, readable: str, path: Path) -> None:
    """CREATE TABLE t from the text; types from a sample, from all rows where that misleads."""
    options = _options(connection, readable)
    attempts: tuple[dict[str, object], ...] = (
        {},
        {"sample_size": -1},
        {"sample_size": -1, "null_padding": True, "strict_mode": False},
    )
    error: duckdb.Error | None = None
    for extra in attempts:
        chosen = options | extra
        arguments = "".join(f", {key} = {_literal(value)}" for key, value in chosen.items())
        try:
            connection.execute(
                f"CREATE OR REPLACE TABLE {TABLE} AS SELECT * FROM read_csv(?{arguments})",
                [readable],
            )
        except duckdb.Error as failure:
            error = failure
            continue
        columns = connection.table(TABLE).columns
        if len(columns) == 1 and path.suffix.lower() == ".txt":
            raise DataError(f"{path} is plain text, not a table")
        missed = [mark for mark in ",;\t|" if len(columns) == 1 and mark in columns[0]]
        if not missed or "delim" in options:
            return
        # Lines of unequal length made the detection give up: say the delimiter, fill short lines.
        options |= {"delim": missed[0], "null_padding": True, "header": True}
    reason = str(error).strip().split("\n")[0]
    raise DataError(f"{path} can't be read as CSV: {reason}")


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else f"'{value}'"


def first_row(connection: duckdb.DuckDBPyConnection, readable: str) -> list[str]:
    """The cells of the first line, under the delimiter that DuckDB detects."""
    try:
        found = connection.execute("SELECT Delimiter, Quote FROM sniff_csv(?)", [readable]).fetchone()
    except duckdb.Error:
        return []
    delimiter, quote = found or (",", '"')
    opened = gzip.open if readable.endswith(".gz") else open
    with opened(readable, "rt", encoding="utf-8-sig", newline="", errors="replace") as file:
        line = csv.reader(
            file,
            delimiter="\t" if readable.lower().endswith((".tsv", ".tab")) else delimiter[:1] or ",",
            quotechar=quote if len(quote) == 1 else '"',
        )
        try:
            return [cell.strip() for cell in next(line, [])]
        except csv.Error:
            return []


def describe_header(connection: duckdb.DuckDBPyConnection, readable: str) -> list[str]:
    """What to tell of the header: names that occur twice, and places without one."""
    cells = first_row(connection, readable)
    if not cells or any(_numeric(cell) for cell in cells):
        return []
    folded = [cell.lower() for cell in cells if cell]
    twice = dict.fromkeys(c for c in cells if c and folded.count(c.lower()) > 1)
    notes = [f"column name {name!r} occurs more than once; numbered" for name in twice]
    if "" in cells:
        blank = ", ".join(str(i) for i, cell in enumerate(cells, 1) if not cell)
        notes.append(f"no name over column {blank}")
    return notes


def _numeric(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
