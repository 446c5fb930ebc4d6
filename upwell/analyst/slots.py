"""What plain code finds in a question before any model sees it: values, numbers, dates, literals.

A plan refers to these by kind and number (V0, N1, D0, T0), in the order of the question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date

MAX_VALUES, MAX_NUMBERS, MAX_DATES, MAX_TEXTS = 10, 8, 6, 4


@dataclass(frozen=True, slots=True)
class ValueSlot:
    """A cell value: the columns that hold it, best first, and its spellings in each of them."""

    text: str  # as the question has it
    columns: tuple[int, ...]
    spellings: tuple[tuple[str, ...], ...]  # parallel to columns

    @property
    def value(self) -> str:
        return self.spellings[0][0]

    def spelled(self, column: int) -> tuple[str, ...]:
        """The exact cells of this column that the slot stands for."""
        return self.spellings[self.columns.index(column)]


@dataclass(frozen=True, slots=True)
class NumberSlot:
    """A number; `year` when it can be read as one, `percent` when written with a percent sign."""

    text: str
    value: int | float
    year: bool = False
    percent: bool = False


@dataclass(frozen=True, slots=True)
class DateSlot:
    """A day or period: from `start`, up to and without `end`."""

    text: str
    start: date
    end: date


@dataclass(frozen=True, slots=True)
class TextSlot:
    """Literal text for contains / starts / ends; `columns` are those whose cells hold it."""

    text: str
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Slots:
    values: tuple[ValueSlot, ...] = ()
    numbers: tuple[NumberSlot, ...] = ()
    dates: tuple[DateSlot, ...] = ()
    texts: tuple[TextSlot, ...] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """A sign behind a span of the question: columns it names ("C"), or slot `kind``index`.

    For "C" all `columns` fit the span equally well, `partial` when only loosely; for slots they
    are the columns that hold the value.
    """

    kind: str  # C, V, N, D, T
    index: int = 0
    columns: tuple[int, ...] = ()
    partial: bool = False
    start: int = 0  # characters of the question
    end: int = 0


@dataclass(frozen=True, slots=True)
class LinkedQuestion:
    """The question cut into (text, marks that follow it), and its slots."""

    question: str
    segments: tuple[tuple[str, tuple[Mark, ...]], ...]
    slots: Slots = field(default_factory=Slots)

    @property
    def marks(self) -> list[Mark]:
        return [mark for _, marks in self.segments for mark in marks]

    @property
    def columns(self) -> list[int]:
        """Every column that some mark names, in the order of first mention."""
        return list(dict.fromkeys(c for mark in self.marks for c in mark.columns))
