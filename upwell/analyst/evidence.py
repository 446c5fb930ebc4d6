"""What speaks for and against a candidate plan, as named numbers that analyst/ranking.py weighs.

The model's probability is one of them. The others compare the plan with the question's own words: what plain code
found in it and the plan leaves unused, a superlative without an order, a negation without a "not", columns that no
word of the question speaks for. Each is a count or a sum in about 0..3; what one is worth was fitted
(upwell/nano/rank.py), not chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from upwell.analyst.associations import association, known_word, sorts
from upwell.analyst.mentions import Token, negates, tokenize
from upwell.analyst.plan import Condition, Plan
from upwell.analyst.rules import Draft
from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.slots import LinkedQuestion, Mark
from upwell.analyst.words import COMMON, STOP, UNITS, split_name, stem

# ruff: noqa: E501 - a line holds the words of one pattern

# The share of the keyword rules' own reading beside the model's probabilities, by whether they understood every word.
DRAFT = {True: 0.8, False: 0.4}
_FLOOR = 1e-3  # a plan that the model never drew
_WEAK = 0.1  # an association below this is chance
_TIMELY = 0.3  # of "newest" and any column of times
RANGED = (ColumnKind.NUM, ColumnKind.YEAR, ColumnKind.DATE)
_MOST = frozenset("most highest largest biggest greatest max maximum top best latest newest last peak record".split())
_LEAST = frozenset("least lowest smallest fewest min minimum bottom worst earliest oldest first".split())
_AGES = {"oldest": 1.0, "old": 1.0, "youngest": -1.0, "newest": -1.0, "new": -1.0, "latest": -1.0}
_AMOUNTS = frozenset("most least fewest highest lowest biggest largest smallest greatest".split())  # of no time
_TIMES = frozenset("oldest youngest newest latest earliest first last recent recently".split())  # speak for any time
# Both ends of an order, as in "from largest to smallest" and "high to low".
_END = (r"(?:\w{2,}est|most|least|best|worst|fewest|high|low|large|small|big|long|short|tall|cheap|expensive|costly|pricey|"
        r"heavy|light|old|new|early|late|good|bad|fast|slow|top|first|a)")
_FROM_TO = re.compile(rf"\b({_END})(?: \w+)? (?:to|through|down to|up to) (?:the )?(?:{_END}|last|bottom|z)\b|\b(a)-z\b",
                      re.IGNORECASE)
_HIGH_END = frozenset("high large big long tall expensive costly pricey heavy late good fast".split())
_DOWN_WORDS = re.compile(r"\b(desc(ending)?|decreasing|falling|declining|reversed?|z to a|z-a)\b", re.IGNORECASE)
_UP_WORDS = re.compile(r"\b(asc(ending)?|increasing|rising|alphabetical(ly)?|chronological(ly)?)\b", re.IGNORECASE)
_ALPHABET = re.compile(r"\b(alphabet\w*|a to z|a-z|z to a|z-a)\b", re.IGNORECASE)
_BY = re.compile(r"\b(by|order of|sorted on|ranked on|according to)( (the|their|its|number|of|how (many|much|long)))*\W*$",
                 re.IGNORECASE)
_NO_RANK = re.compile(r"\bat (least|most)\b", re.IGNORECASE)
_OFTEN = re.compile(r"\b(most|least) (\w+ )?(often|common(ly)?|frequent(ly)?|times|used)\b", re.IGNORECASE)
_BEHIND_BY = re.compile(r"\b(?:by|order of) (?:the |their |its )?(\w+)", re.IGNORECASE)
_WORDS = {
    "count": r"\b(how many|number of|how often|counts?|no\. of)\b|#",
    "avg": r"\b(average|avg|mean|typical(ly)?)\b",
    "sum": r"\b(total|sum|combined|altogether|overall|in all)\b",
    "median": r"\bmedian\b",
    "share": r"\b(percent(age)?|pct|share|proportion|fraction|part of|ratio|rate)\b|%",
    "distinct": r"\b(different|distinct|unique)\b",
    "sort": r"\b(sort(ed|ing)?|rank(ed|ing|s)?|arranged?|ascending|descending|increasing|decreasing|alphabetical(ly)?|chronological(ly)?)\b"
            r"|\b(on|at the) top\W*$|\b(\w{2,}est|most|least|best|worst)( \w+){0,2} first\b",
    "order": r"\bordered\b|^order\b|\border(ing)? (\w+ ){0,4}by\b|\bin (\w+ ){0,2}order\b",
    "rank": r"\brank(ed|ing|s)?\b",
    "group": r"\b(by|per|each|every|breakdown|across|vs|versus|compared?|comparison)\b",
    "which": r"\b(which|who|whose|what|where|when)\b",
    "not": r"\b(not|no|without|except|excluding|other than|non|never|lacks?|lacking|outside|but)\b|n['’]t\b|\b(do|does|is|are|was|were|did|has|have)nt\b",
    "blank": r"\b(missing|unknown|without|no|empty|blank|null|lacks?|lacking|unspecified|not? (known|listed|given))\b|n['’]t\b",
    "over": r"\b(more|greater|higher|larger|bigger|older|longer|heavier|better) than\b|\b(over|above|exceed\w*|at least|after|since|beyond)\b|>|\bor more\b",
    "under": r"\b(less|fewer|lower|smaller|younger|shorter|cheaper|lighter) than\b|\b(under|below|at most|before|up to)\b|<|\bor less\b",
}  # fmt: skip
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _WORDS.items()}
_COMPUTED = ("count", "avg", "sum", "median", "share", "distinct")
_UP, _DOWN = ("gt", "ge", "after", "since"), ("lt", "le", "before")


@dataclass(frozen=True)
class Asked:
    """A linked question about a table, with what its words say, read once for all of its candidates."""

    profile: TableProfile
    linked: LinkedQuestion
    draft: Draft

    @cached_property
    def says(self) -> frozenset[str]:
        """Names of _WORDS that the question has."""
        text = list(self.linked.question)
        for mark in self.linked.marks:  # "rate" in the name of a column asks for no share
            if mark.kind in "CV":
                text[mark.start : mark.end] = "_" * (mark.end - mark.start)
        found = {name for name, pattern in _PATTERNS.items() if pattern.search("".join(text))}
        if self.from_to or ("order" in found and "order" not in self.name_words):
            found.add("sort")
        if any(negates(mark, self.linked.question, self.profile) for mark in self.linked.marks):
            found.add("not")
        return frozenset(found)

    @cached_property
    def table_words(self) -> frozenset[str]:
        """Stems of the words in the table's name."""
        return frozenset(map(stem, split_name(self.profile.name)))

    @cached_property
    def name_words(self) -> frozenset[str]:
        """Stems of the words in the names of the table and its columns."""
        return self.table_words.union(stem(word) for column in self.profile.columns for word in column.words)

    @cached_property
    def counts_rows(self) -> bool:
        """Whether the most or the least of the rows themselves is asked for: "which planet has the most moons"."""
        if _OFTEN.search(self.linked.question):
            return True
        named = [m for m in self.linked.marks if m.kind == "C"
                 and all(self.profile.columns[c].kind is ColumnKind.KEY for c in m.columns)]  # fmt: skip
        tokens = tokenize(self.linked.question)
        return any(
            token.lower in ("most", "fewest", "least") and any(
                t.stem in self.table_words or any(m.start <= t.start < m.end for m in named) for t in tokens[i + 1 : i + 3])
            for i, token in enumerate(tokens)
        )  # fmt: skip

    @cached_property
    def from_to(self) -> str:
        """Where an order begins: "largest" in "from largest to smallest"; "" without one."""
        found = _FROM_TO.search(self.linked.question)
        return (found[1] or found[2]).lower() if found else ""

    @cached_property
    def behind_by(self) -> frozenset[str]:
        """Words behind a "by"."""
        return frozenset(m[1].lower() for m in _BEHIND_BY.finditer(self.linked.question))

    @cached_property
    def by(self) -> frozenset[int]:
        """Quantities and times that a "by" names or speaks for: "list the rivers by length"."""
        question, columns = self.linked.question, self.profile.columns
        named = {c for m in self.linked.marks if m.kind == "C" and _BY.search(question[: m.start]) for c in m.columns}
        for word in self.behind_by.intersection(self.loose_words):
            named |= {c for c, column in enumerate(columns) if association(word, column) >= _WEAK}
        return frozenset(c for c in named if columns[c].kind in RANGED)

    @cached_property
    def alphabet(self) -> bool:
        return _ALPHABET.search(self.linked.question) is not None

    @cached_property
    def spans(self) -> list[list[Mark]]:
        """Marks grouped by overlapping characters."""
        groups: list[list[Mark]] = []
        end = -1
        for mark in sorted(self.linked.marks, key=lambda m: (m.start, m.end)):
            if groups and mark.start < end:
                groups[-1].append(mark)
            else:
                groups.append([mark])
            end = max(end, mark.end)
        return groups

    @cached_property
    def marked(self) -> frozenset[int]:
        """Columns that a mark points at."""
        return frozenset(self.linked.columns)

    @cached_property
    def loose_words(self) -> list[str]:
        """Words outside the marks, but for the smallest ones."""
        return [
            t.lower for t in tokenize(self.linked.question)
            if t.lower not in STOP and t.lower not in UNITS and t.lower.isalpha()
            and not any(m.start <= t.start < m.end for m in self.linked.marks)
        ]  # fmt: skip

    @cached_property
    def spoken(self) -> list[dict[int, float]]:
        """For each loose word that speaks for some column: those columns, and how strongly."""
        found = []
        for word in self.loose_words:
            own = {c: 1.0 for c, column in enumerate(self.profile.columns)
                   if word in self.behind_by and stem(word) in map(stem, column.words)}  # fmt: skip
            if own:  # "by rate", where "rate" alone would be no sign of a column
                found.append(own)
                continue
            if stem(word) in self.table_words or any(_PATTERNS[name].fullmatch(word) for name in _COMPUTED):
                continue
            for_word = {c: association(word, column) for c, column in enumerate(self.profile.columns)}
            if word in _TIMES:
                for c, column in enumerate(self.profile.columns):
                    if column.kind in RANGED[1:]:
                        for_word[c] = max(for_word[c], _TIMELY)
            strong = {c: a for c, a in for_word.items() if a >= _WEAK}
            if strong:
                found.append(strong)
        return found

    @cached_property
    def voices(self) -> dict[int, float]:
        """Columns that loose words speak for, and how strongly the strongest does."""
        return {c: max(of.get(c, 0.0) for of in self.spoken) for c in sorted({c for of in self.spoken for c in of})}

    @cached_property
    def when(self) -> bool:
        return re.search(r"\b(when|which (day|date|month|year)|what (day|date|month|year))\b",
                         self.linked.question, re.IGNORECASE) is not None  # fmt: skip

    @cached_property
    def unread(self) -> int:
        """Telling words that nothing explains."""
        table = {stem(word) for word in split_name(self.profile.name)}
        return sum(
            word not in COMMON and stem(word) not in table
            and all(association(word, column) < _WEAK for column in self.profile.columns)
            for word in self.loose_words
        )  # fmt: skip

    @cached_property
    def superlatives(self) -> list[str]:
        """Words that ask for the most or the least of something."""
        return [
            t.lower for t in tokenize(_NO_RANK.sub(lambda m: "_" * len(m[0]), self.linked.question))
            if (t.lower in _MOST | _LEAST and not self._names_part(t)) or (
                t.lower.endswith("est") and len(t.lower) > 5 and t.lower.isalpha()
                and not any(m.kind != "N" and m.start <= t.start < m.end for m in self.linked.marks))
        ]  # fmt: skip

    def _names_part(self, token: Token) -> bool:
        """Whether a word is said as a part of a column's name: "first" in "first response"."""
        return token.lower in ("first", "last", "peak", "record", "top") and any(
            m.kind == "C" and m.start <= token.start < m.end and token.lower in self.profile.columns[c].words
            for m in self.linked.marks for c in m.columns
        )  # fmt: skip

    @cached_property
    def unheard(self) -> bool:
        """Whether a superlative speaks for some kind of column that this table doesn't have: "cheapest" of moons."""
        return any(
            known_word(word) and all(association(word, c) < _WEAK for c in self.profile.columns)
            and not (word in _TIMES and any(c.kind in RANGED[1:] for c in self.profile.columns))
            for word in self.superlatives if word not in _MOST | _LEAST
        )  # fmt: skip

    def sign(self, column: int | None) -> float:
        """1 when the question asks for the most of this column, or for it first, -1 for the least, 0 unknown."""
        if _DOWN_WORDS.search(self.linked.question):
            return 1.0
        if _UP_WORDS.search(self.linked.question):
            return -1.0
        words = [self.from_to] if self.from_to else self.superlatives
        if not words:
            return 0.0
        word = words[0]
        if word == "worst":  # of deaths the most, of marks the least
            return -0.5
        if word in _HIGH_END:
            return 1.0
        if word in _AGES:  # the oldest has the most years, and the earliest date
            timed = column is not None and self.profile.columns[column].kind in RANGED[1:]
            return -_AGES[word] if timed else _AGES[word]
        if word in _MOST:
            return 1.0
        return -1.0 if word in _LEAST or (word == self.from_to and not word.endswith("est")) else sorts(word)

    def usual(self, column: int | None) -> str:
        """The order of rows by this column: as the question says, else as people expect it."""
        sign = self.sign(column)
        if sign:
            return "desc" if sign > 0 else "asc"
        return "desc" if "rank" in self.says or self.superlatives else "asc"


def skeleton(plan: Plan, marked: frozenset[int]) -> Plan:
    """The plan with -1 for every column that no mark points at: what is asked, whatever column was guessed."""

    return plan.with_columns(lambda column: column if column in marked else -1)


def evidence(plan: Plan, asked: Asked, candidates: Mapping[Plan, float], variant: bool = False) -> dict[str, float]:
    """Named numbers about one of the candidates, which are plans with the model's probabilities."""
    form = skeleton(plan, asked.marked)
    like = sum(p for other, p in candidates.items() if skeleton(other, asked.marked) == form)
    share = DRAFT[asked.draft.sure] if plan == asked.draft.plan else 0.0
    found = {
        "weight": math.log((candidates.get(plan, 0.0) + share + _FLOOR) / (1 + DRAFT[asked.draft.sure])),
        "model": math.log(candidates.get(plan, 0.0) + _FLOOR),
        "model form": math.log(like + _FLOOR),
    }
    if variant:
        found["variant"] = 1.0
    if plan == asked.draft.plan:
        kind = "no answer" if plan.kind == "noans" else "sure" if asked.draft.sure else "unsure"
        found[f"draft {kind}"] = 1.0
        others = max((p for other, p in candidates.items() if other != plan), default=0.0)
        found[f"draft {kind} against the model"] = others
    found |= _no_answer(plan, asked) if plan.kind == "noans" else _query(plan, asked)
    return found


def _no_answer(plan: Plan, asked: Asked) -> dict[str, float]:
    reason = str(plan.reason)
    found = {reason: 1.0}
    if reason == "ambiguous":
        loose = any(m.partial and set(plan.columns) <= set(m.columns) for m in asked.linked.marks)
        found["ambiguous without a loose mark"] = float(not loose)
        return found
    found[f"{reason}: marks"] = min(len(asked.spans), 3)
    asks = bool({"count", "avg", "sum", "median", "share"} & asked.says or asked.superlatives or asked.spans)
    found[f"{reason}: asks"] = float(asks or "sort" in asked.says)
    if reason == "missing":
        found["missing: superlative unheard"] = float(asked.unheard)
        found["missing: superlative heard"] = max((association(w, c) for w in asked.superlatives for c in asked.profile.columns), default=0.0)
        found["missing: all read"] = float(asked.unread == 0 and asks)
        told = asked.unread or asked.spans or asked.spoken
        found["missing: counts rows"] = float("count" in asked.says and not told)
        found["missing: unread"] = min(asked.unread, 3)
        found["missing: spoken for"] = min(sum(max(of.values()) for of in asked.spoken), 2.0)
    return found


def _query(plan: Plan, asked: Asked) -> dict[str, float]:
    columns, slots = set(columns_of(plan)), set(_slots(plan))
    tests = list(_conditions(plan))
    ops = {test.op for test in tests} | ({plan.having[0]} if plan.having else set())
    fns = {m.fn for m in plan.measures}
    says, profile = asked.says, asked.profile
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        if value:
            found[name] = found.get(name, 0.0) + value

    for span in asked.spans:
        used = any(
            (mark.kind == "C" and bool(columns & set(mark.columns))) or f"{mark.kind}{mark.index}" in slots
            for mark in span
        )
        kind = _sort_of_mark(span, profile)
        if not used and not (kind == "name" and "count" in fns):
            note(f"unused {kind}", 1.0)
    # Order.
    ordered = plan.sort is not None or bool({"min", "max"} & fns)
    note("superlative without order", float(bool(asked.superlatives) and not ordered))
    note("order without superlative", float(ordered and not asked.superlatives and "sort" not in says))
    if plan.sort_column is not None:
        text = profile.columns[plan.sort_column].kind not in RANGED
        note("order by a text", float(text and not asked.alphabet))
        note("alphabet without a text", float(not text and asked.alphabet))
    sorted_by = plan.sort_column if plan.kind == "show" else plan.measures[0].column if plan.measures else None
    if plan.sort:
        sign = asked.sign(sorted_by)
        note("order against the superlative", max(-sign if plan.sort == "desc" else sign, 0.0))
        note("order unlike the usual", float(not sign and plan.sort != asked.usual(sorted_by)))
        note("superlative without a limit", float(bool(asked.superlatives) and "sort" not in says and plan.top is None))
        if sorted_by is not None and profile.columns[sorted_by].kind in RANGED[1:]:
            note("most of a time", float(bool(_AMOUNTS.intersection(asked.superlatives[:1]))))
    if asked.by:
        note("order by what no by names", float(plan.sort is not None and sorted_by not in asked.by))
        note("by without order or group", float(plan.sort is None and not plan.by))
    for dim in plan.by:  # "by length" asks for an order; groups of nearly every row are none
        column = profile.columns[dim.column]
        if column.kind is ColumnKind.NUM:
            note("groups of a number", min(2 * column.n_distinct / max(profile.n_rows, 1), 1.0))
    repeats = [c for c in plan.columns if profile.columns[c].kind is ColumnKind.CAT]
    note("one row for a category", float(plan.kind == "show" and plan.top is not None and plan.columns == tuple(repeats)))
    note("no sort where sorting is asked", float("sort" in says and plan.sort is None and plan.kind != "list"))
    note("one row where sorting is asked", float("sort" in says and plan.top == "one"))
    # What is asked for.
    shown = {*plan.columns, *(d.column for d in plan.by), *(m.column for m in plan.measures if m.column is not None)}
    timed = any(profile.columns[c].kind in RANGED[1:] for c in shown)
    some = any(c.kind in RANGED[1:] for c in profile.columns)
    note("when without a time", float(asked.when and some and not timed))
    number = plan.kind == "aggregate" and not plan.by and "count" not in says
    note("which as a number", float("which" in says and not asked.when and number and bool(asked.superlatives)))
    note("rows of a number", float("which" not in says and plan.top == "one"))
    # What is computed.
    for fn in ("avg", "sum", "median", "share", "distinct"):
        note(f"{fn} missing", float(fn in says and fn not in fns and plan.kind != "list"))
        note(f"{fn} unasked", float(fn in fns and fn not in says))
    if asked.counts_rows:
        note("rows not counted", float("count" not in fns))
        note("rows counted", float("count" in fns))
    note("count missing", float("count" in says and not {"count", "distinct", "sum"} & fns))
    note("count missing (lookup)", float("count" in says and plan.kind == "show"))
    note("count unasked", float("count" in fns and "count" not in says))
    note("group missing", float("group" in says and not plan.by and plan.sort is None))
    note("group unasked", float(bool(plan.by) and not {"group", "which"} & says and not asked.superlatives))
    note("whole table", float(plan.kind == "show" and not plan.where and plan.sort is None))
    # Conditions.
    negated = bool({"ne", "no", "null"} & ops)
    note("not missing", float("not" in says and not negated))
    note("not unasked", float(bool({"ne", "no"} & ops) and "not" not in says))
    note("blank unasked", float("null" in ops and "blank" not in says))
    note("not blank", float("notnull" in ops))
    note("comparison missing", float(bool({"over", "under"} & says) and not ops & {*_UP, *_DOWN, "between"}))
    note("comparison reversed", float("over" in says and "under" not in says and bool(ops & set(_DOWN))))
    note("comparison reversed", float("under" in says and "over" not in says and bool(ops & set(_UP))))
    note("comparison unasked", float(bool(ops & {*_UP, *_DOWN}) and not {"over", "under"} & says))
    for test in tests:
        column = profile.columns[test.column]
        if test.op == "eq" and test.slots[0][0] == "N":
            value = asked.linked.slots.numbers[int(test.slots[0][1:])].value
            low, high = column.minimum, column.maximum
            if column.kind is ColumnKind.NUM:
                note("equals a number", 1.0)
            if isinstance(low, float) and isinstance(high, float) and not low <= value <= high:
                note("equals no cell", 1.0)
    # Columns that nothing named, and what the loose words speak for.
    dated = {c for c in columns if profile.columns[c].kind in RANGED[1:]
             and (asked.when or any(t.column == c for t in tests))}  # fmt: skip
    free = [c for c in columns - asked.marked - dated if profile.columns[c].kind is not ColumnKind.KEY]
    voices = {c: asked.voices.get(c, 0.0) for c in free}
    note("guessed columns", min(len(free), 3))
    note("columns that no word speaks for", min(sum(voice == 0 for voice in voices.values()), 3))
    note("conditions on guessed columns", min(len({t.column for t in tests} & set(free)), 2))
    hit = sum(max((of.get(c, 0.0) for c in free), default=0.0) for of in asked.spoken)
    missed = sum(max(of.values()) - max((of.get(c, 0.0) for c in columns), default=0.0) for of in asked.spoken)
    note("spoken for", min(hit, 1.5))
    note("better column spoken for", min(missed, 1.5))
    note("one of several", float(any(
        m.kind == "C" and m.partial and len(m.columns) > 1 and len(columns & set(m.columns)) == 1 and not voices
        for span in asked.spans for m in span)))  # fmt: skip
    note("shown columns", max(len(plan.columns) - 1, 0))
    keyed = any(c.kind is ColumnKind.KEY for c in profile.columns)
    if plan.kind == "show" and plan.top and keyed:
        note("rows without their name", float(not any(profile.columns[c].kind is ColumnKind.KEY for c in plan.columns)))
    return found


def _sort_of_mark(span: list[Mark], profile: TableProfile) -> str:
    kinds = {m.kind for m in span}
    if kinds == {"C"} and all(profile.columns[c].kind is ColumnKind.KEY for m in span for c in m.columns):
        return "name"  # of the rows, which most plans show without being asked
    if "V" in kinds:
        return "value"
    if kinds & {"N", "D"}:
        return "number"
    if "C" in kinds:
        return "loose column" if all(m.partial for m in span if m.kind == "C") else "column"
    return "text"


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


def columns_of(plan: Plan) -> Iterator[int]:
    yield from (c.column for c in _conditions(plan))
    yield from (d.column for d in plan.by)
    yield from (m.column for m in plan.measures if m.column is not None)
    yield from plan.columns
    if plan.sort_column is not None:
        yield plan.sort_column
