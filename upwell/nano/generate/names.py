"""How people name the columns, rows, numbers and dates of a table."""

# ruff: noqa: E501 - a line holds the variants of one phrase
# fmt: off

from __future__ import annotations

import calendar
from random import Random
from typing import Any

from upwell.nano.generate.asked import Period
from upwell.nano.generate.lexicon import NO_NOUN, UNITS, keywords, plural, words
from upwell.nano.generate.tables import Column, Table

SMALL = "zero one two three four five six seven eight nine ten eleven twelve".split()
_ABBREVIATION = {
    "department": "dept", "quantity": "qty", "amount": "amt", "number": "no", "category": "cat",
    "temperature": "temp", "average": "avg", "manager": "mgr", "description": "desc",
    "reference": "ref", "customer": "cust", "employee": "emp", "product": "prod",
    "transaction": "txn", "percentage": "pct", "maximum": "max", "minimum": "min",
    "population": "pop", "apartment": "apt", "address": "addr", "account": "acct",
    "organisation": "org", "organization": "org", "experience": "exp", "education": "edu",
    "hours": "hrs", "minutes": "mins", "government": "govt", "university": "uni",
}  # fmt: skip
_PEOPLE = frozenset(
    """person employee worker member customer client patient student player athlete driver teacher
    user lead prospect applicant candidate borrower donor volunteer guest passenger subscriber agent
    author artist runner staff doctor nurse participant resident tenant voter contact buyer pupil
    learner rep engineer manager winner visitor musician singer actor mp politician owner seller
    freelancer scientist colleague tenant taxpayer prisoner soldier swimmer climber chef""".split()
)
_VAGUE = frozenset("name number type date id code value level total time rate this that with".split())


class Unsayable(Exception):
    """This intent has no natural wording for this table."""


class Names:
    """Random names of what is in one table. Reuse one for all questions about it."""

    def __init__(self, table: Table, rng: Random) -> None:
        self.table = table
        self.rng = rng
        self.person = any(pair[0].split()[-1] in _PEOPLE for pair in table.entity) or (
            table.key is not None and table.columns[table.key].spec.pool == "person"
        )
        self._table_words = keywords(" ".join(words(table.name)))
        self.by_label = False  # whether the question's rows go by their label's noun: "companies", not "records"
        times = [i for i, c in enumerate(table.columns) if c.kind in ("date", "year")]
        self._first_time = times[0] if all(table.columns[i].kind == "date" for i in times[:2]) and times else -1
        self._only_time = len(times) == 1
        every = [
            [*c.spec.say, *(" ".join(words(n)) for n in c.spec.names), c.header_words]
            for c in table.columns
        ]
        self._others = [
            [keywords(p) for j, phrases in enumerate(every) if j != i for p in phrases]
            for i in range(len(every))
        ]

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def own(self, phrase: str, index: int) -> bool:
        """Whether the phrase can only mean that column."""
        keys = keywords(phrase)
        return bool(keys) and not any(keys <= other for other in self._others[index])

    # -- columns and rows -------------------------------------------------------------------

    def column(self, index: int, raw: bool = True) -> str:
        """A noun phrase for a column: its header's words, other words for it, or a part of them."""
        rng, column = self.rng, self.table.columns[index]
        header = column.header_words
        if column.opaque:
            return column.header if rng.random() < 0.7 else column.header.lower()
        says = [s for s in column.say if s.split()[0] not in ("how", "where", "when", "what", "who", "which", "whether", "did")]
        roll = rng.random()
        header_safe = header and self.own(header, index) and len(header) > 2
        if roll < 0.3 and header_safe:
            return column.header if raw and rng.random() < 0.12 else header
        if roll < 0.45:
            part = self._partial(index, says)
            if part:
                return part
        if says:
            said = rng.choice(says)
            return said
        if header_safe:
            return header
        raise Unsayable(f"column {index}")

    def _partial(self, index: int, says: list[str]) -> str | None:
        rng, column = self.rng, self.table.columns[index]
        source = rng.choice([*says, column.header_words, column.header_words])
        parts = [w for w in source.split() if w not in ("the", "of", "a", "per", "in", "is")]
        if parts and rng.random() < 0.4:
            short = " ".join(_ABBREVIATION.get(w, w) for w in parts)
            if short != source:
                return short if self.own(source, index) else None
        # Without its unit or its last word's companions: "order total" for order_total_usd.
        kept = [w for w in parts if w not in UNITS]
        if len(kept) < 2:
            return None
        part = kept[-1] if rng.random() < 0.6 or len(kept) < 3 else " ".join(kept[:-1])
        if part.split()[-1].endswith(("ed", "en", "ing")) or part.split()[-1] in NO_NOUN:
            return None
        if len(part) < 4 or not self.own(part, index) or part in _VAGUE:
            return None
        return part

    def columns(self, index: int) -> str:
        """The column's noun, in the plural."""
        noun = self.column(index, raw=False)
        return noun if self.table.columns[index].opaque else plural(noun)

    def unnamed_time(self, index: int) -> bool:
        """Whether a time without a name ("in 2022", "per month") can mean this column: the only one, or by default
        the first date of several."""
        return self._only_time or (index == self._first_time and self.rng.random() < 0.45)

    def entity(self, many: bool = True) -> str:
        pairs = self.table.label_entity if self.by_label else self.table.entity
        named = [pair for pair in pairs if keywords(pair[0]) & self._table_words]
        pair = self.rng.choice(named if named and self.rng.random() < 0.5 else pairs)
        return pair[1] if many else pair[0]

    def who(self) -> str:
        return self.pick("who", "who", "that") if self.person else self.pick("that", "that", "which")

    # -- values -----------------------------------------------------------------------------

    def cased(self, value: str) -> str:
        roll = self.rng.random()
        if roll < 0.6 or not value[:1].isalpha():
            return value
        return value.lower() if roll < 0.97 else value.upper()

    def number(self, value: Any, column: Column | None = None) -> str:
        rng = self.rng
        text = self._digits(value)
        unit = column.unit if column else ""
        if unit and rng.random() < 0.35:
            shown = rng.choice(UNITS[unit])
            if shown in ("$", "€", "£"):
                return shown + text
            return f"{text}%" if shown == "%" else f"{text} {shown}"
        return text

    def _digits(self, value: Any) -> str:
        rng = self.rng
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, float):
            return f"{value:.10g}" if abs(value) < 1e9 else str(value)
        if 2 <= value <= 12 and rng.random() < 0.22:
            return SMALL[value]
        if abs(value) >= 1000:
            roll = rng.random()
            if value % 100000 == 0 and value >= 10**6 and roll < 0.5:
                return f"{value / 10**6:g}{rng.choice((' million', 'm', 'M', ' million'))}"
            if value % 100 == 0 and value < 10**6 and roll < 0.22:
                return f"{value / 1000:g}{rng.choice(('k', 'k', 'K', ' thousand'))}"
            if roll < 0.5:
                return f"{value:,}"
        return str(value)

    def date(self, when: Period) -> str:
        rng, d = self.rng, when.start
        if when.unit == "year":
            return str(d.year)
        if when.unit == "quarter":
            q = (d.month + 2) // 3
            return rng.choice((f"Q{q} {d.year}", f"q{q} {d.year}", f"{d.year} Q{q}",
                               f"the {('first', 'second', 'third', 'fourth')[q - 1]} quarter of {d.year}"))  # fmt: skip
        month, short = calendar.month_name[d.month], calendar.month_abbr[d.month]
        if when.unit == "month":
            return rng.choice((f"{month} {d.year}",) * 4 + (f"{short} {d.year}", f"{d.year}-{d.month:02d}"))
        return rng.choice((d.isoformat(), d.isoformat(), f"{month} {d.day}, {d.year}",
                           f"{d.day} {month} {d.year}", f"{short} {d.day} {d.year}"))  # fmt: skip
