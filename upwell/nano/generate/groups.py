"""Sentences that ask for numbers by group."""

# ruff: noqa: E501 - a line holds the variants of one sentence
# fmt: off

from __future__ import annotations

from upwell.nano.generate.asked import Intent
from upwell.nano.generate.names import Unsayable
from upwell.nano.generate.phrases import GE, GT, LE, LT
from upwell.nano.generate.sentences import LEAST, MOST, UNIT, WHEN_WAS, Sentences


class GroupSentences(Sentences):
    def _grouped(self, q: Intent, bare: float = 0.3, frames: bool = True) -> str:
        rng, m, d = self.rng, q.measures[0], q.dims[0]
        by = self.by(d)
        roll = rng.random()
        if m.op == "count":
            r = self.rows(q.where)
            if self.columns[d.column].kind == "flag" or not frames:
                core = self.pick(f"number of {r} {by}", f"count {r} {by}", f"{r} {by}", f"count of {r} {by}")
                return core
            if roll < 0.6:
                return self.pick(f"how many {r} are there {by}", f"how many {r} {by}", f"how many {r} {by}", f"how many {r} do we have {by}", f"number of {r} {by}", f"number of {r} {by}", f"count {r} {by}", f"count of {r} {by}",
                                 f"{r} {by}" if by.startswith(("per", "by", "in each")) else f"number of {r} {by}", f"show the number of {r} {by}", f"what is the number of {r} {by}", f"give me the count of {r} {by}")  # fmt: skip
            one, many = self.dim(d)
            if self.columns[d.column].kind == "flag":
                raise Unsayable("flag")
            if roll < 0.75:
                return self.pick(f"{one} distribution of {r}", f"distribution of {r} by {one}", f"distribution of {r} over {many}", f"how are the {r} distributed across {many}", f"breakdown of {r} by {one}", f"frequency of each {one} among {r}", f"{one} breakdown of {r}")
            if roll < 0.85:
                return self.pick(f"for each {one}, how many {r} are there", f"for every {one} count the {r}", f"for each {one} give the number of {r}", f"per {one}, how many {r}")
            preps = [x for x in self.columns[d.column].spec.prepositions if x in ("in", "from", "at", "on", "by", "for", "via")]
            if preps and roll < 0.92:
                prep = rng.choice(preps)
                return self.pick(f"how many {r} are {prep} each {one}", f"how many {r} are there {prep} each {one}", f"how many {r} do we have {prep} each {one}", f"number of {r} {prep} each {one}", f"how many {r} {prep} every {one}")
            if roll < 0.96:
                return self.pick(f"how many {r} does each {one} have", f"how many {r} are in each {one}", f"how many {r} belong to each {one}", f"how many {r} has each {one}")
            return self.pick(f"{one} counts" if not q.where else f"count of {r} by {one}", f"number of {r} in the different {many}")
        what = self.measure(m, bare)
        if not frames:
            return f"{self.scoped(what, q.where, 0.1)} {by}" if rng.random() < 0.5 else f"{what} {by}{self.scope(q.where)}"
        if roll < 0.5:
            if q.where:
                core = f"{what} {by}{self.scope(q.where)}" if rng.random() < 0.5 else f"{self.scoped(what, q.where)} {by}"
            else:
                core = f"{what}{f' of {self.p.entity()}' if rng.random() < 0.15 else ''} {by}"
            return self.frame(core)
        if self.columns[d.column].kind == "flag":
            return self.frame(f"{what} {by}{self.scope(q.where)}")
        one, many = self.dim(d)
        scope = self.scope(q.where)
        if roll < 0.62:
            return self.pick(f"for each {one}, what is the {what}{scope}", f"for each {one} show the {what}{scope}", f"for every {one}, {what}{scope}", f"per {one}, what is the {what}{scope}", f"for each {one} calculate the {what}{scope}")
        if roll < 0.72:
            return self.pick(f"how does the {what} vary by {one}{scope}", f"how does {what} differ between {many}{scope}", f"compare the {what} across {many}{scope}", f"compare {many} by {what}{scope}", f"compare {what} between {many}{scope}",
                             f"how do the {many} compare in {what}{scope}", f"how does the {what} depend on the {one}{scope}")  # fmt: skip
        if roll < 0.82:
            return self.pick(f"what is the {what} in each {one}{scope}", f"what {what} does each {one} have{scope}", f"what's the {what} for each {one}{scope}", f"{one} wise {what}{scope}", f"{one}-wise {what}{scope}", f"breakdown of {what} by {one}{scope}")
        if roll < 0.9 and m.op != "sum":
            return self.pick(f"{many} and their {what}{scope}", f"list {many} with their {what}{scope}", f"show each {one} with its {what}{scope}", f"each {one}'s {what}{scope}", f"{what} of each {one}{scope}", f"show all {many} with the {what}{scope}")
        return f"{what} {by}{scope}"

    def _group(self, q: Intent) -> str:
        if q.where and self.rng.random() < 0.12:
            inner = Intent(q.form, (), q.dims, q.measures)
            return self.fronted(self._grouped(inner), q.where)
        return self._grouped(q)

    def _group_sorted(self, q: Intent) -> str:
        core = self._grouped(q, frames=False)
        if q.sort == "desc":
            end = self.pick("from high to low", "sorted descending", "in descending order", "highest first", "from highest to lowest", "largest first", "sorted from largest to smallest", "descending", "desc", "ranked", "starting with the highest", "biggest first")
        else:
            end = self.pick("from low to high", "sorted ascending", "in ascending order", "lowest first", "from lowest to highest", "smallest first", "ascending", "asc", "starting with the lowest")
        if q.sort == "desc" and self.columns[q.dims[0].column].kind == "cat" and self.rng.random() < 0.3:
            _, many = self.dim(q.dims[0])
            what = self.measure(q.measures[0], 0.1)
            return self.pick(f"rank {many} by {what}", f"rank the {many} by {what}", f"{many} ranked by {what}", f"ranking of {many} by {what}", f"{many} by {what} descending") + self.scope(q.where)
        return self.pick("{x}", "show {x}", "list {x}", "give me {x}", "{x}").format(x=f"{core}{self.pick(',', '', '')} {end}")

    def _group_best(self, q: Intent) -> str:
        rng, m, d, up = self.rng, q.measures[0], q.dims[0], q.sort == "desc"
        if self.columns[d.column].kind == "flag":
            raise Unsayable("flag")
        one, many = self.dim(d)
        scope = self.scope(q.where)
        if m.op == "count":
            if rng.random() < 0.3 and not q.where:
                common = self.pick("most common", "most common", "most frequent", "most popular", "commonest", "most often seen") if up else self.pick("least common", "rarest", "least frequent", "least popular")
                return self.pick(f"what is the {common} {one}", f"{common} {one}", f"which {one} is the {common}", f"which is the {common} {one}", f"which {one} is {common}", f"what's the {common} {one}", f"find the {common} {one}") + (f" among {self.p.entity()}" if rng.random() < 0.2 else "")
            r = self.rows(q.where)
            most = self.pick("the most", "the most", "most", "the highest number of", "the largest number of", "the greatest number of") if up else self.pick("the fewest", "the fewest", "the least", "the lowest number of", "the smallest number of")
            if up and rng.random() < 0.1:
                return f"which {one} {self.pick('appears', 'occurs', 'comes up')} most often{scope}" if not q.where else f"where do most {r} come from: which {one}"
            return self.pick(f"which {one} has {most} {r}", f"which {one} has {most} {r}", f"which {one} has {most} {r}", f"{one} with {most} {r}", f"in which {one} are there {most} {r}", f"what {one} has {most} {r}", f"find the {one} with {most} {r}", f"which {one} had {most} {r}",
                             f"tell me the {one} with {most} {r}", f"show the {one} that has {most} {r}", f"the {one} with {most} {r}")  # fmt: skip
        most = self.pick(*(MOST if up else LEAST))
        own = () if m.column is None else self.columns[m.column].hi if up else self.columns[m.column].lo
        adjectives = [w for w in own if w.split()[0] in ("most", "least", "best", "worst") or len(w.split()) == 1]
        if m.op == "avg" and adjectives and rng.random() < 0.3:
            word = rng.choice(adjectives)
            return self.pick(f"which {one} has the {word} {self.p.entity()} on average", f"{one} with the {word} {self.p.entity()} on average", f"which {one} is the {word} on average") + scope
        if m.op == "sum":
            assert m.column is not None
            name = self.p.column(m.column, raw=False)
            what = self.pick(f"{most} total {name}", f"{most} {name} in total", f"{'most' if up else 'least'} {name}", f"{most} {name}", f"{most} sum of {name}", f"{'most' if up else 'least'} {name} overall", f"{most} combined {name}")
        else:
            what = f"{most} {self.measure(m, 0.12)}" if m.op != "max" else ""
        if m.op == "max":
            raise Unsayable("max of max")
        return self.pick(f"which {one} has the {what}{scope}", f"which {one} has the {what}{scope}", f"which {one} has the {what}{scope}", f"{one} with the {what}{scope}", f"{one} with {what}{scope}", f"what {one} has the {what}{scope}", f"find the {one} with the {what}{scope}",
                         f"which {one} had the {what}{scope}", f"tell me which {one} has the {what}{scope}", f"the {one} with the {what}{scope}", f"which of the {many} has the {what}{scope}", f"in which {one} is the {what.split(' ', 1)[1]} the {'highest' if up else 'lowest'}{scope}" if m.op != "sum" else f"show the {one} with the {what}{scope}")  # fmt: skip

    def _group_top(self, q: Intent) -> str:
        m, d, up = q.measures[0], q.dims[0], q.sort == "desc"
        if self.columns[d.column].kind == "flag" or m.op == "max":
            raise Unsayable("flag")
        _, many = self.dim(d)
        n, scope = self.p._digits(q.top), self.scope(q.where)
        if m.op == "count":
            if self.rng.random() < 0.25:
                return self.pick(f"{n} most common {many}", f"the {n} most frequent {many}", f"what are the {n} most common {many}", f"top {n} most common {many}", f"which {n} {many} are most common") + scope if up else self.pick(f"{n} least common {many}", f"the {n} rarest {many}") + scope
            r = self.rows(q.where)
            most = "the most" if up else "the fewest"
            return self.pick(f"which {n} {many} have {most} {r}", f"{n} {many} with {most} {r}", f"top {n} {many} by number of {r}" if up else f"bottom {n} {many} by number of {r}", f"top {n} {many} by {r} count" if up and not q.where else f"the {n} {many} with {most} {r}",
                             f"show the {n} {many} with {most} {r}", f"what are the {n} {many} with {most} {r}")  # fmt: skip
        what, top = self.measure(m, 0.25), "top" if up else "bottom"
        most = self.pick(*(MOST if up else LEAST))
        return self.pick(f"{top} {n} {many} by {what}{scope}", f"{top} {n} {many} by {what}{scope}", f"show the {top} {n} {many} by {what}{scope}", f"what are the {top} {n} {many} in terms of {what}{scope}", f"which {n} {many} have the {most} {what}{scope}",
                         f"{n} {many} with the {most} {what}{scope}", f"give me the {top} {n} {many} by {what}{scope}", f"list the {n} {many} with the {most} {what}{scope}")  # fmt: skip

    def _rate(self, q: Intent) -> str:
        cond, d = q.measures[0].cond, q.dims[0]
        assert cond is not None
        by = self.by(d)
        p = self.pick("percentage", "percentage", "share", "proportion", "fraction", "percent")
        e = self.p.entity()
        roll = self.rng.random()
        rate = self.rate_noun(cond)
        if rate and self.rng.random() < 0.35:
            return self.frame(f"{rate} {by}")
        if roll < 0.45:
            text = self.p.condition(cond, 0, ("pred",))[1]
            part = self.pick("what percentage of", "what percent of", "what share of", "what % of", "what proportion of")
            core = self.pick(f"{part} {e} {text} {by}", f"{by}, {part} {e} {text}", f"{p} of {e} {self.p.who()} {text} {by}")
            if self.columns[d.column].kind == "flag":
                return core
            one, _ = self.dim(d)
            return self.pick(core, core, f"what {p} of {e} in each {one} {text}", f"for each {one}, what percentage of {e} {text}")
        sub = self.rows((cond,), first=0)
        return self.frame(self.pick(f"{p} of {sub} {by}", f"{p} of {sub} {by}", f"{sub} as a percentage of all {e} {by}", f"{p} {sub} {by}"))

    def _breakdown(self, q: Intent) -> str:
        m, d = q.measures[0], q.dims[0]
        flag = self.columns[d.column].kind == "flag"
        one, many = self.dim(d)
        p = self.pick("percentage", "share", "proportion", "percent")
        if m.op == "share_sum":
            name = self.p.column(m.column or 0, raw=False)
            scope = self.scope(q.where)
            flat = self.pick(f"{p} of total {name} by {one}{scope}", f"{p} of {name} by {one}{scope}", f"{p} of the total {name} per {one}{scope}")
            if flag:
                return flat
            return self.pick(flat, flat, f"what share of total {name} does each {one} have{scope}", f"each {one}'s share of total {name}{scope}", f"what percentage of the {name} comes from each {one}{scope}", f"contribution of each {one} to total {name} in percent{scope}",
                             f"how is the {name} split across {many} in percent{scope}", f"{one} share of {name}{scope}", f"percent of {name} by {one}{scope}", f"how much does each {one} contribute to the total {name}, in %{scope}")  # fmt: skip
        r = self.rows(q.where)
        flat = self.pick(f"{p} of {r} by {one}", f"{p} of {r} per {one}", f"percentage breakdown of {r} by {one}", f"distribution of {r} by {one} in percent", f"{r} by {one} as percentages", f"% of {r} by {one}")
        if flag:
            return flat
        return self.pick(flat, flat, f"what percentage of {r} falls in each {one}", f"what share of {r} does each {one} have", f"share of each {one} among {r}", f"what % of {r} are in each {one}", f"percentage of {r} in each {one}", f"relative frequency of each {one} among {r}",
                         f"how are {r} split across {many} in percent", f"{one} share in %" if not q.where else flat)  # fmt: skip

    def _having(self, q: Intent) -> str:
        m, d = q.measures[0], q.dims[0]
        assert q.having is not None
        if self.columns[d.column].kind == "flag":
            raise Unsayable("flag")
        op, number = q.having
        column = self.columns[m.column] if m.column is not None else None
        n = self.p.number(number, column)
        _, many = self.dim(d)
        than = {"gt": self.pick(*GT[:6]), "ge": self.pick(*GE[:4]), "lt": self.pick(*LT[:5]), "le": self.pick(*LE[:4]), "eq": "exactly"}[op]
        scope = self.scope(q.where)
        lead = self.pick("which {ds} have", "which {ds} have", "what {ds} have", "{ds} with", "{ds} with", "list {ds} with", "show {ds} that have", "find {ds} with", "list the {ds} having", "show me {ds} with", "are there {ds} with", "{ds} having").format(ds=many)
        if m.op == "count":
            r = self.rows(q.where)
            if op in ("gt", "lt"):
                than = self.pick("more than", "more than", "over") if op == "gt" else self.pick("fewer than", "less than", "under")
            if op in ("ge", "le") and self.rng.random() < 0.2:
                return f"{lead} {n} or {'more' if op == 'ge' else 'fewer'} {r}"
            return f"{lead} {than} {n} {r}"
        what = self.measure(m, 0.0)
        if self.rng.random() < 0.35:
            verb = {"gt": self.pick("is over", "is above", "exceeds", "is more than", "is higher than", "> "), "lt": self.pick("is under", "is below", "is less than", "< "), "ge": "is at least", "le": "is at most", "eq": "is"}[op]
            return self.pick(f"which {many} are those where the {what} {verb} {n}{scope}", f"{many} where the {what} {verb} {n}{scope}", f"{many} whose {what} {verb} {n}{scope}", f"list {many} where {what} {verb} {n}{scope}", f"in which {many} is the {what} {than} {n}{scope}",
                             f"for which {many} is the {what} {than} {n}{scope}", f"show all {many} where the {what} {verb} {n}{scope}")  # fmt: skip
        an = self.pick("a", "a", "") if not what.startswith(("a", "o")) else self.pick("an", "an", "")
        return f"{lead} {an} {what} {self.pick('', 'of ') if not than.startswith(('over', 'above', 'under', 'below', 'exceed')) else ''}{than} {n}{scope}"

    def _compare(self, q: Intent) -> str:
        m, cond = q.measures[0], q.where[0]
        values = ["\ue000" + self.p.cased(str(v)) for v in cond.args]
        if any(len(self.p.table.holders.get(str(v).lower(), ())) > 1 for v in cond.args):
            raise Unsayable("value of several columns")
        both = f"{', '.join(values[:-1])} and {values[-1]}"
        versus = f" {self.pick('vs', 'versus', 'vs.', 'v')} ".join(values)
        if m.op == "count":
            e = self.p.entity()
            return self.pick(f"compare the number of {e} in {both}", f"number of {e} for {both}", f"{e} count {versus}", f"compare {both} by number of {e}", f"how many {e} for {both} each", f"number of {e}: {versus}", f"how many {e} are {values[0]} and how many are {values[1]}" if len(values) == 2 else f"number of {e} {versus}",
                             f"how do {both} compare in number of {e}", f"compare {e} counts for {both}")  # fmt: skip
        what = self.measure(m, 0.35 if m.op == "avg" else 0.15)
        return self.pick(f"compare the {what} of {both}", f"compare {what} for {both}", f"compare {both} by {what}", f"{what} {versus}", f"{what}: {versus}", f"{versus} {what}", f"difference in {what} between {both}", f"how does the {what} of {values[0]} compare to {' and '.join(values[1:])}",
                         f"compare {both} in terms of {what}", f"compare {versus} on {what}", f"what is the {what} for {both} respectively", f"what is the {what} of {both} each", f"how do {both} compare in {what}", f"{what} for {both} separately", f"how do {both} differ in {what}", f"show {what} for {both} side by side")  # fmt: skip

    def _compare_best(self, q: Intent) -> str:
        m, cond, up = q.measures[0], q.where[0], q.sort == "desc"
        if any(len(self.p.table.holders.get(str(v).lower(), ())) > 1 for v in cond.args) or m.op in ("max", "min"):
            raise Unsayable("value of several columns")
        a, b = ("\ue000" + self.p.cased(str(v)) for v in cond.args)
        one, _ = self.dim(q.dims[0])
        if m.op == "count":
            e = self.p.entity()
            more = self.pick("more", "the most") if up else self.pick("fewer", "the fewest")
            return self.pick(f"which has {more} {e}, {a} or {b}", f"does {a} or {b} have {more} {e}", f"which {one} has {more} {e}: {a} or {b}", f"are there {more} {e} for {a} or for {b}", f"which of {a} and {b} has {more} {e}")
        what, comp = self.measure(m, 0), self.pick("higher", "higher", "larger", "greater") if up else self.pick("lower", "lower", "smaller")
        return self.pick(f"which has the {comp} {what}, {a} or {b}", f"which {one} has a {comp} {what}, {a} or {b}", f"does {a} or {b} have the {comp} {what}", f"is the {what} {comp} for {a} or {b}", f"{a} vs {b}: which has the {comp} {what}", f"{a} or {b}: which has the {comp} {what}", f"which of {a} and {b} has the {comp} {what}")

    def _compare_flag(self, q: Intent) -> str:
        m, spec = q.measures[0], self.columns[q.dims[0].column].spec
        short = [[w for w in ways if len(w.split()) <= 2 and w.split()[0] not in ("with", "without", "that", "where", "having")] for ways in (spec.yes, spec.no)]
        if not all(short):
            raise Unsayable("flag")
        yes, no, e = self.rng.choice(short[0]), self.rng.choice(short[1]), self.p.entity()
        what = self.measure(m, 0.3)
        return self.pick(f"compare {yes} and {no} {e} by {what}", f"{what} of {yes} vs {no} {e}", f"{what} {yes} versus {no}", f"compare the {what} of {yes} and {no} {e}", f"how does the {what} differ between {yes} and {no} {e}", f"{yes} vs {no}: {what}")

    def _two_dims(self, q: Intent) -> str:
        m, (first, second) = q.measures[0], q.dims
        (a, _), (b, _) = self.dim(first), self.dim(second)
        what = self.measure(m, 0.3) if m.op != "count" else self.pick(f"number of {self.rows(q.where)}", f"count of {self.rows(q.where)}", f"how many {self.rows(q.where)}", f"{self.rows(q.where)}")
        scope = self.scope(q.where) if m.op != "count" else ""
        core = self.pick(f"{what} by {a} and {b}{scope}", f"{what} by {a} and {b}{scope}", f"{what} per {a} and {b}{scope}", f"{what} for each {a} and {b}{scope}", f"{what} by {a}, split by {b}{scope}", f"{what} by {a} by {b}{scope}", f"{what} per {a} per {b}{scope}",
                         f"{what} for every combination of {a} and {b}{scope}", f"{what} broken down by {a} and {b}{scope}", f"{what} by {a} x {b}{scope}", f"{what} grouped by {a} then {b}{scope}", f"{what} across {a} and {b}{scope}", f"{what} by {a}, {b}{scope}")  # fmt: skip
        if core.startswith("how many"):
            return core
        return self.frame(core) if self.rng.random() < 0.6 else core

    def _time(self, q: Intent) -> str:
        rng, m, d = self.rng, q.measures[0], q.dims[0]
        one, _, adverb, adjective = UNIT[d.unit]
        what = self.measure(m, 0.35) if m.op != "count" else self.pick(f"number of {self.rows(q.where)}", f"number of {self.rows(q.where)}", f"count of {self.rows(q.where)}", f"{self.rows(q.where)}")
        scope = self.scope(q.where) if m.op != "count" else ""
        roll = rng.random()
        plain = self.p.unnamed_time(d.column)
        if plain and d.unit in ("month", "") and roll < 0.3:
            return self.pick(f"{what} over time{scope}", f"trend of {what} over time{scope}", f"how did the {what} change over time{scope}", f"how has the {what} developed over time{scope}", f"show the trend of {what}{scope}", f"{what} trend{scope}", f"evolution of {what}{scope}", f"development of {what} over time{scope}",
                             f"how does the {what} evolve over time{scope}", f"plot {what} over time{scope}")  # fmt: skip
        if plain and adjective and roll < 0.55 and d.unit != "":
            return self.frame(self.pick(f"{adjective} {what}{scope}", f"{what}, {adverb}{scope}", f"{adverb} trend of {what}{scope}", f"{adverb} {what}{scope}"))
        if m.op == "count" and self.columns[d.column].spec.verb and roll < 0.75 and d.unit != "weekday":
            verb = rng.choice(self.columns[d.column].spec.verb)
            unit = one or "year"
            if verb.split()[-1] not in ("on", "since", "in", "for", "at"):
                were = f"were {verb}" if verb in WHEN_WAS else verb
                return self.pick(f"how many {self.rows(q.where)} {were} each {unit}", f"how many {self.rows(q.where)} {were} per {unit}", f"number of {self.rows(q.where)} {verb} per {unit}", f"number of {self.rows(q.where)} {verb} each {unit}", f"{self.rows(q.where)} {verb} by {unit}")
        singular, plurals = self.dim(d)
        by = self.pick("by {d}", "per {d}", "by {d}", "per {d}", "for each {d}", "each {d}" if plain and d.unit else "for every {d}", "in each {d}", "over the {ds}", "grouped by {d}", "{d} by {d}" if plain and d.unit in ("year", "month") else "by {d}", "by {d}").format(d=singular, ds=plurals)
        core = f"{what} {by}{scope}"
        if m.op == "count" and rng.random() < 0.4:
            return f"how many {self.rows(q.where)} {by}"
        return self.frame(core)

    def _time_best(self, q: Intent) -> str:
        rng, m, d, up = self.rng, q.measures[0], q.dims[0], q.sort == "desc"
        one, _ = self.dim(d)
        if m.op == "count":
            verbs = [v for v in self.columns[d.column].spec.verb if v.split()[-1] not in ("on", "since", "in", "for", "at")]
            most = "the most" if up else "the fewest"
            unit = {"": "year"}.get(d.unit, d.unit)
            if verbs and rng.random() < 0.5:
                verb = rng.choice(verbs)
                were = f"were {verb}" if verb in WHEN_WAS else verb
                return self.pick(f"in which {unit} {were.split()[0] if were.startswith('were') else 'did'} {most} {self.rows(q.where)} {verb}" if were.startswith("were") else f"which {unit} had {most} {self.rows(q.where)} {verb}", f"which {unit} had {most} {self.rows(q.where)} {verb}", f"{unit} with {most} {self.rows(q.where)} {verb}")
            return self.pick(f"which {one} had {most} {self.rows(q.where)}", f"what {one} had {most} {self.rows(q.where)}", f"{one} with {most} {self.rows(q.where)}", f"in which {one} were there {most} {self.rows(q.where)}", f"which {one} has {most} {self.rows(q.where)}", f"find the {one} with {most} {self.rows(q.where)}")
        most, scope = self.pick(*(MOST if up else LEAST)), self.scope(q.where)
        what = self.measure(m, 0.35 if m.op == "sum" else 0.0)
        return self.pick(f"which {one} had the {most} {what}{scope}", f"in which {one} was the {what} {'highest' if up else 'lowest'}{scope}", f"{one} with the {most} {what}{scope}", f"what {one} had the {most} {what}{scope}", f"which {one} has the {most} {what}{scope}", f"{'best' if up else 'worst'} {one} for {what}{scope}")
