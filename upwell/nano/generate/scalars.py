"""Sentences that ask for one number, or for several of the same rows."""

# ruff: noqa: E501 - a line holds the variants of one sentence
# fmt: off

from __future__ import annotations

from upwell.nano.generate.asked import Intent
from upwell.nano.generate.names import Unsayable
from upwell.nano.generate.sentences import WHEN_WAS, Sentences


class ScalarSentences(Sentences):
    def _count(self, q: Intent) -> str:
        rng, where = self.rng, q.where
        if not where:
            e = self.p.entity()
            return self.pick(f"how many {e} are there", f"how many {e} are there", f"how many {e} do we have", f"number of {e}", f"count the {e}", f"count {e}",
                             f"total number of {e}", f"how many {e}", f"how many {e} in total", f"what is the number of {e}", f"{self.p.entity(False)} count",
                             f"how many {e} are in the table", f"how many {e} does the list have", "how many rows are there", "row count", "number of records",
                             f"how many {e} are listed here", f"# {e}", f"how many {e} altogether", "how many entries are in this table")  # fmt: skip
        roll = rng.random()
        if roll < 0.3 and len(where) <= 2:
            # The last condition as the predicate: "how many women work in Sales".
            _, text = self.p.condition(where[-1], len(where) - 1, ("pred",))
            rows = self.rows(where[:-1])
            return f"{self.pick('how many', 'how many', 'how many', 'how many of the', 'how many of our')} {rows} {text}"
        if roll < 0.36 and len(where) == 1:
            _, text = self.p.condition(where[0], 0, ("prep", "post"))
            return f"how many {self.p.entity()} do we have {text}"
        if roll < 0.42:
            return self.fronted(self.pick("how many are there", "how many do we have", f"how many {self.p.entity()} are there", "what is the count"), where)
        r = self.rows(where)
        return self.pick(f"how many {r} are there", f"how many {r}", f"how many {r}", f"how many {r} do we have", f"number of {r}", f"number of {r}", f"count {r}", f"count of {r}",
                         f"count the {r}", f"what is the number of {r}", f"total number of {r}", f"# of {r}", f"tell me how many {r} there are",
                         f"how many {r} exist", f"i want to know how many {r} there are", f"give me the number of {r}", f"show the number of {r}",
                         f"what's the count of {r}", f"find the number of {r}", f"how many {r} can be found", f"can you count the {r}",
                         f"how many {r} have we got", f"do you know how many {r} there are", f"what number of {r} are there")  # fmt: skip

    def _scalar(self, q: Intent) -> str:
        rng, m = self.rng, q.measures[0]
        assert m.column is not None
        column = self.columns[m.column]
        named = any(c.op == "eq" and self.columns[c.column].kind == "cat" for c in q.where)
        bare = 0.12 if named else 0.0
        if m.op in ("min", "max") and rng.random() < 0.12:
            asked = self._asked_extreme(m.column, m.op == "max", q)
            if asked:
                return asked
        if m.op == "avg" and rng.random() < 0.2 and column.spec.ask and column.say:
            asked = self._asked_average(m.column, q)
            if asked:
                return asked
        if m.op in ("min", "max") and column.kind in ("date", "year") and column.spec.verb and rng.random() < 0.5:
            verb = rng.choice(column.spec.verb)
            if verb in WHEN_WAS:
                when = "when" if column.kind == "date" else self.pick("when", "in which year", "in what year")
                which = self.pick("last", "latest", "most recent", "newest") if m.op == "max" else self.pick("first", "earliest", "oldest")
                return f"{when} was the {which} {self.rows(q.where, many=False)} {verb}"
        if m.op == "sum" and rng.random() < 0.2:
            name = self.p.column(m.column, raw=False)
            quantity = "many" if name.endswith("s") and column.spec.integer else "much"
            end = self.pick("in total", "altogether", "in all", "overall", "in sum")
            start = f"how {quantity} {name}"
            if not q.where:
                return self.pick(f"how {quantity} {name} {end}", f"how {quantity} {name} did we have {end}", f"how {quantity} {name} is there {end}" if quantity == "much" else f"how {quantity} {name} are there {end}",
                                 f"how {quantity} total {name}")  # fmt: skip
            r = self.rows(q.where)
            return self.pick(f"{start} do {r} have {end}", f"{start} {end} for {r}", f"{start} {end} from {r}", f"{start} do all {r} make up together")
        if m.op == "sum" and rng.random() < 0.08:
            return self.scoped(f"{self.pick('add up', 'sum up', 'sum', 'add together', 'total up')} {self.pick('', 'the ', 'all ', 'all the ')}{self.p.column(m.column, raw=False)}", q.where)
        if m.op == "avg" and rng.random() < 0.08:
            name = self.p.column(m.column)
            high = self.pick("high", "large", "big")
            return self.scoped(f"how {high} is the average {name}", q.where) if rng.random() < 0.6 else self.scoped(f"on average, what is the {name}", q.where)
        if m.op in ("min", "max") and rng.random() < 0.05 and column.kind == "num":
            name = self.p.column(m.column)
            way = self.pick("high", "far up") if m.op == "max" else self.pick("low", "far down")
            return self.scoped(f"how {way} does the {name} go", q.where)
        what = self.measure(m, bare)
        if q.where and rng.random() < 0.14:
            return self.fronted(self.frame(what), q.where)
        if q.where and rng.random() < 0.05 and self.p.person and m.op in ("avg", "max", "median"):
            return f"what {what} do {self.rows(q.where)} have"
        return self.frame(self.scoped(what, q.where))

    def _asked_average(self, index: int, q: Intent) -> str | None:
        """"how old are they" -> "how old are the nurses on average"."""
        rows, end = self.rows(q.where), self.pick("on average", "on average", "typically", "in the mean")
        options = []
        for ask in self.columns[index].spec.ask:
            text = f" {ask} "
            for one, many in ((" is it ", " are they "), (" does it ", " do they "), (" has it ", " have they "), (" was it ", " were they "), (" did it ", " did they ")):
                text = text.replace(one, many)
            if text.count(" they ") == 1 and " it " not in text:
                options.append(f"{text.replace(' they ', f' {rows} ').strip()} {end}")
        return self.rng.choice(options) if options else None

    def _asked_extreme(self, index: int, up: bool, q: Intent) -> str | None:
        """"how old are they" and "oldest" -> "how old is the oldest nurse"."""
        column = self.columns[index]
        words = [w for w in (column.hi if up else column.lo) if " " not in w]
        asks = [a.split()[:2] for a in column.spec.ask if len(a.split()) == 4 and a.split()[2] in ("is", "are", "was", "were")]
        if not words or not asks:
            return None
        return f"{' '.join(self.rng.choice(asks))} is the {self.rng.choice(words)} {self.rows(q.where, many=False)}"

    def _share(self, q: Intent) -> str:
        cond = q.measures[0].cond
        assert cond is not None
        n = len(q.where)
        rate = self.rate_noun(cond)
        if rate and self.rng.random() < 0.3:
            return self.frame(self.scoped(rate, q.where))
        of = self.rows(q.where)
        part = self.pick("what percentage of", "what percentage of", "what percent of", "what % of", "what share of", "what proportion of", "what fraction of",
                         "how large a share of", "which percentage of", "how many percent of", "what part of", "% of", "percentage of", "share of", "proportion of")  # fmt: skip
        if self.rng.random() < 0.62:
            return f"{part} {self.pick('', '', '', 'the ', 'all ')}{of} {self.p.condition(cond, n, ('pred',))[1]}"
        if self.rng.random() < 0.35:
            p = self.pick("percentage", "share", "proportion", "fraction", "percent")
            _, text = self.p.condition(cond, n, ("pred",))
            return self.pick(f"{p} of {of} {self.p.who()} {text}", f"what is the {p} of {of} {self.p.who()} {text}", f"how big is the {p} of {of} {self.p.who()} {text}",
                             f"tell me the {p} of {of} {self.p.who()} {text}") if not q.where else f"among {of}, what {p} {text}"  # fmt: skip
        sub = self.rows((cond,), first=n)
        p = self.pick("percentage", "share", "proportion", "percent share", "fraction")
        if q.where:
            return self.pick(f"among {of}, what is the {p} of {sub}", f"{p} of {sub} among {of}", f"of the {of}, what percentage are {sub}", f"within {of}, {p} of {sub}")
        return self.pick(f"{p} of {sub}", f"what is the {p} of {sub}", f"what's the {p} of {sub}", f"{sub} as a percentage of all {self.p.entity()}",
                         f"how big is the {p} of {sub}", f"what % are {sub}", f"give me the {p} of {sub}", f"{sub} in percent of total")  # fmt: skip

    def _share_sum(self, q: Intent) -> str:
        m = q.measures[0]
        assert m.cond is not None and m.column is not None
        name, n = self.p.column(m.column, raw=False), len(q.where)
        scope = ""
        if q.where:
            scope = f" {self.loose(q.where)}"
        total = self.pick(f"total {name}", f"all {name}", f"the total {name}", f"the {name}", f"our {name}", f"overall {name}", name)
        share = self.pick("what percentage of", "what share of", "what percent of", "what % of", "which part of", "how much of", "share of", "what proportion of", "percentage of", "% of")
        if self.rng.random() < 0.4:
            try:
                text = self.p.condition(m.cond, n, ("prep",))[1]
                return self.pick(f"{share} {total}{scope} {self.pick('is', 'comes', 'was made', 'falls')} {text}", f"{share} {total}{scope} {text}")
            except Unsayable:
                pass
        sub = self.rows((m.cond,), first=n)
        return f"{share} {total}{scope} {self.pick('comes from', 'is from', 'is due to', 'belongs to', 'comes from', 'is made up by', 'is accounted for by', 'goes to', 'is contributed by')} {sub}"

    def _distinct(self, q: Intent) -> str:
        m = q.measures[0]
        assert m.column is not None
        names = self.p.columns(m.column)
        kind = self.pick("different", "different", "unique", "distinct", "separate")
        if q.where:
            core = self.pick(f"how many {kind} {names} are there", f"number of {kind} {names}", f"how many {kind} {names} do we have", f"count of {kind} {names}", f"how many {kind} {names}")
            if self.rng.random() < 0.2:
                return self.fronted(core, q.where)
            if self.rng.random() < 0.2:
                return f"how many {kind} {names} do the {self.rows(q.where)} have"
            return f"{core} {self.pick('among', 'for', 'among the', 'for the', 'across')} {self.rows(q.where)}"
        bare = self.columns[m.column].kind == "cat" and self.rng.random() < 0.45
        k = "" if bare else kind
        return self.pick(f"how many {k} {names} are there", f"how many {k} {names} are there", f"how many {k} {names} do we have", f"how many {k} {names} are in the data",
                         f"how many {k} {names} {self.pick('occur', 'are covered', 'are listed', 'appear')}" if bare else f"number of {k} {names}",
                         f"how many {k} {names}", f"number of {k} {names}", f"count the {kind} {names}", f"how many {kind} {names}", f"count {kind} {names}",
                         f"{kind} {names} count", f"what is the number of {kind} {names}", f"how many {kind} {names} appear", f"number of {kind} {names}",
                         f"how many kinds of {self.p.column(m.column)} are there", f"distinct count of {names}")  # fmt: skip

    def _pair(self, q: Intent) -> str:
        ms = q.measures
        names = {m.column for m in ms}
        if len(names) == 1 and None not in names:
            name = self.p.column(ms[0].column or 0)
            word = {"avg": self.pick("average", "mean", "avg"), "max": self.pick("maximum", "max", "highest"), "min": self.pick("minimum", "min", "lowest"), "median": "median"}
            ops = [word[m.op] for m in ms]
            if {m.op for m in ms} == {"min", "max"} and ms[0].op == "min" and self.rng.random() < 0.15:
                return f"range of {name} (min and max)"
            return f"{', '.join(ops[:-1])} and {ops[-1]} {name}"
        if ms[0].op == ms[1].op and self.rng.random() < 0.6:
            word_ = self.pick("total", "total", "sum of") if ms[0].op == "sum" else self.pick("average", "mean", "avg")
            return f"{word_} {self.p.column(ms[0].column or 0)} and {self.p.column(ms[1].column or 0)}"
        return f"{self.measure(ms[0], 0)} and {self.measure(ms[1], 0)}"

    def _multi(self, q: Intent) -> str:
        what = self._pair(q)
        if q.measures[0].op == "count" and q.where:
            return f"{self.pick('', 'what is the ', 'show ', 'give me ')}{self.pick('number', 'count')} of {self.rows(q.where)} and {self.pick('their ', 'the ', '')}{self.measure(q.measures[1], 0)}"
        what = self.scoped(what, q.where, 0.2 if q.measures[0].op != "count" else 0.0)
        return self.frame(what).replace("what is the", self.pick("what is the", "what are the"))

    def _multi_group(self, q: Intent) -> str:
        what, by = self._pair(q), self.by(q.dims[0])
        return self.pick(self.frame(f"{what} {by}"), f"{what} {by}", f"{by}, show the {what}", f"{what} {by}")
