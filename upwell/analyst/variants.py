"""Plans near those that the model drew, which the question's own words ask for: further candidates.

The model often gets the form right and the column wrong ("tallest" by weight), or one word of the form ("when was it
highest" as a number). Each variant changes one thing; whether it is better is for analyst/ranking.py to weigh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from upwell.analyst.evidence import RANGED, Asked, columns_of
from upwell.analyst.grammar import PlanGrammar
from upwell.analyst.plan import Condition, Dim, Measure, Plan, plan_tokens
from upwell.analyst.rules import choose_columns
from upwell.analyst.schema import ColumnKind

PART = 0.25  # of its source's probability that a variant has
_SOURCES = 6  # the likeliest candidates are varied
_HEARD = 3  # columns that words speak for are tried as an order
_FLIPPED = {"asc": "desc", "desc": "asc"}


def variants(candidates: Mapping[Plan, float], asked: Asked) -> dict[Plan, float]:
    """Valid plans that are not among the candidates, each with a part of the probability of what it was made from."""
    order = choose_columns(asked.profile, asked.linked)
    grammar = PlanGrammar(asked.profile, asked.linked.slots, order)
    shown = set(order)
    found: dict[Plan, float] = {}
    likeliest = [*sorted(candidates, key=lambda plan: -candidates[plan])[:_SOURCES], asked.draft.plan]
    sources = [plan for plan in likeliest if plan.kind != "noans"]
    whole = {plan: _with_unused_conditions(plan, sources, asked) for plan in sources}
    for plan in sources:
        near = [*_near(plan, asked), *_listings(plan, asked)]
        if whole[plan] != plan:
            near += [whole[plan], *_near(whole[plan], asked), *_listings(whole[plan], asked)]
        for variant in dict.fromkeys(near):
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
    if plan.kind == "list" and plan.where and not set(plan.columns) & asked.marked and (keys := _names(asked)):
        yield Plan("show", plan.where, columns=keys[:1])


def _names(asked: Asked) -> tuple[int, ...]:
    """The columns that name rows, the one that the question names first."""
    keys = [c for c, column in enumerate(asked.profile.columns) if column.kind is ColumnKind.KEY]
    return tuple(sorted(keys, key=lambda c: (c not in asked.marked, c)))


def _with_unused_conditions(plan: Plan, others: Sequence[Plan], asked: Asked) -> Plan:
    """The plan with the conditions that other candidates make of values and flags that it leaves unused."""
    slots = {slot for test in plan.where for slot in test.slots}
    columns = set(columns_of(plan))
    added: list[Condition] = []
    for test in (test for other in others for test in other.where):
        values = [slot for slot in test.slots if slot[0] == "V"]
        flag = not test.slots and test.op in ("yes", "no") and test.column in asked.marked
        if test.column not in columns and (flag or (values and not slots & set(test.slots))):
            added.append(test)
            slots |= set(test.slots)
            columns.add(test.column)
    return replace(plan, where=(*plan.where, *added)) if added else plan


def _listings(plan: Plan, asked: Asked) -> Iterator[Plan]:
    """The plan's rows or groups in an order, where the question asks for one: all, the first, or as many as it says."""
    columns, sorting = asked.profile.columns, "sort" in asked.says
    if not (sorting or asked.superlatives or asked.by):
        return
    unused = [f"N{k}" for k in range(len(asked.linked.slots.numbers))
              if all(f"N{k}" not in test.slots for test in plan.where)]  # fmt: skip
    tops: list[str | None] = list(unused)
    if sorting or asked.by:
        tops.append(None)
    if asked.superlatives:
        tops.append("one")
    if plan.kind == "aggregate" and plan.by:
        if plan.sort is None:
            for top in tops:
                yield replace(plan, sort=asked.usual(plan.measures[0].column), top=top)
        quantities = [d.column for d in plan.by if columns[d.column].kind in RANGED and d.unit is None]
        quantities += [m.column for m in plan.measures if m.column is not None and m.fn != "distinct"]
    else:
        quantities = [m.column for m in plan.measures if m.column is not None]
        quantities += [] if plan.sort_column is None else [plan.sort_column]
    tested = {test.column for test in plan.where}
    heard = sorted(asked.voices, key=lambda c: -asked.voices[c])[:_HEARD]
    named = [c for c in asked.linked.columns if c not in tested]
    by = dict.fromkeys([c for c in (*asked.by, *named, *quantities, *heard) if columns[c].kind in RANGED])
    keys = _names(asked)
    for column in by:
        kept = tuple(c for c in plan.columns if c != column) if plan.kind == "show" else ()
        if kept or keys:
            for top in tops:
                yield Plan("show", plan.where, columns=kept or keys[:1], sort=asked.usual(column),
                           sort_column=column, top=top)  # fmt: skip
    if asked.alphabet and (plan.columns or keys):
        text = (plan.columns or keys)[0]
        yield Plan("show", plan.where, columns=(text,), sort=asked.usual(text), sort_column=text)
    if plan.kind == "show" and plan.sort and len(plan.columns) == 1 and columns[plan.columns[0]].kind is ColumnKind.CAT:
        fn = "avg" if "avg" in asked.says else "sum"  # "which client owes the most" is about all of its rows
        yield Plan("aggregate", plan.where, (Dim(plan.columns[0]),), (Measure(fn, plan.sort_column),),
                   sort=plan.sort, top=plan.top)  # fmt: skip


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


def _with_column(plan: Plan, wrong: int, better: int) -> Plan:
    moved = plan.with_columns(lambda column: better if column == wrong else column)
    return replace(moved, columns=tuple(dict.fromkeys(moved.columns)))
