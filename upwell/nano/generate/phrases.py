"""Phrases: how people word the conditions on rows.

A condition's phrase carries an invisible mark, so that the order of mention can be read off the
finished question (`order_of_mention`), whatever sentence it ends up in.
"""

# ruff: noqa: E501 - a line holds the variants of one phrase
# fmt: off

from __future__ import annotations

import re
from collections.abc import Sequence

from upwell.nano.generate.asked import Cond
from upwell.nano.generate.lexicon import plural
from upwell.nano.generate.names import Names, Unsayable
from upwell.nano.generate.tables import Column

_FIRST_MARK = 0xE000
_MARKS = re.compile("[\ue000-\ue0ff]")

_PREP = frozenset(
    """in from of by with via to for on at through under over during about without within among
    along across near around having flowing belonging owned made used run based located assigned
    governed rated graded built draining living working because due outside inside between since
    using sold taught produced published directed treated written played grown shipped delivered
    paid bought sent filed handled served coming going heading studying after before covered
    where that as suffering diagnosed""".split()
)
_PAST_PASSIVE = frozenset(
    """rated filled shown seen discounted clicked contacted visited attended graded priced viewed
    delayed experienced valued located loaded watched played reviewed staffed booked downloaded
    populated aged used""".split()
)
_VERB_WITH_WAS = frozenset(
    """hired born built founded released opened created signed ordered shipped purchased sold
    registered launched published established delivered admitted recorded installed made issued
    closed completed discharged manufactured bought planted placed received paid inspected
    constructed finished filed reported deployed updated produced listed enrolled""".split()
)

GT = ("over", "above", "more than", "more than", "greater than", "higher than", "exceeding", "> ", ">")
GE = ("at least", "at least", "a minimum of", "no less than", ">=", ">= ", "not less than")
LT = ("under", "below", "less than", "less than", "lower than", "smaller than", "< ", "<")
LE = ("at most", "up to", "no more than", "not more than", "a maximum of", "<=", "<= ")
_COMPARE = {"gt": GT, "ge": GE, "lt": LT, "le": LE}


def mark(index: int) -> str:
    return chr(_FIRST_MARK + index)


def order_of_mention(text: str) -> tuple[list[int], str]:
    """The marks' indices in the order they first occur, and the text without them."""
    found = [ord(m) - _FIRST_MARK for m in _MARKS.findall(text)]
    return list(dict.fromkeys(found)), _MARKS.sub("", text)


def singular(predicate: str) -> str:
    """A plural predicate for one row: "have no rating" -> "has no rating"."""
    mark_, rest = (predicate[0], predicate[1:]) if _MARKS.match(predicate) else ("", predicate)
    first, _, tail = rest.partition(" ")
    fixed = {"have": "has", "are": "is", "don't": "doesn't", "aren't": "isn't", "were": "was", "do": "does"}
    if first in fixed:
        first = fixed[first]
    elif not (first.endswith(("ed", "ing")) or first in _PAST or first.split("-")[0] in _PREP):
        first += "es" if first.endswith(("s", "sh", "ch", "x", "o")) else "s"
        first = re.sub("([^aeiou])ys$", r"\1ies", first)
    return f"{mark_}{first} {tail}".strip()


_PAST = frozenset(
    """made took sold got came began went drew spent cost paid won lost ran grew built left held kept
    could can used rose fell wrote gave bought sent was saw caught flew""".split()
)
_ROLES = frozenset("role position job kind type species profession occupation breed rank title instrument animal".split())


class Phrases(Names):
    """Random phrases for one table. Reuse one for all questions about it."""

    # -- conditions -------------------------------------------------------------------------

    def condition(self, cond: Cond, index: int, places: Sequence[str]) -> tuple[str, str]:
        """(place, marked text) of a wording that fits one of the places:

        adj    before the noun          "female"            prep  "in Paris", also without a noun
        post   after the noun           "with no rating"    pred  a plural predicate "have no rating"
        whose  "whose rating is ..."    where  "where rating = 5"    terse  "rating 5"
        head   instead of the noun      "engineers"
        """
        options = [o for o in self._options(cond) if o[0] in places]
        if not options:
            raise Unsayable(f"{cond.op} as {places}")
        place, text, _ = self.rng.choices(options, [o[2] for o in options])[0]
        return place, mark(index) + text.strip()

    def _options(self, cond: Cond) -> list[tuple[str, str, float]]:
        column = self.table.columns[cond.column]
        if cond.op in ("null", "notnull"):
            return self._null(cond, column)
        if cond.op in ("contains", "starts", "ends"):
            return self._literal(cond)
        if column.kind == "flag":
            return self._flag(column, cond.op == "yes")
        if column.kind in ("cat", "key"):
            return self._value(cond)
        if column.kind in ("date", "year"):
            return self._time(cond)
        return self._quantity(cond)

    def _value(self, cond: Cond) -> list[tuple[str, str, float]]:
        rng, column = self.rng, self.table.columns[cond.column]
        values = [self.cased(str(v)) for v in cond.args]
        sole = all(self.table.holders[str(v).lower()] == {cond.column} for v in cond.args)
        named: str | None = None
        if column.say or column.opaque:
            named = self.column(cond.column)
        preps = [p for p in column.spec.prepositions]
        prep = rng.choice(preps) if preps else ""
        one = len(values) == 1
        both = values[0] if one else self._either(values)
        out: list[tuple[str, str, float]] = []
        if cond.op == "ne":
            if sole:
                out += [("post", f"{self.pick('except', 'excluding', 'other than', 'except for', 'but not')} {both}", 2),
                        ("prep", f"excluding {both}", 1), ("post", f"that are not {both}", 1),
                        ("pred", f"are not {both}", 1), ("terse", f"not {both}", 2)]  # fmt: skip
                if prep and prep.split()[0] in _PREP - {"where", "that"}:
                    out += [("post", f"not {prep} {both}", 3), ("pred", f"are not {prep} {both}", 3)]
                    if prep == "in":
                        out += [("prep", f"outside {both}", 0.7)]
            if named:
                out += [("whose", f"whose {named} is not {both}", 2), ("where", f"where {named} is not {both}", 2),
                        ("where", f"where {named} != {both}", 1), ("post", f"with a {named} other than {both}", 1),
                        ("terse", f"{named} not {both}", 1), ("pred", f"have a {named} other than {both}", 1)]  # fmt: skip
            return out
        if column.coded:
            if not named:
                return []
            nth = {"1": ("first", "1st"), "2": ("second", "2nd"), "3": ("third", "3rd")}.get(both)
            if nth and one:
                out += [("adj", f"{rng.choice(nth)} {named}", 2), ("prep", f"in {rng.choice(nth)} {named}", 1)]
            out += [("prep", f"in {named} {both}", 3), ("terse", f"{named} {both}", 2), ("pred", f"are in {named} {both}", 3), ("adj", f"{named} {both}", 1)]
        if sole:
            short = all(len(v.split()) <= 2 for v in values)
            if short and (one or rng.random() < 0.3):
                out += [("adj", both, 4), ("terse", both, 3)]
                if not prep:
                    out += [("pred", f"are {both}", 2)]
            if prep and prep.split()[0] not in ("that", "where"):
                out += [("prep", f"{prep} {both}", 5), ("pred", f"are {prep} {both}", 4), ("terse", f"{prep} {both}", 1)]
            elif prep:
                out += [("post", f"{prep} {both}", 5), ("pred", f"{prep.split(' ', 1)[-1]} {both}", 2)]
            out += [("prep", f"for {both}", 0.4), ("terse", both, 1)]
            if one and values[0].isalpha() and len(values[0]) > 3 and any(w in _ROLES for c in column.spec.say for w in c.split()):
                out += [("head", plural(values[0].lower()), 2.5), ("pred", f"are {plural(values[0].lower())}", 1.5)]
            for value, ways in column.spec.said.items():
                if one and value == cond.args[0]:
                    for way in ways:
                        out += self._said(way)
        if named:
            out += [("post", f"with {named} {both}", 1.5), ("whose", f"whose {named} is {both}", 1.2),
                    ("where", f"where {named} is {both}", 1), ("where", f"where {named} = {both}", 0.5),
                    ("where", f"where the {named} is {both}", 0.5), ("where", f"where {named} equals {both}", 0.2),
                    ("post", f"of {named} {both}", 0.7), ("pred", f"have {named} {both}", 1),
                    ("terse", f"{named} {both}", 1.5), ("terse", f"{named}={both}", 0.7),
                    ("terse", f"{named}: {both}", 0.4), ("prep", f"for {named} {both}", 0.8)]  # fmt: skip
            if "in" in preps:
                out += [("prep", f"in the {both} {named}", 1.6), ("pred", f"are in the {both} {named}", 1)]
            elif one:
                out += [("post", f"with the {named} {both}", 0.5), ("post", f"with {both} as {named}", 0.4)]
        return out

    def _said(self, way: str) -> list[tuple[str, str, float]]:
        first, last = way.split()[0], way.split()[-1]
        if first in _PREP or first.endswith("ing"):
            return [("post", way, 2), ("pred", f"are {way}", 1.5)]
        if (last.endswith("s") and not last.endswith(("ss", "us", "ous"))) or last in ("women", "men", "people"):
            return [("head", way, 3), ("pred", f"are {way}", 1.5)]
        return [("adj", way, 3), ("pred", f"are {way}", 2)]

    def _either(self, values: list[str]) -> str:
        last = self.pick("or", "or", "and")
        if len(values) == 2:
            either = "either " if last == "or" and self.rng.random() < 0.15 else ""
            return f"{either}{values[0]} {last} {values[1]}"
        return f"{', '.join(values[:-1])}{self.pick('', ',')} {last} {values[-1]}"

    def _flag(self, column: Column, yes: bool) -> list[tuple[str, str, float]]:
        out: list[tuple[str, str, float]] = []
        for way in column.spec.yes if yes else column.spec.no:
            first, last, length = way.split()[0], way.split()[-1], len(way.split())
            if first in ("that", "where", "who"):
                out += [("post", way, 3)]
                if first != "where" and length > 2:
                    out += [("pred", way.split(" ", 1)[1], 3)]
            elif first in ("with", "without", "having"):
                rest = way.split(" ", 1)[1]
                out += [("post", way, 4), ("pred", ("don't have " if first == "without" else "have ") + rest, 3),
                        ("terse", way, 2)]  # fmt: skip
            elif first in ("not", "never", "no", "still", "already") or first in _PREP or first.endswith("ing"):
                out += [("post", way if first in _PREP or first.endswith("ing") else f"that are {way}", 2),
                        ("pred", f"are {way}", 3), ("terse", way, 2)]  # fmt: skip
                if first == "not":
                    out += [("pred", f"aren't {way[4:]}", 2)]
            elif first in ("has", "have", "is", "are", "can", "used", "got", "was", "were", "did", "do"):
                fixed = {"has": "have", "is": "are", "was": "were"}.get(first, first)
                out += [("pred", " ".join([fixed, *way.split()[1:]]), 3)]
            elif last.endswith("s") and not last.endswith(("ss", "us", "ous", "less")) and length <= 2:
                out += [("head", way, 2), ("pred", f"are {way}", 3), ("terse", way, 1)]
            else:
                be = "were" if first.endswith("ed") and self.rng.random() < 0.5 else "are"
                out += [("pred", f"{be} {way}", 2), ("terse", way, 2)]
                if length <= 2:
                    out += [("adj", way, 4)]
                else:
                    out += [("post", way, 2)]
                if length == 1 and way.endswith("ed") and self.person:
                    out += [("pred", way, 1.5)]
        return out

    def _null(self, cond: Cond, column: Column) -> list[tuple[str, str, float]]:
        m = self.column(cond.column)
        if column.kind == "num" and column.spec.low <= 0:
            # "no absences" would mean zero of them.
            known = "missing" if cond.op == "null" else "known"
            absent = self.pick(known, "empty", "blank", "null") if cond.op == "null" else self.pick(known, "not empty", "not null", "filled in")
            return [("whose", f"whose {m} is {absent}", 2), ("where", f"where {m} is {absent}", 2), ("terse", f"{m} {absent}", 2),
                    ("post", f"with {self.pick('a ', '')}{known} {m}", 2), ("pred", f"have a {known} {m}", 2)]
        if cond.op == "null":
            return [("post", self.pick(f"with no {m}", f"without {m}", f"without a {m}", f"missing a {m}", f"with missing {m}",
                                       f"lacking a {m}", f"with an empty {m}", f"with blank {m}", f"with unknown {m}",
                                       f"with no {m} recorded", f"with no {m} given"), 4),
                    ("pred", self.pick(f"have no {m}", f"don't have a {m}", f"have no known {m}", f"have a missing {m}",
                                       f"are missing the {m}", f"lack a {m}", f"have no {m} filled in"), 3),
                    ("whose", f"whose {m} is {self.pick('missing', 'blank', 'unknown', 'empty', 'not known', 'null')}", 1.5),
                    ("where", f"where {self.pick('', 'the ')}{m} is {self.pick('missing', 'blank', 'null', 'empty', 'not given', 'not filled in')}", 1.5),
                    ("terse", self.pick(f"{m} missing", f"no {m}", f"without {m}", f"missing {m}", f"{m} empty", f"{m} is null"), 3)]  # fmt: skip
        return [("post", self.pick(f"with a known {m}", f"with {m} filled in", f"with a {m} recorded", f"with a non-empty {m}",
                                   f"with any {m}", f"that do have a {m}"), 3),
                ("pred", self.pick(f"do have a {m}", f"have a known {m}", f"have {m} filled in", f"have a {m} at all"), 3),
                ("whose", f"whose {m} is {self.pick('known', 'not missing', 'not empty', 'not null', 'filled in')}", 1.5),
                ("where", f"where {m} is {self.pick('not null', 'not missing', 'not empty', 'known', 'filled in')}", 1.5),
                ("terse", self.pick(f"{m} not empty", f"{m} not null", f"with {m} known"), 2)]  # fmt: skip

    def _literal(self, cond: Cond) -> list[tuple[str, str, float]]:
        rng = self.rng
        literal = str(cond.args[0])
        cased = literal if rng.random() < 0.5 else literal.lower()
        t = f'"{cased}"' if rng.random() < 0.45 else f"'{cased}'" if rng.random() < 0.4 else cased
        m = self.column(cond.column)
        bare: list[tuple[str, str, float]] = []
        if cond.op == "contains" and self.is_part(cond):
            bare = [("adj", cased, 6), ("terse", cased, 4), ("prep", f"for {cased}", 2), ("prep", f"by {cased}", 0.5), ("post", f"named {cased}", 2), ("post", f"called {cased}", 2), ("pred", f"are {cased}", 1)]
        if cond.op == "contains":
            return [*bare,("whose", f"whose {m} contains {t}", 3), ("where", f"where {m} contains {t}", 2),
                    ("where", f"where the {m} includes \"{cased}\"", 1), ("post", f"with {t} in the {m}", 3),
                    ("post", f"with a {m} containing {t}", 2), ("terse", f"{m} contains {t}", 2),
                    ("pred", f"have \"{cased}\" in their {m}", 2), ("post", f"with \"{cased}\" in their {m}", 1),
                    ("post", f"mentioning \"{cased}\" in the {m}", 0.5)]  # fmt: skip
        begin, verb = ("starting with", "starts with") if cond.op == "starts" else (self.pick("ending with", "ending in"), "ends with")
        if cond.op == "starts" and rng.random() < 0.3:
            begin, verb = "beginning with", "begins with"
        return [("whose", f"whose {m} {verb} {t}", 3), ("where", f"where {m} {verb} {t}", 2),
                ("post", f"with a {m} {begin} {t}", 2), ("terse", f"{m} {begin} {t}", 2),
                ("pred", f"have a {m} {begin} {t}", 2)]  # fmt: skip

    def is_part(self, cond: Cond) -> bool:
        """Whether the text is a whole word of longer names, so that it can stand for them alone."""
        literal, column = str(cond.args[0]).lower(), self.table.columns[cond.column]
        if column.kind not in ("key", "cat") or len(literal) < 4 or literal in self.table.holders:
            return False
        cells = [w for v in self.table.holders if literal in (w := v.split())]
        own = [w for v in column.present() if literal in (w := str(v).lower().split())]
        return len(own) > 0 and len({" ".join(w) for w in own}) == len(cells) and all(len(w) > 1 for w in own)

    def _quantity(self, cond: Cond) -> list[tuple[str, str, float]]:
        rng, column = self.rng, self.table.columns[cond.column]
        m = self.column(cond.column)
        n = [self.number(a, column) for a in cond.args]
        if cond.op == "between":
            span = self.pick(f"between {n[0]} and {n[1]}", f"between {n[0]} and {n[1]}", f"from {n[0]} to {n[1]}")
            return [("post", f"with {m} {span}", 3), ("post", f"with a {m} {span}", 2), ("whose", f"whose {m} is {span}", 2),
                    ("where", f"where {m} is {span}", 2), ("terse", f"{m} {span}", 3), ("pred", f"have a {m} {span}", 3)]  # fmt: skip
        if cond.op == "in":
            either = self._either(n)
            return [("post", f"with {either} {m}" if m.endswith("s") else f"with {m} {either}", 3), ("where", f"where {m} is {either}", 2), ("whose", f"whose {m} is {either}", 2),
                    ("terse", f"{m} {either}", 2), ("pred", f"have {either} {m}" if m.endswith("s") else f"have a {m} of {either}", 3)]
        if cond.op == "eq" and column.spec.integer and column.spec.high <= 500 and m.endswith("s") and rng.random() < 0.6:
            exactly = self.pick("", "", "exactly ")
            return [("post", f"with {exactly}{n[0]} {m}", 4), ("pred", f"have {exactly}{n[0]} {m}", 4), ("terse", f"{n[0]} {m}", 2), ("adj", f"{n[0]} {m[:-1]}", 1)]
        if cond.op == "eq":
            return [("post", f"with {self.pick('', 'a ', 'exactly ')}{m} of {n[0]}", 2), ("whose", f"whose {m} is {self.pick('', 'exactly ')}{n[0]}", 2),
                    ("where", f"where {m} {self.pick('=', 'is', 'equals')} {n[0]}", 2), ("terse", f"{m} {self.pick('=', '')} {n[0]}", 2),
                    ("pred", f"have {self.pick('a ', '')}{m} of {n[0]}", 2)]  # fmt: skip
        if cond.op == "ne":
            return [("whose", f"whose {m} is not {n[0]}", 2), ("where", f"where {m} is not {n[0]}", 2),
                    ("post", f"with a {m} other than {n[0]}", 1), ("terse", f"{m} not {n[0]}", 1), ("pred", f"have a {m} other than {n[0]}", 1)]  # fmt: skip
        than = rng.choice(_COMPARE[cond.op])
        value = f"{than}{'' if than.endswith((' ', '>', '<', '=')) else ' '}{n[0]}"
        if cond.op in ("ge", "le") and rng.random() < 0.25:
            value = f"{n[0]} or {self.pick('more', 'higher', 'above') if cond.op == 'ge' else self.pick('less', 'lower', 'below')}"
        sign = than.strip() in (">", "<", ">=", "<=") and value.startswith(than)
        is_ = "" if sign else "is "
        of = "" if sign or rng.random() < 0.5 or than in ("exceeding", "over", "above", "under", "below") else "of "
        a = self.pick("a ", "")
        out = [("post", f"with {a}{m} {of}{value}", 4), ("whose", f"whose {m} {is_}{value}", 2.5), ("where", f"where {m} {is_}{value}", 2.5),
               ("terse", f"{m} {value}", 5), ("pred", f"have {a}{m} {of}{value}", 3)]  # fmt: skip
        if cond.op == "gt" and than == "exceeding":
            out = [("whose", f"whose {m} exceeds {n[0]}", 2), ("where", f"where {m} exceeds {n[0]}", 1), *out[:1], *out[3:]]
        if column.spec.integer and column.spec.high < 5000 and m.endswith("s") and than in ("more than", "less than", "at least", "over", "at most", "under"):
            number = self._digits(cond.args[0])
            fewer = "fewer than" if than == "less than" and rng.random() < 0.5 else than
            out += [("post", f"with {fewer} {number} {m}", 3), ("pred", f"have {fewer} {number} {m}", 4), ("terse", f"{fewer} {number} {m}", 2)]
        verbs = column.spec.more if cond.op == "gt" else column.spec.less if cond.op == "lt" else ()
        for verb in verbs:
            out += self._verbal(verb, n[0])
        return out

    def _verbal(self, verb: str, number: str) -> list[tuple[str, str, float]]:
        """A phrase such as "cost more than", "older than", "with over" before a number."""
        first = verb.split()[0]
        text = f"{verb} {number}"
        if first in ("more", "fewer", "less"):
            return []
        if first in ("over", "above", "under", "below"):
            return [("post", text, 2), ("pred", f"are {text}", 1)]
        if first == "with":
            return [("post", text, 4), ("pred", "have" + text[4:], 2)]
        if first.endswith("ing"):
            return [("post", text, 4)]
        if (first.endswith("er") and first not in ("offer", "cover", "deliver", "answer", "gather", "suffer", "consider", "enter", "require")) \
                or first in ("worth", "down", "up", "open", "better", "worse") or first in _PAST_PASSIVE:  # fmt: skip
            return [("post", text, 3), ("pred", f"are {text}", 3), ("terse", text, 1)]
        return [("pred", text, 6)]

    def _time(self, cond: Cond) -> list[tuple[str, str, float]]:
        rng, column = self.rng, self.table.columns[cond.column]
        sole = self.unnamed_time(cond.column)
        is_year = column.kind == "year"
        at = [str(a) if is_year else self.date(a) for a in cond.args]
        unit = "year" if is_year else cond.args[0].unit
        op = {"gt": "after", "lt": "before", "ge": "since", "eq": "on"}.get(cond.op, cond.op)
        if is_year and op == "between" and cond.args[0] % 10 == 0 and cond.args[1] == cond.args[0] + 9:
            decade = f"the {cond.args[0]}s" if cond.args[0] >= 1900 and rng.random() < 0.8 else f"{cond.args[0]}s"
            op, prep, at = "decade", self.pick("in", "in", "during", "from"), [decade]
        elif op == "on":
            prep = "on" if unit == "day" else self.pick("in", "in", "in", "in", "during", "for", "in the year" if unit == "year" else "in")
        elif op == "between":
            prep = ""
            at = [self.pick(f"between {at[0]} and {at[1]}", f"from {at[0]} to {at[1]}", f"from {at[0]} through {at[1]}", f"from {at[0]} until {at[1]}", f"{at[0]} to {at[1]}")]
        elif op == "since":
            prep = self.pick("since", "since", "from") if op == "since" else op
            if prep == "from":
                at = [f"{at[0]} {self.pick('on', 'onwards', 'onward')}"]
            elif rng.random() < 0.1 and is_year:
                prep, at = "in", [f"{at[0]} or later"]
        elif op == "le":
            prep, at = "in", [f"{at[0]} or {self.pick('earlier', 'before')}"]
        elif op == "ne":
            prep = "not in"
        else:
            prep = self.pick("after", "after", "later than") if op == "after" else self.pick("before", "before", "earlier than", "prior to")
        when = f"{prep} {at[0]}".strip()
        loose = not (prep.startswith(("later", "earlier", "not", "prior")))
        out: list[tuple[str, str, float]] = []
        if sole and loose:
            out += [("prep", when, 4), ("terse", when, 2), ("pred", f"are {when}", 0.5)]
            if op == "on" and unit == "year":
                out += [("adj", at[0], 0.7), ("terse", at[0], 2)]
        for verb in column.spec.verb:
            if verb.split()[-1] in ("on", "since", "in", "for", "at") or verb == "on":
                continue
            w = when if loose or prep == "not in" else f"{prep} {at[0]}"
            out += [("post", f"{verb} {w}" if prep != "not in" else f"not {verb} in {at[0]}", 3.5)]
            if prep != "not in":
                was = f"were {verb}" if verb in _VERB_WITH_WAS else verb
                out += [("pred", f"{was} {w}", 3)]
        m = self.column(cond.column)
        is_in = f"is {when}"
        out += [("post", f"with {self.pick('a ', '')}{m} {when}", 2.5), ("whose", f"whose {m} {is_in}", 2), ("where", f"where {m} {is_in}", 2),
                ("terse", f"{m} {when}", 3), ("pred", f"have {self.pick('a ', '')}{m} {when}", 1.5)]  # fmt: skip
        if op == "on" and unit != "month":
            out += [("terse", f"{m} {at[0]}", 2), ("post", f"with {m} {at[0]}", 1), ("where", f"where {m} = {at[0]}", 0.7)]
        if op in ("after", "before", "since") and is_year:
            sign = {"after": ">", "before": "<", "since": ">="}[op]
            out += [("where", f"where {m} {sign} {cond.args[0]}", 1), ("terse", f"{m} {sign} {cond.args[0]}", 1.5)]
        return out
