"""Plans near those that the model drew, which the question's own words ask for: further candidates.

The model often gets the form right and the column wrong ("tallest" by weight), or one word of the form ("when was it
highest" as a number). Each variant changes one thing; whether it is better is for analyst/ranking.py to weigh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from upwell.analyst.evidence import RANGED, Asked, columns_of
from upwell.analyst.grammar import PlanGrammar
from upwell.analyst.plan import Measure, Plan, plan_tokens
from upwell.analyst.rules import choose_columns
from upwell.analyst.schema import ColumnKind

PART = 0.25  # of its source's probability that a variant has
_SOURCES = 6  # the likeliest candidates are varied
_FLIPPED = {"asc": "desc", "desc": "asc"}


def variants(candidates: Mapping[Plan, float], asked: Asked) -> dict[Plan, float]:
    """Valid plans that are not among the candidates, each with a part of the probability of what it was made from."""
    order = choose_columns(asked.profile, asked.linked)
    grammar = PlanGrammar(asked.profile, asked.linked.slots, order)
    shown = set(order)
    found: dict[Plan, float] = {}
    sources = sorted(candidates, key=lambda plan: -candidates[plan])[:_SOURCES]
    for plan in [*sources, asked.draft.plan]:
        if plan.kind == "noans":
            continue
        for variant in _near(plan, asked):
            if variant in candidates or not set(columns_of(variant)) <= shown:
                continue
            if grammar.accepts(plan_tokens(variant, order)):
                found[variant] = found.get(variant, 0.0) + PART * candidates.get(plan, 0.0)
    return found


def _near(plan: Plan, asked: Asked) -> Iterator[Plan]:
    yield from _other_columns(plan, asked)
    yield from _other_order(plan, asked)
    if "not" in asked.says:
        for i, test in enumerate(plan.where):
            op = {"yes": "no", "eq": "ne", "notnull": "null"}.get(test.op)
            if op:
                yield replace(plan, where=(*plan.where[:i], replace(test, op=op), *plan.where[i + 1 :]))


def _other_columns(plan: Plan, asked: Asked) -> Iterator[Plan]:
    """A column that nothing named replaced by one that the question's words speak for."""
    columns = asked.profile.columns
    for wrong in dict.fromkeys(columns_of(plan)):
        if wrong in asked.marked or columns[wrong].kind is ColumnKind.KEY:
            continue
        for better, voice in asked.voices.items():
            alike = columns[better].kind is columns[wrong].kind or (
                columns[better].kind in RANGED and columns[wrong].kind in RANGED and not plan.where)  # fmt: skip
            if better != wrong and alike and voice > asked.voices.get(wrong, 0.0):
                yield _with_column(plan, wrong, better)


def _other_order(plan: Plan, asked: Asked) -> Iterator[Plan]:
    columns = asked.profile.columns
    keys = [c for c, column in enumerate(columns) if column.kind is ColumnKind.KEY]
    dates = [c for c, column in enumerate(columns) if column.kind in RANGED[1:]]
    named = dates[:1] if asked.when else keys[:1] or dates[:1]
    if plan.sort:
        yield replace(plan, sort=_FLIPPED[plan.sort])
        if plan.top == "one":
            yield replace(plan, top=None)
        elif plan.top is None and asked.superlatives:
            yield replace(plan, top="one")
    if plan.kind == "aggregate" and not plan.by and len(plan.measures) == 1:
        fn, column = plan.measures[0].fn, plan.measures[0].column
        if fn in ("min", "max") and column is not None and named and column not in named:
            yield Plan("show", plan.where, columns=tuple(named), sort="desc" if fn == "max" else "asc",
                       sort_column=column, top="one")  # fmt: skip
        if fn in ("sum", "avg") and column is not None and asked.superlatives:
            yield replace(plan, measures=(Measure("max" if asked.sign(column) >= 0 else "min", column),))
    if plan.kind == "show" and plan.sort is None and (asked.superlatives or "sort" in asked.says):
        ranged = [c for c in (*asked.marked, *asked.voices) if columns[c].kind in RANGED]
        numbers = [f"N{k}" for k in range(len(asked.linked.slots.numbers))]
        unused = [n for n in numbers if all(n not in test.slots for test in plan.where)]
        for column in dict.fromkeys(ranged):
            kept = tuple(c for c in plan.columns if c != column) or tuple(keys[:1])
            sign = asked.sign(column)
            sort = "desc" if sign > 0 or (asked.superlatives and not sign) else "asc"
            for top in {None if "sort" in asked.says else "one", *unused}:
                if kept:
                    yield Plan("show", plan.where, columns=kept, sort=sort,
                               sort_column=column, top=top)  # fmt: skip


def _with_column(plan: Plan, wrong: int, better: int) -> Plan:
    moved = plan.with_columns(lambda column: better if column == wrong else column)
    return replace(moved, columns=tuple(dict.fromkeys(moved.columns)))
