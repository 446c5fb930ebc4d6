"""From an intent and the linked question to the plan: each value meant must be a slot found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upwell.analyst.plan import Condition, Dim, Measure, Plan
from upwell.analyst.slots import LinkedQuestion
from upwell.nano.generate.asked import Cond, Intent, Period
from upwell.nano.generate.tables import Table


class Unlinked(Exception):
    """The linker did not find something the intent means; the message is the cause's kind."""


class Planner:
    """Maps one intent's literals to the slots of its question."""

    def __init__(self, table: Table, linked: LinkedQuestion) -> None:
        self.table = table
        self.linked = linked
        self.slots = linked.slots

    def value(self, text: str, column: int) -> str:
        wanted = text.strip().lower()
        for k, slot in enumerate(self.slots.values):
            if column in slot.columns and any(s.strip().lower() == wanted for s in slot.spelled(column)):
                return f"V{k}"
        raise Unlinked("value")

    def number(self, value: Any, year: bool = False) -> str:
        for k, slot in enumerate(self.slots.numbers):
            if abs(slot.value - value) <= 1e-9 * max(1.0, abs(value)) and (slot.year or not year):
                return f"N{k}"
        raise Unlinked("number")

    def period(self, when: Period) -> str:
        if when.unit == "year":
            return self.number(when.start.year, year=True)
        for k, slot in enumerate(self.slots.dates):
            if slot.start == when.start and slot.end == when.end:
                return f"D{k}"
        raise Unlinked("date")

    def text(self, text: str, column: int) -> str:
        for k, slot in enumerate(self.slots.texts):
            if slot.text.strip().lower() == text.lower() and (not slot.columns or column in slot.columns):
                return f"T{k}"
        raise Unlinked("text")

    def condition(self, cond: Cond) -> Condition:
        kind = self.table.columns[cond.column].kind
        if cond.op in ("contains", "starts", "ends"):
            return Condition(cond.column, cond.op, (self.text(cond.args[0], cond.column),))
        slots: list[str] = []
        for arg in cond.args:
            if isinstance(arg, Period):
                slots.append(self.period(arg))
            elif kind in ("num", "year") or self.table.columns[cond.column].coded:
                slots.append(self.number(float(arg)))
            else:
                slots.append(self.value(str(arg), cond.column))
        if len(set(slots)) != len(slots):
            raise Unlinked("twice")
        if cond.op == "in":
            slots.sort()
        return Condition(cond.column, cond.op, tuple(slots))

    def measure(self, m: Any) -> Measure:
        if m.op.startswith("share"):
            where = self.condition(m.cond) if m.cond else None
            return Measure("share", m.column, where)
        return Measure(m.op, m.column)

    def plan(self, intent: Intent, mentioned: Sequence[int]) -> Plan:
        """`mentioned`: the conditions' indices in the order of the question. Raises Unlinked."""
        order = [i for i in mentioned if i < len(intent.where)]
        if sorted(order) != list(range(len(intent.where))):
            raise Unlinked("condition not said")
        where = tuple([self.condition(intent.where[i]) for i in order])
        top = None
        if intent.top is not None:
            top = "one" if intent.top == 1 else self.number(intent.top)
        if intent.listed:
            return Plan("list", where, columns=intent.listed)
        if intent.show:
            return Plan("show", where, columns=intent.show, sort=intent.sort,
                        sort_column=intent.sort_column, top=top)  # fmt: skip
        having = (intent.having[0], self.number(intent.having[1])) if intent.having else None
        return Plan(
            "aggregate",
            where,
            tuple(Dim(d.column, d.unit or None) for d in intent.dims),
            tuple(self.measure(m) for m in intent.measures),
            having,
            sort=intent.sort,
            top=top,
        )
