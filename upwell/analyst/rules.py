"""A first draft of the plan: keyword rules over the linked question, without any model.

Nano reads it in its prompt and corrects it; alone it is the control that nano has to beat.

It reads a question as people who write such rules do: words for the measure, "by" and "per" for
groups, comparison words before numbers, superlatives for sorting. Synonyms of column names are
beyond it, as are readings that need more than the nearest words.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from upwell.analyst.grammar import PlanGrammar
from upwell.analyst.mentions import negates
from upwell.analyst.plan import MAX_CONDITIONS, Condition, Dim, Measure, Plan, plan_tokens
from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.slots import LinkedQuestion, Mark
from upwell.analyst.words import COMMON, TOKEN

MAX_COLUMNS = 24  # that a prompt shows
_AVG = r"\b(average|avg|mean|on average|typical(ly)?)\b"
_SUM = r"\b(total|sum|combined|altogether|overall|in all)\b"
_MEDIAN = r"\bmedian\b"
_COUNT = r"\b(how many|number of|count(s)?( of)?|how often|#)\b"
_DISTINCT = r"\b(different|distinct|unique)\b"
_SHARE = r"(\b(percent(age)?|share|proportion|fraction)\b|%|what part of)"
_MOST = (
    r"\b(most|highest|largest|biggest|greatest|max(imum)?|top|best|longest|tallest|heaviest|"
    r"oldest|latest|newest|fastest|richest|most expensive|strongest|last)\b"
)
_LEAST = (
    r"\b(least|lowest|smallest|min(imum)?|fewest|worst|shortest|lightest|youngest|earliest|"
    r"cheapest|slowest|bottom|weakest|first|least expensive)\b"
)
_NOTDATA = r"\b(hello|hi|hey|thank|thanks|joke|poem|delete|drop|update|insert|weather today|your name|who are you)\b"
_NOT = r"\b(not|except|excluding|other than|without|non|aren't|isn't|weren't|didn't|no)\W+(\w+\W+){0,2}$"
_COMPARE = (
    (r"(at least|no less than|>=|minimum of|or more than|not less than|not under)\W*$", "ge"),
    (r"(at most|up to|no more than|<=|maximum of|not more than|not over)\W*$", "le"),
    (r"(more than|over|above|greater than|higher than|larger than|bigger than|exceed(s|ing)?|"
     r"older than|longer than|heavier than|better than|beyond|after|>)\W*$", "gt"),
    (r"(less than|under|below|fewer than|lower than|smaller than|younger than|shorter than|"
     r"cheaper than|lighter than|before|<)\W*$", "lt"),
    (r"(since|from|starting)\W*$", "since"),
    (r"(not|other than|except)\W*$", "ne"),
)  # fmt: skip
_DATE_OPS = {"gt": "after", "lt": "before", "ge": "since", "since": "since", "le": "before"}
_UNITS = {
    "year": r"\b(by|per|each|every) (the )?year\b|\b(yearly|annually)\b|\bover the years\b",
    "quarter": r"\b(by|per|each|every) quarter\b|\bquarterly\b",
    "month": r"\b(by|per|each|every) month\b|\bmonthly\b|\bover time\b|\btrend\b",
    "weekday": r"\b(by|per|each|every|which) (weekday|day of the week)\b",
}
_BY = r"\b(by|per|for each|for every|each|every|across|grouped by|in each|of each|among)\W+(the \w*\W*)?$"


class Draft(NamedTuple):
    """The plan that the rules read, and whether they understood every telling word of the question."""

    plan: Plan
    sure: bool


def choose_columns(profile: TableProfile, linked: LinkedQuestion | None = None) -> list[int]:
    """The columns to show, in table order: all if they fit, else the linked ones first."""
    every = range(len(profile.columns))
    if len(every) <= MAX_COLUMNS or linked is None:
        return list(every)[:MAX_COLUMNS]
    chosen = dict.fromkeys([*linked.columns, *every])
    return sorted(list(chosen)[:MAX_COLUMNS])


def draft_plan(profile: TableProfile, linked: LinkedQuestion) -> Draft:
    """A valid plan for the linked question; <missing> when the rules read none."""
    reader = _Reader(profile, linked)
    plan = reader.read()
    order = choose_columns(profile, linked)
    grammar = PlanGrammar(profile, linked.slots, order)
    if not grammar.accepts(plan_tokens(plan, order)):
        return Draft(Plan("noans", reason="missing"), False)
    return Draft(plan, reader.sure)


class _Reader:
    def __init__(self, profile: TableProfile, linked: LinkedQuestion) -> None:
        self.profile, self.columns = profile, profile.columns
        self.text = linked.question.lower()
        self.slots = linked.slots
        marks = linked.marks
        self.slot_marks = [m for m in marks if m.kind != "C"]
        self.mentions = [m for m in marks if m.kind == "C"]
        marked = [(m.start, m.end) for m in marks]
        table = {word for name in profile.name.lower().split() for word in (name, name.rstrip("s"))}
        self.rows = "|".join(sorted(re.escape(word) for word in table))
        # A telling word that nothing explains: the rules don't know what it asks.
        self.unread = [
            m[1] for m in TOKEN.finditer(self.text)
            if not any(a <= m.start() < b for a, b in marked)
            and m[1] not in COMMON and m[1].rstrip("s") not in table and m[1] not in table
        ]  # fmt: skip
        self.sure = bool(marks) and not self.unread
        self.used: set[int] = set()  # columns that conditions speak of
        self.top: str | None = None
        self.having: tuple[str, str] | None = None

    def has(self, pattern: str) -> bool:
        return re.search(pattern, self.text) is not None

    def before(self, mark: Mark, length: int = 30) -> str:
        return self.text[max(mark.start - length, 0) : mark.start]

    def first(self, *kinds: ColumnKind) -> int | None:
        return next((i for i, c in enumerate(self.columns) if c.kind in kinds), None)

    def entity(self) -> int | None:
        """The column that names rows: "name" or "title" before other keys, codes last."""
        keys = [i for i, c in enumerate(self.columns) if c.kind is ColumnKind.KEY]
        named = [i for i in keys if {"name", "fullname", "title"} & set(self.columns[i].words)]
        return next(iter(named + keys), self.first(ColumnKind.DATE, ColumnKind.CAT))

    def nearest(self, mark: Mark, *kinds: ColumnKind) -> int | None:
        """The column of these kinds whose mention is closest to a mark, before it by preference."""
        near = [
            (mark.start - m.end if m.end <= mark.start else 8 + m.start - mark.end, c)
            for m in self.mentions
            for c in m.columns
            if self.columns[c].kind in kinds
        ]
        return min(near)[1] if near else None

    def read(self) -> Plan:
        if self.has(_NOTDATA) and not self.slot_marks:
            return Plan("noans", reason="notdata")
        dims = self.dims()
        if not self.mentions and not self.slot_marks and not dims and not self.has(_COUNT):
            return Plan("noans", reason="missing")
        where = self.conditions({dim.column for dim in dims})
        where += self.flags(dims, where)
        where = list(dict.fromkeys(_join_equals(where)))[:MAX_CONDITIONS]
        if self.has(r"\b(vs|versus|compared?|comparison)\b") and not dims:
            dims = [Dim(c.column) for c in where if c.op == "in"][:1]
        self.used = {c.column for c in where}
        taken = self.used | {dim.column for dim in dims}
        left = [m for m in self.mentions if not taken & set(m.columns)]
        for mention in left:
            if mention.partial and len(mention.columns) > 1:
                return Plan("noans", reason="ambiguous", columns=mention.columns[:2])
        free = list(dict.fromkeys(m.columns[0] for m in left))
        return self.query(tuple(where), dims, free)

    # Conditions.

    def conditions(self, dims: set[int]) -> list[Condition]:
        found: list[Condition] = []
        values: dict[tuple[int, bool], list[str]] = {}
        for mark in self.slot_marks:
            slot = f"{mark.kind}{mark.index}"
            if mark.kind == "V":
                column = next(
                    (c for m in self.mentions for c in m.columns if c in mark.columns),
                    mark.columns[0],
                )
                values.setdefault((column, re.search(_NOT, self.before(mark)) is not None), [])
                values[column, re.search(_NOT, self.before(mark)) is not None].append(slot)
            elif mark.kind == "T":
                found += self.literal(mark, slot)
        for (column, negated), slots in values.items():
            if negated:
                found += [Condition(column, "ne", (slot,)) for slot in slots]
            else:
                found.append(Condition(column, "eq" if len(slots) == 1 else "in", tuple(slots)))
        return found + self.numbers(dims)

    def literal(self, mark: Mark, slot: str) -> list[Condition]:
        if any(m.kind == "V" and m.start < mark.end and mark.start < m.end for m in self.slot_marks):
            return []
        texts = (ColumnKind.KEY, ColumnKind.TEXT, ColumnKind.CAT)
        column = mark.columns[0] if mark.columns else self.nearest(mark, *texts)
        column = self.first(*texts) if column is None else column
        if column is None or not self.columns[column].is_text:
            return []
        before = self.before(mark)
        starts = re.search(r"(start|begin)\w* (with|in)", before)
        op = "starts" if starts else "ends" if re.search(r"end\w* (with|in)", before) else "contains"
        return [Condition(column, op, (slot,))]

    def numbers(self, dims: set[int]) -> list[Condition]:
        found = []
        marks = [m for m in self.slot_marks if m.kind in "ND"]
        i = 0
        while i < len(marks):
            mark = marks[i]
            slot = f"{mark.kind}{mark.index}"
            after = self.text[mark.end : mark.end + 14]
            pair = None
            if i + 1 < len(marks):
                gap = self.text[mark.end : marks[i + 1].start].strip()
                if (gap in ("and", "to", "-", "–") and self.has(r"\b(between|from)\b")) or gap in (
                    "-", "–", "to", "") :  # fmt: skip
                    pair = f"{marks[i + 1].kind}{marks[i + 1].index}"
            if mark.kind == "N" and self.is_top(mark, after):
                self.top = slot
                i += 1
                continue
            op = next((op for p, op in _COMPARE if re.search(p, self.before(mark))), "eq")
            if re.match(r"\W*(\w+ )?(or more|or above|or over|\+|and above|or higher)", after):
                op = "ge"
            elif re.match(r"\W*(\w+ )?(or less|or below|or under|or fewer|and below)", after):
                op = "le"
            found += self.compare(mark, slot, op, pair, dims)
            i += 2 if pair else 1
        return found

    def is_top(self, mark: Mark, after: str) -> bool:
        before = re.search(r"\b(top|first|bottom|last|best|show|list|largest|highest|lowest)\W*$",
                           self.before(mark))  # fmt: skip
        behind = re.match(rf"\W*(\w+\W+)?{_MOST}|\W*(\w+\W+)?{_LEAST}", after)
        return bool(before or behind)

    def compare(self, mark: Mark, slot: str, op: str, pair: str | None, dims: set[int]) -> list[Condition]:
        is_year = mark.kind == "D" or self.slots.numbers[mark.index].year
        column = None
        if is_year:
            column = self.nearest(mark, ColumnKind.DATE, ColumnKind.YEAR)
            if column is None:
                column = self.first(ColumnKind.DATE, ColumnKind.YEAR)
            if column is None and mark.kind == "D":
                self.sure = False
                return []
        if column is None:
            column = self.nearest(mark, ColumnKind.NUM, ColumnKind.YEAR)
        if column is None:
            self.sure = False
            if mark.kind == "N" and op in ("gt", "ge", "lt", "le"):
                self.having = (op, slot)
            return []
        slots = (slot, pair) if pair else (slot,)
        if self.columns[column].kind is ColumnKind.DATE:
            op = "between" if pair else _DATE_OPS.get(op, "on")
        else:
            op = "between" if pair else "ge" if op == "since" else op
        return [Condition(column, op, tuple(s for s in slots if s))]

    def flags(self, dims: list[Dim], where: list[Condition]) -> list[Condition]:
        """Mentioned flags, and columns said to be missing."""
        taken = {dim.column for dim in dims} | {c.column for c in where}
        found = []
        for mention in self.mentions:
            column = mention.columns[0]
            if column in taken:
                continue
            before = self.before(mention, 24)
            after = self.text[mention.end : mention.end + 14]
            if re.search(r"\b(missing|unknown|without( an?)?|no|lack\w*|empty)\W+$", before) or re.match(
                r"\W*(is|are) (missing|empty|unknown|blank|null)", after
            ):
                kind = self.columns[column].kind
                found.append(Condition(column, "no" if kind is ColumnKind.FLAG else "null"))
            elif self.columns[column].kind is ColumnKind.FLAG:
                negated = re.search(_NOT, before) or negates(mention, self.text, self.profile)
                found.append(Condition(column, "no" if negated else "yes"))
        return found

    # What is asked.

    def dims(self) -> list[Dim]:
        found: list[Dim] = []
        sorting = self.has(r"\b(top|bottom|highest|lowest|sort\w*|order\w*|rank\w*)\b")
        for mention in self.mentions:
            column = mention.columns[0]
            kind = self.columns[column].kind
            joined = found and re.match(r"\W*and\W*$", self.text[self._end : mention.start])
            if joined or re.search(_BY, self.before(mention)):
                if sorting and kind is ColumnKind.NUM:
                    continue  # "top 5 cars by horsepower"
                if kind is not ColumnKind.TEXT and len(found) < 2:
                    unit = next((u for u, p in _UNITS.items() if self.has(p)), "month")
                    found.append(Dim(column, unit if kind is ColumnKind.DATE else None))
                    self._end = mention.end
        days = self.first(ColumnKind.DATE)
        mentioned = {word for d in found for word in self.columns[d.column].words}
        for unit, pattern in _UNITS.items():
            if unit not in mentioned and self.has(pattern) and len(found) < 2 and not found[1:]:
                years = self.first(ColumnKind.YEAR)
                if days is not None:
                    found = [d for d in found if d.column != days] + [Dim(days, unit)]
                elif years is not None and all(d.column != years for d in found):
                    found.append(Dim(years))
        return found

    _end = 0

    def query(self, where: tuple[Condition, ...], dims: list[Dim], free: list[int]) -> Plan:
        quantities = [c for c in free if self.columns[c].kind is ColumnKind.NUM]
        ranged = [c for c in free if self.columns[c].kind in
                  (ColumnKind.NUM, ColumnKind.YEAR, ColumnKind.DATE)]  # fmt: skip
        labels = [c for c in free if c not in ranged]
        most, least = self.has(_MOST), self.has(_LEAST)
        direction = "asc" if least and not most else "desc" if most or self.top else None
        by = tuple(dims)

        def aggregate(measure: Measure) -> Plan:
            sort = direction if by else None
            top = (self.top or "one") if by and self.has(r"\b(which|who|what|top)\b") else None
            having = self.having if by else None
            return Plan("aggregate", where, by, (measure,), having, sort=sort, top=sort and top)

        if self.has(_SHARE):
            column = quantities[0] if quantities else None
            part = where[-1] if where else None
            where = where[:-1]
            return aggregate(Measure("share", column, part))
        superlative = bool(most or least) and self.has(
            rf"\b(which|who|whose|what|where|top|bottom|with the|with|{self.rows})\b"
        )
        fn = self.function()
        labels_by = [c for c in labels if self.columns[c].kind is ColumnKind.CAT]
        limits = [c for c in where if c.op in ("gt", "ge", "lt", "le")]
        if fn and limits and not quantities and labels_by and not by:
            kept = tuple(c for c in where if c is not limits[-1])  # "sites with a mean yield over 35"
            return Plan("aggregate", kept, (Dim(labels_by[0]),),
                        (Measure(fn, limits[-1].column),), (limits[-1].op, limits[-1].slots[0]))  # fmt: skip
        if self.having and labels_by and not by and not quantities:
            return Plan("aggregate", where, (Dim(labels_by[0]),), (Measure("count"),), self.having)
        if superlative and not by and labels:
            label = labels[0]
            if self.columns[label].kind is not ColumnKind.KEY:
                by = (Dim(label),)
                if quantities:
                    return aggregate(Measure(fn or "sum", quantities[0]))
                return aggregate(Measure("count"))
        if labels and self.has(_COUNT) and not by and (self.has(_DISTINCT) or self.counted(labels[0])):
            return aggregate(Measure("distinct", labels[0]))
        if fn and quantities:
            return aggregate(Measure(fn, quantities[0]))
        if self.has(_COUNT):
            if quantities and re.search(r"how many\W+$", self.before(self.mentions[0])):
                return aggregate(Measure("sum", quantities[0]))
            return aggregate(Measure("count"))
        if direction and ranged and not by:
            key = self.entity()
            if self.top or superlative:
                shown = labels[:1] or ([key] if key is not None else ranged[:1])
                return Plan("show", where, columns=tuple(shown), sort=direction,
                            sort_column=ranged[0], top=self.top or "one")  # fmt: skip
            return aggregate(Measure("max" if direction == "desc" else "min", ranged[0]))
        if by:
            return aggregate(Measure(fn or "avg", quantities[0]) if quantities else Measure("count"))
        return self.lookup(where, free, labels)

    def counted(self, column: int) -> bool:
        """Whether the question counts the values of this column: "how many states"."""
        mention = next(m for m in self.mentions if column in m.columns)
        words = set(self.columns[column].words)
        return bool(re.search(r"(how many|number of)\W+$", self.before(mention))) and not (
            words & set(self.rows.split("|"))
        )

    def function(self) -> str | None:
        for fn, pattern in (("avg", _AVG), ("median", _MEDIAN), ("sum", _SUM)):
            if self.has(pattern):
                return fn
        return None

    def lookup(self, where: tuple[Condition, ...], free: list[int], labels: list[int]) -> Plan:
        if not where and len(labels) == 1 and self.columns[labels[0]].kind is ColumnKind.CAT:
            return Plan("list", columns=(labels[0],))
        shown = free[:4]
        by_key = any(self.columns[c.column].kind is ColumnKind.KEY for c in where)
        key = self.entity()
        if where and not free and by_key:
            return Plan("noans", reason="missing")  # asks for something of a row, but of what?
        if not by_key and key is not None and key not in shown:
            shown = [key, *shown][:4]
        if not shown or (not where and not free):
            return Plan("noans", reason="missing")
        return Plan("show", where, columns=tuple(shown), top=self.top)


def _join_equals(where: list[Condition]) -> list[Condition]:
    """Several numbers asked of one column are alternatives: "4 or 6 cylinders"."""
    joined: list[Condition] = []
    for test in where:
        same = [t for t in joined if t.column == test.column and t.op in ("eq", "in")]
        if test.op == "eq" and test.slots[0][0] == "N" and same:
            joined[joined.index(same[0])] = Condition(test.column, "in", same[0].slots + test.slots)
        else:
            joined.append(test)
    return joined
