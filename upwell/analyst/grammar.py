"""The grammar of plans for one table and one question: a state machine over plan tokens.

`allowed(state)` lists the tokens that keep a plan completable and well typed, so a decoder masked
by it can only produce plans that compile. States are plain tuples; nothing is mutated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from upwell.analyst.plan import (
    HAVING_OPS,
    MAX_CONDITIONS,
    MAX_DIMS,
    MAX_MEASURES,
    MAX_SHOWN,
    TEXT_OPS,
    UNITS,
)
from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.slots import Slots

Test = tuple[str, ...]  # a condition so far: ("C3", "in", "V0", ...)
_SINGLE = ("eq", "ne", "gt", "ge", "lt", "le")
_MAX_TOP = 1000


class State(NamedTuple):
    """Where a plan stands: what comes next, and what was said that limits it."""

    phase: str
    tests: tuple[Test, ...] = ()  # finished conditions
    item: Test = ()  # the condition, dim or pair being written
    dims: tuple[Test, ...] = ()
    measures: tuple[Test, ...] = ()
    shown: tuple[str, ...] = ()
    share: bool = False  # the condition being written belongs to a share


class PlanGrammar:
    """Plans over the columns at places 0..len(order)-1 (all columns by default) and these slots."""

    def __init__(self, profile: TableProfile, slots: Slots, order: Sequence[int] | None = None) -> None:
        order = list(range(min(len(profile.columns), 24))) if order is None else list(order)
        self.names = [f"C{place}" for place in range(len(order))]
        columns = {f"C{place}": profile.columns[c] for place, c in enumerate(order)}
        numbers = [f"N{k}" for k in range(len(slots.numbers))]
        years = [f"N{k}" for k, n in enumerate(slots.numbers) if n.year]
        texts = [f"T{k}" for k in range(len(slots.texts))]
        periods = [f"D{k}" for k in range(len(slots.dates))] + years
        self.numbers = numbers
        self.tops = ["one"] + [
            f"N{k}"
            for k, n in enumerate(slots.numbers)
            if isinstance(n.value, int) and 1 <= n.value <= _MAX_TOP and not n.percent
        ]
        # Which slots each operator of each column takes.
        self.ops: dict[str, dict[str, list[str]]] = {}
        for name, column in columns.items():
            ops: dict[str, list[str]] = {}
            real = order[int(name[1:])]
            values = [f"V{k}" for k, v in enumerate(slots.values) if real in v.columns]
            if column.kind is ColumnKind.FLAG:
                ops["yes"] = ops["no"] = []
            elif column.kind is ColumnKind.DATE:
                if periods:
                    ops |= dict.fromkeys(("on", "before", "after", "since"), periods)
                if len(periods) > 1:
                    ops["between"] = periods
            elif column.is_numeric:
                if numbers:
                    ops |= dict.fromkeys(_SINGLE, numbers)
                if len(numbers) > 1:
                    ops |= {"between": numbers, "in": numbers}
            else:
                if values:
                    ops |= {"eq": values, "ne": values}
                if len(values) > 1:
                    ops["in"] = values
                if texts and column.is_text:
                    ops |= dict.fromkeys(TEXT_OPS, texts)
            ops["null"] = ops["notnull"] = []
            self.ops[name] = ops
        self.summed = [n for n, c in columns.items() if c.kind is ColumnKind.NUM]
        ranged = (ColumnKind.NUM, ColumnKind.YEAR, ColumnKind.DATE)
        self.ranged = [n for n, c in columns.items() if c.kind in ranged]
        self.dated = [n for n, c in columns.items() if c.kind is ColumnKind.DATE]
        self._cache: dict[State, tuple[str, ...]] = {}

    def start(self) -> State:
        return State("start")

    def done(self, state: State) -> bool:
        return state.phase == "done"

    def allowed(self, state: State) -> tuple[str, ...]:
        """The tokens ("<where>", "<C3>", ...) that may follow; none once the plan has ended."""
        found = self._cache.get(state)
        if found is None:
            words = getattr(self, f"_after_{state.phase}")(state)
            found = self._cache[state] = tuple([f"<{word}>" for word in words])
        return found

    def accepts(self, tokens: Sequence[str]) -> bool:
        """Whether these tokens are a complete plan."""
        state = self.start()
        for token in tokens:
            if token not in self.allowed(state):
                return False
            state = self.advance(state, token)
        return self.done(state)

    def advance(self, state: State, token: str) -> State:
        """The state after an allowed token."""
        word = token[1:-1]
        if word == "end":
            return State("done")
        move = getattr(self, f"_take_{state.phase}", None)
        return move(state, word) if move else self._head(state, word)

    # Heads: where, by, measures, show, list.

    def _after_start(self, state: State) -> list[str]:
        return ["noans", "where", *self._heads()]

    def _heads(self) -> list[str]:
        return ["by", *self._measures(State("")), "show", "list"]

    def _measures(self, state: State) -> list[str]:
        """Measure words that can still be completed without saying a measure twice."""
        said = set(state.measures)
        if len(said) >= MAX_MEASURES:
            return []
        words = [] if ("count",) in said else ["count"]
        words += [fn for fn in ("sum", "avg", "min", "max", "median", "distinct")
                  if any((fn, c) not in said for c in self._measured(fn))]  # fmt: skip
        if self._share_words(state):
            words.append("share")
        return words

    def _measured(self, fn: str) -> list[str]:
        if fn in ("min", "max"):
            return self.ranged
        return self.names if fn == "distinct" else self.summed

    def _share_words(self, state: State) -> list[str]:
        said = set(state.measures)
        words = [] if ("share", "rows") in said else ["rows"]
        if any(("share", c) not in said for c in self.summed):
            words.append("sum")
        return words

    def _head(self, state: State, word: str) -> State:
        if word == "noans":
            return State("noans")
        if word in ("where", "and"):
            return state._replace(phase="column", item=())
        if word in ("by", "show", "list"):
            return state._replace(phase={"by": "dim"}.get(word, word), item=())
        if word == "count":
            return state._replace(phase="measured", measures=(*state.measures, ("count",)))
        if word == "having":
            return state._replace(phase="having")
        if word == "sort":
            return state._replace(phase="order" if state.shown else "direction")
        if word == "top":
            return state._replace(phase="top")
        return state._replace(phase="share" if word == "share" else "measure", item=(word,))

    # No answer.

    def _after_noans(self, state: State) -> list[str]:
        return ["missing", "notdata", *(["ambiguous"] if len(self.names) > 1 else [])]

    def _take_noans(self, state: State, word: str) -> State:
        return State("pair" if word == "ambiguous" else "tail")

    def _after_pair(self, state: State) -> list[str]:
        return [name for name in self.names if name not in state.item]

    def _take_pair(self, state: State, word: str) -> State:
        item = (*state.item, word)
        return State("tail") if len(item) == 2 else State("pair", item=item)

    def _after_tail(self, state: State) -> list[str]:
        return ["end"]

    def _after_done(self, state: State) -> list[str]:
        return []

    # Conditions.

    def _after_column(self, state: State) -> list[str]:
        return [name for name in self.names if self._open_ops(state, name)]

    def _take_column(self, state: State, word: str) -> State:
        return state._replace(phase="op", item=(word,))

    def _open_ops(self, state: State, name: str) -> list[str]:
        """Operators of a column that still lead to a condition not yet said."""
        said = set(state.tests)
        open_ops = []
        for op, slots in self.ops[name].items():
            if op == "in":
                fresh = not any(test[:2] == (name, "in") for test in said)
            elif op == "between":
                fresh = any(self._seconds(state, (name, op, slot)) for slot in slots)
            elif not slots:
                fresh = (name, op) not in said
            else:
                fresh = any((name, op, slot) not in said for slot in slots)
            if fresh:
                open_ops.append(op)
        return open_ops

    def _seconds(self, state: State, item: Test) -> list[str]:
        name, op, first = item
        return [s for s in self.ops[name][op] if s != first and (*item, s) not in state.tests]

    def _after_op(self, state: State) -> list[str]:
        return self._open_ops(state, state.item[0])

    def _take_op(self, state: State, word: str) -> State:
        state = state._replace(item=(*state.item, word))
        return self._close(state) if not self.ops[state.item[0]][word] else state._replace(phase="slot")

    def _after_slot(self, state: State) -> list[str]:
        item = state.item
        name, op, *given = item
        slots = self.ops[name][op]
        if op == "in":  # in the order of the question, at least two
            rest = slots[slots.index(given[-1]) + 1 :] if given else slots[:-1]
            return rest if len(given) < 2 else rest + self._next(self._close(state))
        if op == "between":
            if given:
                return self._seconds(state, item)
            return [slot for slot in slots if self._seconds(state, (*item, slot))]
        return [slot for slot in slots if (*item, slot) not in state.tests]

    def _take_slot(self, state: State, word: str) -> State:
        op = state.item[1]
        if op == "in" and word not in self.ops[state.item[0]]["in"]:
            return self._head(self._close(state), word)
        state = state._replace(item=(*state.item, word))
        wanted = {"between": 4, "in": 0}.get(op, 3)
        return self._close(state) if len(state.item) == wanted else state

    def _close(self, state: State) -> State:
        """The condition is complete."""
        return state._replace(
            phase="measured" if state.share else "tested",
            tests=(*state.tests, state.item),
            item=(),
            share=False,
        )

    def _next(self, state: State) -> list[str]:
        return self._after_tested(state) if state.phase == "tested" else self._after_measured(state)

    def _after_tested(self, state: State) -> list[str]:
        more = len(state.tests) < MAX_CONDITIONS and self._after_column(state)
        return (["and"] if more else []) + self._heads()

    # Aggregates.

    def _after_dim(self, state: State) -> list[str]:
        if state.item:
            return [c for c in self.dated if (*state.item, c) not in state.dims]
        words = [name for name in self.names if (name,) not in state.dims]
        words += [u for u in UNITS if any((u, c) not in state.dims for c in self.dated)]
        return words if not state.dims else words + self._measures(state)

    def _take_dim(self, state: State, word: str) -> State:
        if word in UNITS:
            return state._replace(item=(word,))
        if word not in self.names:
            return self._head(state, word)
        dims = (*state.dims, (*state.item, word))
        return state._replace(phase="dim" if len(dims) < MAX_DIMS else "dims", dims=dims, item=())

    def _after_dims(self, state: State) -> list[str]:
        return self._measures(state)

    def _after_measure(self, state: State) -> list[str]:
        fn = state.item[0]
        return [c for c in self._measured(fn) if (fn, c) not in state.measures]

    def _take_measure(self, state: State, word: str) -> State:
        done = (state.item[0], word)
        return state._replace(phase="measured", measures=(*state.measures, done), item=())

    def _after_share(self, state: State) -> list[str]:
        if state.item == ("share",):
            return self._share_words(state)
        return [c for c in self.summed if ("share", c) not in state.measures]

    def _take_share(self, state: State, word: str) -> State:
        if word == "sum":
            return state._replace(item=("share", "sum"))
        # Without groups a share needs the part it is of; with groups each may be one of the total.
        done = state._replace(measures=(*state.measures, ("share", word)), item=(), share=True)
        return done._replace(phase="part" if state.dims else "column")

    def _after_part(self, state: State) -> list[str]:
        return self._after_column(state) + self._after_measured(state)

    def _take_part(self, state: State, word: str) -> State:
        if word in self.names:
            return self._take_column(state, word)
        return self._head(state._replace(share=False), word)

    def _after_measured(self, state: State) -> list[str]:
        words = self._measures(state)
        if state.dims:
            # A latest day is no number to compare.
            numeric = state.measures[0][-1] not in self.dated or state.measures[0][0] == "distinct"
            words += (["having"] if self.numbers and numeric else []) + ["sort"]
        return [*words, "end"]

    def _after_having(self, state: State) -> list[str]:
        return self.numbers if state.item else list(HAVING_OPS)

    def _take_having(self, state: State, word: str) -> State:
        if state.item:
            return state._replace(phase="kept", item=())
        return state._replace(item=(word,))

    def _after_kept(self, state: State) -> list[str]:
        return ["sort", "end"]

    def _after_direction(self, state: State) -> list[str]:
        return ["asc", "desc"]

    def _take_direction(self, state: State, word: str) -> State:
        return state._replace(phase="sorted")

    def _after_sorted(self, state: State) -> list[str]:
        return ["top", "end"]

    def _after_top(self, state: State) -> list[str]:
        return self.tops

    def _take_top(self, state: State, word: str) -> State:
        return State("tail")

    # Look-ups.

    def _after_show(self, state: State) -> list[str]:
        words = [c for c in self.names if c not in state.shown] if len(state.shown) < MAX_SHOWN else []
        return [*words, "sort", "top", "end"] if state.shown else words

    def _take_show(self, state: State, word: str) -> State:
        if word in self.names:
            return state._replace(shown=(*state.shown, word))
        return self._head(state, word)

    def _after_order(self, state: State) -> list[str]:
        return self.names if state.item else ["asc", "desc"]

    def _take_order(self, state: State, word: str) -> State:
        if state.item:
            return state._replace(phase="sorted", item=())
        return state._replace(item=(word,))

    def _after_list(self, state: State) -> list[str]:
        words = [c for c in self.names if c not in state.shown] if len(state.shown) < 2 else []
        return [*words, "end"] if state.shown else words

    def _take_list(self, state: State, word: str) -> State:
        return state._replace(shown=(*state.shown, word))
