"""A plan in English: one line that tells the asker how the question was read."""

from __future__ import annotations

from datetime import date, timedelta

from upwell.analyst.plan import Condition, Dim, Measure, Plan
from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.slots import Slots
from upwell.analyst.sql import number_for, period

_FN = {
    "sum": "total", "avg": "average", "min": "lowest", "max": "highest", "median": "median",
    "distinct": "number of different",
}  # fmt: skip
_SYMBOLS = {"eq": "=", "ne": "is not", "gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe(plan: Plan, profile: TableProfile, slots: Slots) -> str:
    """For example: "average horsepower where origin = Japan, by year of sold, highest first"."""
    return _Reader(profile, slots).read(plan)


class _Reader:
    def __init__(self, profile: TableProfile, slots: Slots) -> None:
        self.columns, self.slots = profile.columns, slots

    def read(self, plan: Plan) -> str:
        if plan.kind == "noans":
            if plan.reason == "ambiguous":
                a, b = map(self.name, plan.columns)
                return f"unclear: {a} or {b}?"
            reasons = {"missing": "the table has no column for it"}
            return f"no answer: {reasons.get(plan.reason or '', 'not a question about the data')}"
        where = " and ".join(map(self.condition, plan.where))
        where = f" where {where}" if where else ""
        if plan.kind == "list":
            return f"different {' and '.join(map(self.name, plan.columns))}{where}"
        if plan.kind == "show":
            text = f"{', '.join(map(self.name, plan.columns))}{where}"
            if plan.sort_column is not None:
                text += f", {self.order(plan.sort, plan.sort_column)} {self.name(plan.sort_column)} first"
            return text + self.limit(plan)
        text = ", ".join(map(self.measure, plan.measures)) + where
        if plan.by:
            text += ", by " + " and ".join(map(self.dim, plan.by))
        if plan.having:
            op, slot = plan.having
            text += f", only {_SYMBOLS[op]} {self.number(slot)}"
        if plan.sort:
            text += f", {'highest' if plan.sort == 'desc' else 'lowest'} first"
        return text + self.limit(plan)

    def name(self, column: int) -> str:
        return " ".join(self.columns[column].words) or self.columns[column].name

    def order(self, sort: str | None, column: int) -> str:
        if self.columns[column].kind in (ColumnKind.DATE, ColumnKind.YEAR):
            return "latest" if sort == "desc" else "earliest"
        return "highest" if sort == "desc" else "lowest"

    def limit(self, plan: Plan) -> str:
        if plan.top is None:
            return ""
        return f", top {1 if plan.top == 'one' else self.number(plan.top)}"

    def number(self, slot: str) -> str:
        return f"{self.slots.numbers[int(slot[1:])].value:g}"

    def dim(self, dim: Dim) -> str:
        return f"{dim.unit} of {self.name(dim.column)}" if dim.unit else self.name(dim.column)

    def measure(self, measure: Measure) -> str:
        if measure.fn == "count":
            return "number of rows"
        if measure.fn == "share":
            what = "rows" if measure.column is None else f"total {self.name(measure.column)}"
            part = f" with {self.condition(measure.where)}" if measure.where else ""
            return f"share of {what}{part} in percent"
        assert measure.column is not None
        return f"{_FN[measure.fn]} {self.name(measure.column)}"

    def condition(self, test: Condition) -> str:
        name, op = self.name(test.column), test.op
        bare = {"null": f"{name} is empty", "notnull": f"{name} is known",
                "yes": name, "no": f"not {name}"}  # fmt: skip
        if op in bare:
            return bare[op]
        said = [self.slot(slot, test) for slot in test.slots]
        if op == "in":
            return f"{name} is {', '.join(said[:-1])} or {said[-1]}"
        if op == "between":
            return f"{name} between {said[0]} and {said[1]}"
        words = {"contains": "contains", "starts": "starts with", "ends": "ends with"}
        return f"{name} {words.get(op) or _SYMBOLS.get(op) or op} {said[0]}"

    def slot(self, slot: str, test: Condition) -> str:
        column, index = self.columns[test.column], int(slot[1:])
        if slot[0] == "V":
            return self.slots.values[index].spelled(test.column)[0]
        if slot[0] == "T":
            return f'"{self.slots.texts[index].text}"'
        if column.kind is ColumnKind.DATE:
            return _say_period(*period(slot, self.slots))
        value = number_for(self.slots.numbers[index], column)
        return str(value) if column.kind is ColumnKind.YEAR else f"{value:,}"


def _say_period(start: date, end: date) -> str:
    if end - start == timedelta(days=1):
        return start.isoformat()
    if (start.month, start.day, end) == (1, 1, date(start.year + 1, 1, 1)):
        return str(start.year)
    months = (end.year - start.year) * 12 + end.month - start.month
    if months == 1:
        return start.strftime("%B %Y")
    if months == 3 and start.month % 3 == 1:
        return f"Q{start.month // 3 + 1} {start.year}"
    return f"{start.isoformat()} to {(end - timedelta(days=1)).isoformat()}"
