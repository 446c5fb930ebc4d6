"""What a question asks for: the plan's shape, with values where the plan has slots."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Period:
    """A day, month, quarter or year: from `start`, up to and without `end`."""

    start: dt.date
    end: dt.date
    unit: str


@dataclass(frozen=True)
class Cond:
    """`args`: text for V and T, a number for N, a `Period` for D; none for null, yes, ..."""

    column: int
    op: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Dim:
    column: int
    unit: str = ""


@dataclass(frozen=True)
class Measure:
    """op: count sum avg min max median distinct share_rows share_sum; `cond` for the shares."""

    op: str
    column: int | None = None
    cond: Cond | None = None


@dataclass(frozen=True)
class Intent:
    form: str
    where: tuple[Cond, ...] = ()
    dims: tuple[Dim, ...] = ()
    measures: tuple[Measure, ...] = ()
    having: tuple[str, Any] | None = None
    sort: str | None = None
    sort_column: int | None = None
    top: int | None = None  # 1 is the plan's `one`
    show: tuple[int, ...] = ()
    listed: tuple[int, ...] = ()


def distinct_literals(intent: Intent) -> bool:
    """No value occurs twice: each then has one slot in the question."""
    conds = [*intent.where, *(m.cond for m in intent.measures if m.cond)]
    literals = [str(a).lower() for c in conds for a in c.args]
    if intent.having:
        literals.append(str(intent.having[1]))
    if intent.top and intent.top > 1:
        literals.append(str(intent.top))
    return len(set(literals)) == len(literals)
