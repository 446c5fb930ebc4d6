"""The profile of a table: per column its name's words, kind, sample values and range.

Made from a DuckDB connection for a user's file, or from plain Python lists for training data; both
go through the same rules, so that the model sees at work what it saw in training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from upwell.analyst.words import split_name

if TYPE_CHECKING:
    import duckdb

TABLE = "t"  # the name under which every table is loaded and queried
MAX_VALUES = 5000  # distinct cells kept per column for linking


class ColumnKind(StrEnum):
    NUM = "num"  # a quantity
    YEAR = "year"  # an integer column of years
    DATE = "date"  # dates or timestamps, also text that holds ISO dates
    CAT = "cat"  # few distinct values
    KEY = "key"  # (nearly) unique per row: the row's name
    TEXT = "text"  # any other text
    FLAG = "flag"  # boolean or a two-valued stand-in for it


@dataclass(frozen=True, slots=True)
class ColumnProfile:
    """What is known of a column. `values` are distinct non-null cells as text, frequent first."""

    name: str
    words: tuple[str, ...]
    kind: ColumnKind
    storage: str  # text, integer, real, boolean, date, timestamp
    values: tuple[str, ...]  # empty for quantities and dates
    samples: tuple[str, ...]  # short, for the prompt
    n_distinct: int
    n_null: int
    minimum: float | date | None = None
    maximum: float | date | None = None
    truth: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # flags: cells for yes, for no

    @property
    def is_numeric(self) -> bool:
        return self.storage in ("integer", "real")

    @property
    def is_text(self) -> bool:
        return self.storage == "text"


def _is_title(column: ColumnProfile, code: ColumnProfile) -> bool:
    if column.kind is not ColumnKind.TEXT or column.n_distinct < code.n_distinct or not column.values:
        return False
    return sum(map(len, column.values)) <= 40 * len(column.values)


@dataclass(frozen=True, eq=False)
class TableProfile:
    """A table's schema with its sample values. Compared by identity: linkers are kept per table."""

    name: str
    n_rows: int
    columns: tuple[ColumnProfile, ...]

    @cached_property
    def row_names(self) -> tuple[int, ...]:
        """The columns, two at most, that name rows: a code, a title."""
        names = [i for i, column in enumerate(self.columns) if column.kind is ColumnKind.KEY]
        if names:  # a short description that tells all rows apart is a title
            code = self.columns[names[0]]
            names[1:1] = [i for i, column in enumerate(self.columns) if _is_title(column, code)][:1]
        return tuple(names[:2])

    @classmethod
    def from_rows(cls, name: str, columns: Mapping[str, Sequence[Any]]) -> TableProfile:
        """Profile plain lists (None for NULL) of str, bool, int, float, date or datetime."""
        n_rows = max((len(cells) for cells in columns.values()), default=0)
        profiles = []
        for column, cells in columns.items():
            counts = Counter(cells)
            n_null = counts.pop(None, 0)
            distinct = [value for value, _ in counts.most_common()]
            storage = _storage(distinct)
            low = high = None
            if storage not in ("text", "boolean") and distinct:
                low, high = min(distinct), max(distinct)
            profiles.append(profile_column(column, storage, distinct, len(distinct), n_null, n_rows, low, high))
        return cls(name, n_rows, tuple(profiles))

    @classmethod
    def from_duckdb(cls, connection: duckdb.DuckDBPyConnection, name: str) -> TableProfile:
        """Profile the table `t` of an open connection, by SQL; `name` is what people call it."""
        described = connection.execute(f"DESCRIBE {TABLE}").fetchall()
        n_rows = _one(connection, f"SELECT count(*) FROM {TABLE}")[0]
        profiles = []
        for column, sql_type, *_ in described:
            quoted = '"' + column.replace('"', '""') + '"'
            storage = _storage_of_type(sql_type)
            distinct_sql = f"approx_count_distinct({quoted})"
            ranged = storage not in ("text", "boolean")
            n, about, low, high = _one(
                connection,
                f"SELECT count({quoted}), {distinct_sql}, "
                + (f"min({quoted}), max({quoted})" if ranged else "NULL, NULL")
                + f" FROM {TABLE}",
            )
            few = about <= 2 * MAX_VALUES
            values: list[Any] = []
            if not ranged or (storage == "integer" and few):
                # Of a column with very many values the most frequent of a sample are enough.
                source = TABLE if few else f"(SELECT {quoted} FROM {TABLE} USING SAMPLE 50000)"
                rows = connection.execute(
                    f"SELECT {quoted}, count(*) AS n FROM {source} WHERE {quoted} IS NOT NULL "
                    f"GROUP BY ALL ORDER BY n DESC, 1 LIMIT {MAX_VALUES + 1}"
                ).fetchall()
                values = [value for value, _ in rows]
            n_distinct = len(values) if 0 < len(values) <= MAX_VALUES and few else min(about, n)
            if storage == "text":
                values = [str(value) for value in values]
            profiles.append(profile_column(column, storage, values, n_distinct, n_rows - n, n_rows, low, high))
        return cls(name, n_rows, tuple(profiles))


def _one(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    row = connection.execute(sql).fetchone()
    assert row is not None
    return row


def _storage(distinct: Iterable[Any]) -> str:
    kinds = {type(value) for value in distinct}
    if not kinds:
        return "text"
    if kinds == {bool}:
        return "boolean"
    if kinds <= {int, bool}:
        return "integer"
    if kinds <= {int, float, bool}:
        return "real"
    if datetime in kinds and kinds <= {date, datetime}:
        return "timestamp"
    return "date" if kinds == {date} else "text"


def _storage_of_type(sql_type: str) -> str:
    base = sql_type.upper().split("(")[0]
    if sql_type.endswith("]"):
        return "text"
    if base.endswith("INT") or base in ("INTEGER", "UINTEGER"):
        return "integer"
    if base in ("DOUBLE", "FLOAT", "REAL", "DECIMAL"):
        return "real"
    if base.startswith("TIMESTAMP"):
        return "timestamp"
    return {"BOOLEAN": "boolean", "DATE": "date"}.get(base, "text")


_ISO = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?$")
_TRUTH = (("yes", "no"), ("y", "n"), ("true", "false"), ("t", "f"))
_YEAR_WORDS = frozenset(
    """year yr yob season vintage founded established born birthyear built since opened released
    decade""".split()
)
# An integer under such a name is a label, not a quantity.
_CODE_WORDS = frozenset(
    """id ids code zip zipcode postcode postal fips iso ssn isbn sku ean upc barcode phone uid uuid
    guid pk key""".split()
)
_CLASS_WORDS = frozenset("class pclass type category cluster zone label cohort".split())
_NOT_NAMES = frozenset(
    """email mail phone fax url link website address street notes note comment comments description
    remark remarks summary review text body message details feedback""".split()
)


def profile_column(
    name: str,
    storage: str,
    distinct: Sequence[Any],
    n_distinct: int,
    n_null: int,
    n_rows: int,
    low: Any = None,
    high: Any = None,
) -> ColumnProfile:
    """Decide a column's kind. `distinct`: non-null cells, most frequent first, maybe not all."""
    words = split_name(name)
    filled = n_rows - n_null
    kind, truth = ColumnKind.NUM, ((), ())  # type: tuple[ColumnKind, Any]
    texts: tuple[str, ...] = ()
    if storage == "boolean":
        kind, truth = ColumnKind.FLAG, (("true",), ("false",))
    elif storage in ("date", "timestamp"):
        kind = ColumnKind.DATE
    elif storage == "integer":
        kind = _integer_kind(words, distinct, n_distinct, filled, low, high)
        if kind is ColumnKind.FLAG:
            truth = (("1",), ("0",))
        if kind in (ColumnKind.CAT, ColumnKind.KEY, ColumnKind.TEXT):
            texts = tuple([str(value) for value in distinct[:MAX_VALUES]])
    elif storage == "text":
        texts = tuple([str(value) for value in distinct[:MAX_VALUES]])
        kind, truth = _text_kind(words, texts, n_distinct, filled)
        if kind is ColumnKind.DATE:
            low, high = _day(min(texts)), _day(max(texts))
            texts = ()
    if isinstance(low, datetime):
        low, high = low.date(), high.date()
    elif low is not None and storage in ("integer", "real"):
        low, high = float(low), float(high)
    if kind is ColumnKind.FLAG:
        samples = tuple([_short(cell) for side in truth for cell in side[:1]])
    else:
        samples = tuple(dict.fromkeys([_short(text) for text in texts[:3] if text.strip()]))
    return ColumnProfile(name, words, kind, storage, texts, samples, n_distinct, n_null, low, high, truth)


def _integer_kind(
    words: tuple[str, ...], distinct: Sequence[Any], n_distinct: int, filled: int, low: Any, high: Any
) -> ColumnKind:
    if n_distinct == 2 and low == 0 and high == 1:
        return ColumnKind.FLAG
    if not _CODE_WORDS.isdisjoint(words[-1:]):
        if n_distinct >= 0.9 * filled and filled > 1:
            return ColumnKind.KEY
        return ColumnKind.CAT if n_distinct <= 60 else ColumnKind.TEXT
    if not _CLASS_WORDS.isdisjoint(words) and n_distinct <= 12:
        return ColumnKind.CAT
    if low is None:
        return ColumnKind.NUM
    # "years of service" counts years; "model year" 70..82 names them.
    named = not _YEAR_WORDS.isdisjoint(words)
    if named and low >= 1000 and high <= 2200:
        return ColumnKind.YEAR
    if words[-1:] == ("year",) and low >= 30 and high < 100:
        return ColumnKind.YEAR
    if low >= 1900 and high <= 2035 and n_distinct > 1 and words[-1:] not in (("price",), ("sqft",)):
        return ColumnKind.YEAR
    return ColumnKind.NUM


def _text_kind(words: tuple[str, ...], texts: tuple[str, ...], n_distinct: int, filled: int) -> tuple[ColumnKind, Any]:
    none: Any = ((), ())
    if not texts:
        return ColumnKind.TEXT, none
    if n_distinct <= 4:
        folded = {text.strip().lower() for text in texts}
        for yes, no in _TRUTH:
            if folded <= {yes, no} and (len(folded) == 2 or yes in ("yes", "true")):
                sides = [tuple(t for t in texts if t.strip().lower() == side) for side in (yes, no)]
                return ColumnKind.FLAG, (sides[0] or (yes,), sides[1] or (no,))
    if _ISO.match(texts[0].strip()) and all(_is_day(text) for text in texts[:500]):
        return ColumnKind.DATE, none
    described = not _NOT_NAMES.isdisjoint(words)
    some = texts[:200]
    length = sum(map(len, some)) / len(some)
    if n_distinct >= 0.7 * filled and filled > 1 and length <= 40 and not described:
        # Few rows with few values, e.g. eight rows of regions, are still told apart by name.
        return ColumnKind.KEY, none
    if n_distinct <= 12 or (n_distinct <= 60 and 2 * n_distinct < filled):
        return (ColumnKind.TEXT if described and length > 40 else ColumnKind.CAT), none
    return ColumnKind.TEXT, none


def _is_day(text: str) -> bool:
    return _ISO.match(text.strip()) is not None and _day(text) is not None


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text.strip()[:10])
    except ValueError:
        return None


def _short(text: str) -> str:
    """A cell cut to 3 words and 18 characters, lower-case: enough to show what a column holds."""
    words = text.lower().split()[:3]
    return " ".join(words)[:18].strip()
