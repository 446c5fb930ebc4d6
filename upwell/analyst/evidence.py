"""How much of what plain code found in a question a plan leaves unused.

A reading that ignores a cell value or a number that the person typed is seldom right. The model's probabilities know
that only loosely, so candidates are weighed by it once more. Weights were fitted on upwell/nano/dev.
"""

from __future__ import annotations

from collections.abc import Iterator

from upwell.analyst.plan import Condition, Plan
from upwell.analyst.slots import LinkedQuestion, Mark

# A candidate's weight is multiplied by these for each span it leaves unused, by the best mark on the span.
VALUE, NUMBER, COLUMN, PARTIAL = 0.2, 0.2, 0.05, 0.6


def support(plan: Plan, linked: LinkedQuestion) -> float:
    """In 0..1: 1 when the plan uses every marked span of the question. A plan without an answer isn't weighed."""
    if plan.kind == "noans":
        return 1.0
    slots, columns = set(_slots(plan)), set(_columns(plan))
    weight = 1.0
    for span in _spans(linked):
        used = any(
            (mark.kind == "C" and bool(columns & set(mark.columns))) or f"{mark.kind}{mark.index}" in slots
            for mark in span
        )
        if not used:
            weight *= min(_cost(mark) for mark in span)
    return weight


def _cost(mark: Mark) -> float:
    if mark.kind == "V":
        return VALUE
    if mark.kind in "ND":
        return NUMBER
    if mark.kind == "C":
        return PARTIAL if mark.partial else COLUMN
    return 1.0  # a literal text is often only a word of the sentence


def _spans(linked: LinkedQuestion) -> list[list[Mark]]:
    """Marks grouped by overlapping characters."""
    groups: list[list[Mark]] = []
    end = -1
    for mark in sorted(linked.marks, key=lambda m: (m.start, m.end)):
        if groups and mark.start < end:
            groups[-1].append(mark)
        else:
            groups.append([mark])
        end = max(end, mark.end)
    return groups


def _conditions(plan: Plan) -> Iterator[Condition]:
    yield from plan.where
    yield from (m.where for m in plan.measures if m.where is not None)


def _slots(plan: Plan) -> Iterator[str]:
    for condition in _conditions(plan):
        yield from condition.slots
    if plan.having is not None:
        yield plan.having[1]
    if plan.top is not None:
        yield plan.top


def _columns(plan: Plan) -> Iterator[int]:
    yield from (c.column for c in _conditions(plan))
    yield from (d.column for d in plan.by)
    yield from (m.column for m in plan.measures if m.column is not None)
    yield from plan.columns
    if plan.sort_column is not None:
        yield plan.sort_column
