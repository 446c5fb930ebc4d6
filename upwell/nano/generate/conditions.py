"""Random conditions that make sense for a table's columns."""

from __future__ import annotations

import datetime as dt
import math
from random import Random
from typing import Any

from upwell.nano.generate.asked import Cond, Period
from upwell.nano.generate.tables import Table


def nice(value: float, integer: bool, rng: Random) -> float | int:
    """A threshold a person would type near `value`."""
    if rng.random() < 0.15:
        return value if isinstance(value, int) else round(value, 2)
    if value == 0:
        return 0
    digits = 1 if rng.random() < 0.6 else 2
    power = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, power)
    return int(rounded) if integer or float(rounded).is_integer() else rounded


def period(day: dt.date, unit: str) -> Period:
    if unit == "day":
        return Period(day, day + dt.timedelta(days=1), unit)
    first = {"year": 1, "quarter": day.month - (day.month - 1) % 3, "month": day.month}[unit]
    last = {"year": 12, "quarter": first + 2, "month": first}[unit]
    after = dt.date(day.year + last // 12, last % 12 + 1, 1)
    return Period(dt.date(day.year, first, 1), after, unit)


def as_date(value: Any) -> dt.date:
    return value if isinstance(value, dt.date) else dt.date.fromisoformat(value)


class ConditionSampler:
    """Draws conditions for one table. `usable` are the columns profiled as the kind intended."""

    def __init__(self, table: Table, usable: frozenset[int], rng: Random) -> None:
        self.table = table
        self.rng = rng
        self.usable = usable
        columns = table.columns
        asked = [i for i, c in enumerate(columns) if i in usable and (c.say or c.opaque)]
        self.num = [i for i in asked if columns[i].kind == "num"]
        self.additive = [i for i in self.num if columns[i].spec.additive]
        self.cat = [i for i in asked if columns[i].kind == "cat"]
        self.flag = [i for i in sorted(usable) if columns[i].kind == "flag" and not columns[i].opaque]
        self.date = [i for i in asked if columns[i].kind == "date"]
        self.year = [i for i in asked if columns[i].kind == "year"]
        self.any = asked
        self.key = table.key if table.key in usable else None
        self.label = table.label if table.label in asked else None
        self.codes = [i for i in asked if columns[i].kind == "key" and columns[i].spec.pool == "code"]

    def where(self, weights: tuple[float, ...] = (55, 33, 10, 2), avoid: tuple[int, ...] = ()) -> tuple[Cond, ...]:
        count = self.rng.choices(range(len(weights)), weights)[0]
        out: list[Cond] = []
        for _ in range(6):
            if len(out) == count:
                break
            made = self.cond(avoid + tuple(c.column for c in out))
            if made:
                out.append(made)
        return tuple(out)

    def moment(self) -> tuple[Cond, ...]:
        """One year: what makes the rows of a panel single."""
        pool = self.year + self.date
        if not pool:
            return ()
        column = self.rng.choice(pool)
        present = self.table.columns[column].present()
        if not present:
            return ()
        if column in self.year:
            return (Cond(column, "eq", (self.rng.choice(present),)),)
        return (Cond(column, "on", (period(as_date(self.rng.choice(present)), "year"),)),)

    def cond(self, avoid: tuple[int, ...] = ()) -> Cond | None:
        rng, columns = self.rng, self.table.columns
        kinds = ("cat", "num", "date", "year", "flag", "text", "key", "null")
        kind = rng.choices(kinds, (36, 27, 27, 13, 18, 4, 5, 13))[0]
        if kind == "null":
            pool = [i for i in self.any if columns[i].nulls and not columns[i].opaque]
        elif kind == "cat":
            pool = [i for i in sorted(self.usable) if columns[i].kind == "cat"]
        elif kind == "flag":
            pool = self.flag
        else:
            pool = [i for i in self.any if columns[i].kind == kind]
        pool = [i for i in pool if i not in avoid]
        if not pool:
            return None
        i = rng.choice(pool)
        if kind == "key":
            return self._text(i, columns[i].present())
        if kind == "null":
            return Cond(i, "null" if rng.random() < 0.72 else "notnull")
        if kind == "flag":
            return Cond(i, "yes" if rng.random() < 0.65 else "no")
        present = columns[i].present()
        if not present:
            return None
        return getattr(self, f"_cond_{kind}")(i, present)

    def _cond_cat(self, i: int, present: list[Any]) -> Cond | None:
        rng = self.rng
        values = sorted({str(v) for v in present})
        roll = rng.random()
        if roll < 0.02 and not self.table.columns[i].coded:
            return self._text(i, present)
        if roll < 0.78 or len(values) < 4:
            return Cond(i, "eq", (str(rng.choice(present)),))
        if roll < 0.88:
            return Cond(i, "ne", (rng.choice(values),))
        return Cond(i, "in", tuple(rng.sample(values, 2 if rng.random() < 0.8 else 3)))

    def _text(self, i: int, present: list[Any]) -> Cond | None:
        rng = self.rng
        value = str(rng.choice(present))
        tokens = [t.strip(";,.") for t in value.split()]
        op = rng.choice(("contains", "contains", "contains", "starts", "ends"))
        if op == "contains":
            part = rng.choice(tokens)
            part = part if len(part) < 5 or rng.random() < 0.7 else part[: rng.randint(3, len(part))]
        elif op == "starts":
            part = value[0] if rng.random() < 0.4 else tokens[0][: rng.randint(2, 6)]
        else:
            part = tokens[-1][-rng.randint(2, 4) :] if rng.random() < 0.5 else tokens[-1]
        return Cond(i, op, (part,)) if part.isalnum() else None

    def _cond_text(self, i: int, present: list[Any]) -> Cond | None:
        return self._text(i, present)

    def _cond_num(self, i: int, present: list[Any]) -> Cond | None:
        rng = self.rng
        column = self.table.columns[i]
        ordered = sorted(present)
        pick = ordered[int(rng.uniform(0.1, 0.9) * (len(ordered) - 1))]
        value = nice(pick, column.spec.integer, rng)
        op = rng.choices(("gt", "lt", "ge", "le", "between", "eq", "ne"), (38, 24, 11, 9, 15, 8, 1))[0]
        few = sorted({v for v in present if isinstance(v, int)})
        if op == "eq" and rng.random() < 0.15 and 3 <= len(few) <= 20:
            return Cond(i, "in", tuple(rng.sample(few, 2)))
        if op == "between":
            other = nice(ordered[int(rng.uniform(0.2, 1.0) * (len(ordered) - 1))], column.spec.integer, rng)
            return Cond(i, op, (min(value, other), max(value, other))) if value != other else None
        if op in ("eq", "ne"):
            value = pick
        return Cond(i, op, (value,))

    def _cond_year(self, i: int, present: list[Any]) -> Cond | None:
        rng = self.rng
        op = rng.choices(("eq", "gt", "lt", "ge", "le", "between", "ne"), (36, 20, 20, 11, 2, 10, 1))[0]
        first, second = rng.choice(present), rng.choice(present)
        if op == "between" and rng.random() < 0.3 and first >= 1800:
            return Cond(i, op, (first - first % 10, first - first % 10 + 9))
        if op == "between":
            return Cond(i, op, (min(first, second), max(first, second))) if first != second else None
        return Cond(i, op, (first,))

    def _cond_date(self, i: int, present: list[Any]) -> Cond | None:
        rng = self.rng
        op = rng.choices(("on", "after", "before", "since", "between"), (46, 19, 17, 8, 10))[0]
        unit = rng.choices(("year", "month", "day", "quarter"), (58, 20, 15, 7))[0]
        days = sorted(as_date(rng.choice(present)) for _ in range(2))
        first, second = period(days[0], unit), period(days[1], unit)
        if op == "between":
            return Cond(i, op, (first, second)) if first != second else None
        return Cond(i, op, (first,))
