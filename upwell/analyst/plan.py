"""The query plan: the small language between a question and SQL, and its tokens.

    plan      := noans (missing | notdata | ambiguous Ci Cj) end
               | [where cond (and cond)*] (aggregate | lookup) end
    cond      := Ci (eq | ne) (Vk | Nk) | Ci in (Vk Vk+ | Nk Nk+)
               | Ci (gt | ge | lt | le) Nk | Ci between (Nk Nl | Dk Dl)
               | Ci (on | before | after | since) (Dk | Nk) | Ci (contains | starts | ends) Tk
               | Ci (null | notnull | yes | no)
    aggregate := [by dim [dim]] measure+ [having op Nk] [sort (asc | desc) [top (Nk | one)]]
    dim       := [year | quarter | month | weekday] Ci
    measure   := count | (sum | avg | min | max | median | distinct) Ci
               | share (rows | sum Ci) [cond]
    lookup    := show Ci+ [sort (asc | desc) Ci] [top (Nk | one)] | list Ci [Cj]

`having` and `sort` of an aggregate refer to its first measure. Objects hold real column indices;
tokens hold places in the list shown to the model, which `order` maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from upwell.errors import InputError

VALUE_OPS = ("eq", "ne", "in")
TEXT_OPS = ("contains", "starts", "ends")
NUMBER_OPS = ("eq", "ne", "gt", "ge", "lt", "le", "between", "in")
DATE_OPS = ("on", "before", "after", "since", "between")
BARE_OPS = ("null", "notnull", "yes", "no")
HAVING_OPS = ("gt", "ge", "lt", "le", "eq")
UNITS = ("year", "quarter", "month", "weekday")
MEASURES = ("count", "sum", "avg", "min", "max", "median", "distinct", "share")
REASONS = ("missing", "notdata", "ambiguous")
MAX_CONDITIONS, MAX_DIMS, MAX_MEASURES, MAX_SHOWN = 4, 2, 3, 4

PLAN_WORDS = tuple(
    dict.fromkeys(
        [
            *("noans", *REASONS, "end", "where", "and"),
            *(*VALUE_OPS, *TEXT_OPS, *NUMBER_OPS, *DATE_OPS, *BARE_OPS),
            *("by", *UNITS, *MEASURES, "rows", "having", "sort", "asc", "desc", "top", "one"),
            *("show", "list"),
        ]
    )
)
SLOT_WORDS = tuple(f"{kind}{i}" for kind, n in (("V", 10), ("N", 8), ("D", 6), ("T", 4)) for i in range(n))
COLUMN_WORDS = tuple(f"C{i}" for i in range(24))
PLAN_TOKENS = tuple(f"<{word}>" for word in (*PLAN_WORDS, *COLUMN_WORDS, *SLOT_WORDS))


@dataclass(frozen=True, slots=True)
class Condition:
    """One test on a column; `slots` are names such as "V0", as many as the op takes."""

    column: int
    op: str
    slots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dim:
    """What to group by; `unit` cuts a date column into years, quarters, months or weekdays."""

    column: int
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """What to compute; `column` None counts rows; `where` only for share: the part asked for."""

    fn: str
    column: int | None = None
    where: Condition | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One reading of a question. Filled by kind:

    aggregate: where, by, measures, having (op, slot), sort, top
    show:      where, columns, sort, sort_column, top
    list:      where, columns
    noans:     reason, and for "ambiguous" the two columns
    """

    kind: str
    where: tuple[Condition, ...] = ()
    by: tuple[Dim, ...] = ()
    measures: tuple[Measure, ...] = ()
    having: tuple[str, str] | None = None
    columns: tuple[int, ...] = ()
    sort: str | None = None
    sort_column: int | None = None
    top: str | None = None  # a number slot, or "one"
    reason: str | None = None

    def with_columns(self, of: Callable[[int], int]) -> Plan:
        """The same plan about other columns: of(column) in the place of each."""

        def condition(test: Condition) -> Condition:
            return replace(test, column=of(test.column))

        return replace(
            self,
            where=tuple(map(condition, self.where)),
            by=tuple(replace(dim, column=of(dim.column)) for dim in self.by),
            measures=tuple(
                Measure(m.fn, None if m.column is None else of(m.column), m.where and condition(m.where))
                for m in self.measures
            ),
            columns=tuple(map(of, self.columns)),
            sort_column=None if self.sort_column is None else of(self.sort_column),
        )


def plan_tokens(plan: Plan, order: Sequence[int] | None = None) -> list[str]:
    """The plan as tokens, "<end>" last; `order[place]` is the real column shown at that place."""
    place = None if order is None else {column: i for i, column in enumerate(order)}
    words: list[str] = []

    def col(column: int) -> str:
        return f"C{column if place is None else place[column]}"

    def cond(c: Condition) -> list[str]:
        return [col(c.column), c.op, *c.slots]

    if plan.kind == "noans":
        words += ["noans", plan.reason or "", *map(col, plan.columns)]
    else:
        for i, condition in enumerate(plan.where):
            words += ["and" if i else "where", *cond(condition)]
    if plan.kind == "aggregate":
        if plan.by:
            words.append("by")
        for dim in plan.by:
            words += [*([dim.unit] if dim.unit else []), col(dim.column)]
        for m in plan.measures:
            words.append(m.fn)
            if m.fn == "share":
                words.append("rows" if m.column is None else "sum")
            if m.column is not None:
                words.append(col(m.column))
            if m.where:
                words += cond(m.where)
        if plan.having:
            words += ["having", *plan.having]
        if plan.sort:
            words += ["sort", plan.sort]
    elif plan.kind in ("show", "list"):
        words += [plan.kind, *map(col, plan.columns)]
        if plan.sort and plan.sort_column is not None:
            words += ["sort", plan.sort, col(plan.sort_column)]
    if plan.top:
        words += ["top", plan.top]
    return [f"<{word}>" for word in (*words, "end")]


def parse_plan(tokens: Sequence[str], order: Sequence[int] | None = None) -> Plan:
    """The inverse of plan_tokens. Raises InputError on tokens that form no plan."""
    return _Parser([token[1:-1] for token in tokens], order).plan()


class _Parser:
    def __init__(self, words: list[str], order: Sequence[int] | None) -> None:
        self.words, self.order, self.at = words, order, 0

    def peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self, *accepted: str) -> str:
        word = self.peek()
        if not word or (accepted and word not in accepted):
            wanted = f" (wanted {', '.join(accepted)})" if accepted else ""
            raise InputError(f"not a plan: {word or 'nothing'} at word {self.at + 1}{wanted}")
        self.at += 1
        return word

    def maybe(self, *accepted: str) -> str | None:
        return self.take() if self.peek() in accepted else None

    def is_column(self) -> bool:
        return self.peek() in COLUMN_WORDS

    def column(self) -> int:
        word = self.take()
        if word not in COLUMN_WORDS:
            raise InputError(f"not a plan: {word} at word {self.at} is no column")
        place = int(word[1:])
        if self.order is None:
            return place
        if place >= len(self.order):
            raise InputError(f"not a plan: only {len(self.order)} columns, but {word} is used")
        return self.order[place]

    def columns(self) -> Iterator[int]:
        yield self.column()
        while self.is_column():
            yield self.column()

    def slot(self, kinds: str) -> str:
        word = self.take()
        if word not in SLOT_WORDS or word[0] not in kinds:
            raise InputError(f"not a plan: {word} at word {self.at} is no slot of {kinds}")
        return word

    def condition(self) -> Condition:
        column = self.column()
        op = self.take(*VALUE_OPS, *TEXT_OPS, *NUMBER_OPS, *DATE_OPS, *BARE_OPS)
        if op in BARE_OPS:
            return Condition(column, op)
        if op in ("between", "in"):
            slots = [self.slot("ND" if op == "between" else "VN")]
            slots.append(self.slot("ND" if op == "between" else slots[0][0]))
            while op == "in" and self.peek() in SLOT_WORDS:
                slots.append(self.slot(slots[0][0]))
            return Condition(column, op, tuple(slots))
        kinds = "T" if op in TEXT_OPS else "DN" if op in DATE_OPS else "VN"
        return Condition(column, op, (self.slot(kinds),))

    def dim(self) -> Dim:
        unit = self.maybe(*UNITS)
        return Dim(self.column(), unit)

    def measure(self) -> Measure:
        fn = self.take(*MEASURES)
        if fn == "count":
            return Measure(fn)
        if fn != "share":
            return Measure(fn, self.column())
        column = self.column() if self.take("rows", "sum") == "sum" else None
        return Measure(fn, column, self.condition() if self.is_column() else None)

    def top(self) -> str | None:
        if not self.maybe("top"):
            return None
        return self.maybe("one") or self.slot("N")

    def plan(self) -> Plan:
        plan = self.noans() if self.maybe("noans") else self.query()
        self.take("end")
        if self.at != len(self.words):
            raise InputError(f"not a plan: words after end ({self.peek()})")
        return plan

    def noans(self) -> Plan:
        reason = self.take(*REASONS)
        pair = (self.column(), self.column()) if reason == "ambiguous" else ()
        return Plan("noans", reason=reason, columns=pair)

    def query(self) -> Plan:
        where = []
        if self.maybe("where"):
            where.append(self.condition())
            while self.maybe("and"):
                where.append(self.condition())
        if self.maybe("list"):
            return Plan("list", tuple(where), columns=tuple(self.columns()))
        sort = sort_column = having = None
        if self.maybe("show"):
            columns = tuple(self.columns())
            if self.maybe("sort"):
                sort, sort_column = self.take("asc", "desc"), self.column()
            return Plan(
                "show",
                tuple(where),
                columns=columns,
                sort=sort,
                sort_column=sort_column,
                top=self.top(),
            )
        by = []
        if self.maybe("by"):
            by.append(self.dim())
            if self.is_column() or self.peek() in UNITS:
                by.append(self.dim())
        measures = [self.measure()]
        while self.peek() in MEASURES:
            measures.append(self.measure())
        if self.maybe("having"):
            having = (self.take(*HAVING_OPS), self.slot("N"))
        if self.maybe("sort"):
            sort = self.take("asc", "desc")
        return Plan("aggregate", tuple(where), tuple(by), tuple(measures), having, sort=sort, top=self.top())
