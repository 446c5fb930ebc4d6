"""Sentences that ask for rows, for a row's attribute, or for the values of a column."""

# ruff: noqa: E501 - a line holds the variants of one sentence
# fmt: off

from __future__ import annotations

from collections.abc import Sequence

from upwell.nano.generate.asked import Intent
from upwell.nano.generate.names import Unsayable
from upwell.nano.generate.phrases import singular
from upwell.nano.generate.sentences import (
    ACTIVE,
    AGENTS,
    EARLY,
    LATE,
    LEAST,
    LIST_FRAMES,
    MOST,
    PLACES,
    WHEN_WAS,
    Sentences,
)


class RowSentences(Sentences):
    def _extreme(self, q: Intent, many: bool) -> tuple[str, str]:
        """How to say the extreme: ("adj", "oldest") before the noun, ("with", "highest age"), or
        ("is", "cheapest to rent")."""
        rng, up = self.rng, q.sort == "desc"
        assert q.sort_column is not None
        column = self.columns[q.sort_column]
        own = column.hi if up else column.lo
        if own and rng.random() < 0.5:
            word = rng.choice(own)
            parts = word.split()
            if " to " in word or " in" in word or " for" in word:
                return "is", word
            if len(parts) > 1 and parts[0] not in ("most", "least", "best", "worst") and parts[0].endswith("est") and not parts[1].endswith(("ing", "ed", "en", "st", "id", "lt", "ld")):
                return "with", word
            if parts[0] in ("fewest", "most") and len(parts) == 2 and parts[1].endswith("s"):
                return "with", word
            return "adj", word
        if column.kind in ("date", "year") and self.p.unnamed_time(q.sort_column) and rng.random() < 0.5:
            return "adj", self.pick("latest", "latest", "most recent", "newest", "last") if up else self.pick("earliest", "oldest", "first", "earliest")
        name = self.p.column(q.sort_column)
        if column.kind in ("date", "year"):
            return "with", f"{self.pick(*(LATE[:4] if up else EARLY[:3]))} {name}"
        if column.spec.additive and rng.random() < 0.35:
            few = "fewest" if column.spec.integer and name.endswith("s") else "least"
            return "with", f"{'most' if up else few} {name}"
        return "with", f"{self.pick(*(MOST if up else LEAST))} {name}"

    def _doing_most(self, q: Intent) -> str | None:
        """A predicate such as "earns the most", from "earn more than"."""
        spec = self.columns[q.sort_column or 0].spec
        verbs = [v.split() for v in (spec.more if q.sort == "desc" else spec.less)]
        end = ("more", "than") if q.sort == "desc" else ("less", "than")
        fit = [v[0] for v in verbs if len(v) == 3 and tuple(v[1:]) == end and v[0] not in
               ("have", "worth", "is", "are", "with", "contain", "hold") and not v[0].endswith(("ing", "ed"))]
        if not fit:
            return None
        return f"{singular(self.rng.choice(fit))} the {'most' if q.sort == 'desc' else 'least'}"

    def _superlative_attribute(self, q: Intent) -> str:
        index = q.show[0]
        how, what = self._extreme(q, False)
        rows = self.rows(q.where, many=False)
        if how == "is":
            raise Unsayable(what)
        if how == "adj":
            best = f"the {what} {rows}"
        else:
            best = f"the {rows} with the {what}"
        column, c = self.columns[index], self.p.column(index)
        if column.kind == "flag":
            raise Unsayable("flag")
        if how == "adj" and self.rng.random() < 0.2:
            return self.pick(f"{what} {rows}'s {c}", f"what is the {what} {rows}'s {c}", f"{c} {what} {rows}")
        asked = self._by_pronoun(index, best)
        if asked and self.rng.random() < 0.4:
            return asked
        return self.pick(f"what is the {c} of {best}", f"what's the {c} of {best}", f"{c} of {best}", f"what {c} does {best} have", f"which {c} does {best} have", f"show the {c} of {best}", f"give me the {c} of {best}", f"tell me the {c} for {best}", f"find the {c} of {best}")

    def _by_pronoun(self, index: int, name: str) -> str | None:
        """An attribute asked in its own words: "how much do they earn" -> "how much does Al earn"."""
        spec, options = self.columns[index].spec, []
        for ask in spec.ask:
            text = f" {ask} "
            if text.count(" they ") + text.count(" it ") != 1 or not self.columns[index].say:
                continue
            for many, one in ((" do they ", " does they "), (" are they ", " is they "), (" have they ", " has they "), (" were they ", " was they ")):
                text = text.replace(many, one)
            options.append(text.replace(" they ", f" {name} ").replace(" it ", f" {name} ").strip())
        prepositions = [x for x in spec.prepositions if len(x.split()) == 1 and x in ("in", "from", "on", "at", "by")]
        if spec.kind == "cat" and prepositions:
            c = self.p.column(index, raw=False)
            options += [f"which {c} is {name} {self.rng.choice(prepositions)}", f"what {c} is {name} {self.rng.choice(prepositions)}"]
        return self.rng.choice(options) if options else None

    def _superlative(self, q: Intent) -> str:
        rng = self.rng
        doing = self._doing_most(q)
        if doing and rng.random() < 0.35:
            return self.scoped_which(q, doing)
        how, what = self._extreme(q, False)
        has = self.pick("has the", "has the", "has the", "had the", "shows the", "got the", "with the", "has")
        if how == "with" and rng.random() < 0.12 and self.columns[q.sort_column or 0].spec.verb and self.columns[q.sort_column or 0].kind in ("date", "year"):
            verb = rng.choice(self.columns[q.sort_column or 0].spec.verb)
            if verb in ("on", "due", "payable") or verb.endswith("since"):
                raise Unsayable(verb)
            was = f"was {verb}" if verb.endswith("ed") or verb in ("built", "born", "made", "sent", "sold", "bought", "seen") else verb
            end = self.pick("last", "most recently", "latest") if q.sort == "desc" else self.pick("first", "earliest")
            return self.scoped_which(q, f"{was} {end}")
        if how == "with" and rng.random() < 0.5:
            return self.scoped_which(q, f"{has} {what}")
        if how == "is" or (how == "adj" and rng.random() < 0.25):
            return self.scoped_which(q, f"is {self.pick('the', 'the', '')} {what}")
        rows = self.rows(q.where, many=False)
        of_many = self.rows(q.where) if q.where and rng.random() < 0.3 else ""
        if how == "adj":
            if of_many:
                return self.pick(f"which of the {of_many} is the {what}", f"{what} of the {of_many}", f"the {what} among {of_many}", f"among {of_many}, which is the {what}")
            who = "who" if self.p.person else "what"
            return self.pick(f"{who} is the {what} {rows}", f"which is the {what} {rows}", f"{what} {rows}", f"{what} {rows}", f"show the {what} {rows}", f"find the {what} {rows}", f"the {what} {rows}",
                             f"what is the {what} {rows}", f"name the {what} {rows}", f"give me the {what} {rows}", f"tell me the {what} {rows}", f"name of the {what} {rows}",
                             f"what is the name of the {what} {rows}", f"{who}'s the {what} {rows}", f"which {rows} is {what}", f"get the {what} {rows}")  # fmt: skip
        if of_many:
            return self.pick(f"which of the {of_many} has the {what}", f"among the {of_many}, which has the {what}", f"{of_many}: who has the {what}" if self.p.person else f"{of_many}: which has the {what}",
                             f"which one of the {of_many} has the {what}", f"among {of_many}, which one has the {what}")  # fmt: skip
        return self.pick(f"{rows} with the {what}", f"{rows} with {what}", f"show the {rows} with the {what}", f"find the {rows} with the {what}", f"give me the {rows} with the {what}", f"name of the {rows} with the {what}",
                         f"name the {rows} with the {what}", f"what is the name of the {rows} with the {what}", f"which is the {rows} with the {what}", f"tell me which {rows} has the {what}",
                         f"{'who' if self.p.person else 'what'} is the {rows} with the {what}", f"the {rows} having the {what}", f"get {rows} with the {what}", f"i'd like to know which {rows} has the {what}")  # fmt: skip

    def scoped_which(self, q: Intent, predicate: str) -> str:
        if not q.where and self.p.person and self.rng.random() < 0.45:
            return f"who {predicate}"
        if q.where and self.rng.random() < 0.2:
            return self.fronted(f"{self.pick('which one', 'which', 'who' if self.p.person else 'which')} {predicate}", q.where)
        which = self.pick("which", "which", "which", "what", "tell me which", "find out which")
        return f"{which} {self.rows(q.where, many=False)} {predicate}"

    def _top_rows(self, q: Intent) -> str:
        rng, up = self.rng, q.sort == "desc"
        n = self.p._digits(q.top)
        how, what = self._extreme(q, True)
        rows = self.rows(q.where)
        column = self.columns[q.sort_column or 0]
        if len(q.show) > 1:
            rows, name = self.rows(q.where), self.p.column(q.sort_column or 0)
            if column.kind != "num":
                raise Unsayable("date")
            return self._with_columns(f"{self.pick('', 'show the ', 'list the ', 'give me the ')}{'top' if up else 'bottom'} {n} {rows} by {name}", q.show[1:])
        if how == "adj":
            return self.pick(f"the {n} {what} {rows}", f"{n} {what} {rows}", f"what are the {n} {what} {rows}", f"list the {n} {what} {rows}", f"show me the {n} {what} {rows}", f"which {n} {rows} are the {what}",
                             f"give me the {n} {what} {rows}", f"top {n} {what} {rows}", f"which are the {n} {what} {rows}", f"find the {n} {what} {rows}", f"names of the {n} {what} {rows}",
                             f"who are the {n} {what} {rows}" if self.p.person else f"{n} {what} {rows} please")  # fmt: skip
        if how == "is":
            return self.pick(f"which {n} {rows} are the {what}", f"{n} {rows} that are the {what}")
        if rng.random() < 0.55 and column.kind == "num":
            name = self.p.column(q.sort_column or 0)
            top = "top" if up else self.pick("bottom", "bottom", "lowest")
            by = self.pick("by", "by", "by", "by", "in terms of", "ranked by", "in", "according to", "based on", "for", "on", "with respect to")
            if rng.random() < 0.1:
                return f"{top} {n} {rows} {name}"
            return self.pick(f"{top} {n} {rows} {by} {name}", f"{top} {n} {rows} {by} {name}", f"show the {top} {n} {rows} {by} {name}", f"what are the {top} {n} {rows} {by} {name}", f"list the {top} {n} {rows} {by} {name}",
                             f"give me the {top} {n} {rows} {by} {name}", f"which {rows} are the {top} {n} {by} {name}", f"who are the {top} {n} {rows} {by} {name}" if self.p.person else f"which are the {top} {n} {rows} {by} {name}",
                             f"i want the {top} {n} {rows} {by} {name}", f"{by if by != 'for' else 'by'} {name}, what are the {top} {n} {rows}")  # fmt: skip
        return self.pick(f"{n} {rows} with the {what}", f"which {n} {rows} have the {what}", f"show the {n} {rows} with the {what}", f"list the {n} {rows} with the {what}", f"find {n} {rows} with the {what}",
                         f"the {n} {rows} with the {what}", f"top {n} {rows} with the {what}" if up else f"the {n} {rows} that have the {what}", f"name the {n} {rows} with the {what}",
                         f"give me the {n} {rows} having the {what}", f"what {n} {rows} have the {what}")  # fmt: skip

    def _attribute(self, q: Intent) -> str:
        rng = self.rng
        name = self.p.cased(str(q.where[0].args[0]))
        if q.where[0].op == "contains" and not self.p.is_part(q.where[0]):
            raise Unsayable("part")
        key = self.columns[q.where[0].column]
        v = f"\ue000{name}"
        if rng.random() < 0.18 and not (self.p.person or key.spec.pool in ("city", "country", "person")):
            v = f"\ue000{self.pick('the ', '')}{self.p.entity(False)} {name}"
        if len(q.show) > 1:
            texts = [self.p.column(c, raw=False) for c in q.show]
            cols = f"{', '.join(texts[:-1])} and {texts[-1]}"
            return self.pick(f"what are the {cols} of {v}", f"{cols} of {v}", f"{v} {cols}", f"show the {cols} of {v}", f"give me the {cols} for {v}", f"{v}'s {cols}", f"{cols} for {v}",
                             f"show me {v}'s {cols}", f"i need the {cols} of {v}", f"what {cols} does {v} have", f"for {v}, show {cols}")  # fmt: skip
        index = q.show[0]
        column = self.columns[index]
        if column.kind in ("date", "year") and column.spec.verb and rng.random() < 0.5:
            verb = rng.choice(column.spec.verb)
            if verb in WHEN_WAS:
                return self.pick(f"when was {v} {verb}", f"when was {v} {verb}", f"in which year was {v} {verb}" if column.kind == "year" else f"on what date was {v} {verb}", f"tell me when {v} was {verb}")
        if column.kind == "flag":
            way = rng.choice(column.spec.yes or ("",))
            if not way or way.split()[0] in ("with", "without", "having", "that", "where", "has", "is", "used") or (way.endswith("s") and way[-2:] not in ("ss", "us")):
                raise Unsayable(way)
            return self.pick(f"is {v} {way}", f"was {v} {way}" if way.endswith("ed") else f"is {v} {way}", f"is {v} {way} or not", f"tell me whether {v} is {way}")
        if column.kind == "num" and rng.random() < 0.08:
            c = self.p.column(index, raw=False)
            many = c.endswith("s") and column.spec.integer
            return f"how {'many' if many else 'much'} {c} does {v} have" if many or column.spec.additive else f"how high is the {c} of {v}"
        asked = self._by_pronoun(index, v) or self._by_wh(index, v)
        if asked and rng.random() < 0.4:
            return asked
        c = self.p.column(index)
        return self.pick(f"what is the {c} of {v}", f"what is the {c} of {v}", f"what's the {c} of {v}", f"what is {v}'s {c}", f"what's {v}'s {c}", f"{v}'s {c}", f"{c} of {v}", f"{c} of {v}", f"{c} for {v}", f"{v} {c}", f"{v} {c}",
                         f"tell me the {c} of {v}", f"show the {c} for {v}", f"what {c} does {v} have", f"which {c} does {v} have", f"give me {v}'s {c}", f"find the {c} of {v}", f"what was the {c} of {v}", f"look up the {c} of {v}",
                         f"i need {v}'s {c}", f"can you tell me the {c} of {v}", f"do you know the {c} of {v}", f"what is the {c} for {v}", f"{c}: {v}", f"what {c} has {v}", f"how about the {c} of {v}")  # fmt: skip

    def _by_wh(self, index: int, name: str) -> str | None:
        """"who is the owner of", "where is", "when did ... join"."""
        column = self.columns[index]
        if column.opaque:
            return None
        says = set(column.spec.say)
        active = [v for v in column.spec.verb if v in ACTIVE]
        if column.kind in ("date", "year") and active:
            when = self.pick("when", "when", "in which year", "what year") if column.kind == "year" else "when"
            return f"{when} did {name} {ACTIVE[self.rng.choice(active)]}"
        if column.kind == "cat" and says & AGENTS and column.say:
            c = self.p.column(index, raw=False)
            return self.pick(f"who is the {c} of {name}", f"who is {name}'s {c}", f"who's the {c} of {name}", f"who was the {c} of {name}")
        left = any(set(c.say) & PLACES for c in self.p.table.left_out)
        if says & PLACES and not left and sum(bool(set(c.spec.say) & PLACES) for c in self.columns) == 1:
            if self.p.person:
                return f"where is {name} from"
            return self.pick(f"where is {name}", f"where is {name} located", f"where can i find {name}")
        return None

    def _with_columns(self, rows: str, extra: Sequence[int]) -> str:
        names = [self.p.column(c, raw=False) for c in extra]
        cols = " and ".join(names)
        their = self.pick("their", "their", "the", "")
        return self.pick(f"{rows} with {their} {cols}", f"{rows} and their {cols}", f"{rows} along with their {cols}", f"{rows} together with the {cols}", f"{rows}, including {cols}", f"{rows} plus their {cols}",
                         f"{rows} and show {their} {cols}")  # fmt: skip

    def _order(self, q: Intent) -> str:
        """How the rows are sorted: "sorted by age, descending"."""
        rng, up = self.rng, q.sort == "asc"
        assert q.sort_column is not None
        column, name = self.columns[q.sort_column], self.p.column(q.sort_column)
        by = self.pick("sorted by", "sorted by", "ordered by", "order by", "sort by", "by", "ranked by", "arranged by", "sorted on")
        if column.kind in ("date", "year"):
            end = self.pick("oldest first", "earliest first", "ascending", "from earliest to latest") if up else self.pick("newest first", "latest first", "descending", "most recent first", "from newest to oldest")
        elif up:
            end = self.pick("ascending", "in ascending order", "lowest first", "from low to high", "from lowest to highest", "asc", "smallest first", "increasing")
        else:
            end = self.pick("descending", "in descending order", "highest first", "from high to low", "from highest to lowest", "desc", "largest first", "decreasing")
        if rng.random() < 0.12 and column.kind == "num":
            way = self.pick("ascending", "increasing") if up else self.pick("descending", "decreasing")
            return self.pick(f"in {way} order of {name}", f"by {way} {name}", f"order by {name} {'asc' if up else 'desc'}")
        if up and by not in ("ranked by", "by") and rng.random() < 0.45:
            return f"{by} {name}"
        if not up and by == "ranked by" and rng.random() < 0.5:
            return f"{by} {name}"
        return f"{by} {name}{self.pick('', ',', '')} {end}"

    def _filter(self, q: Intent) -> str:
        rng = self.rng
        extra = q.show[1:]
        if not extra and not q.sort and rng.random() < 0.3:
            _, text = self.p.condition(q.where[-1], len(q.where) - 1, ("pred",))
            rows = self.rows(q.where[:-1])
            if self.p.person and len(q.where) == 1 and rng.random() < 0.25:
                return f"{self.pick('who', 'who', 'who', 'everyone who', 'anyone who')} {singular(text)}" if rng.random() < 0.7 else f"{self.pick('who are those who', 'names of those who', 'people who')} {text}"
            return f"{self.pick('which', 'which', 'which', 'what', 'tell me which', 'show me which')} {rows} {text}"
        rows = self.rows(q.where)
        if extra:
            rows = self._with_columns(rows, extra)
        if q.sort:
            rows = f"{rows}{self.pick('', ',')} {self._order(q)}"
        frames = [f for f in LIST_FRAMES if self.p.person or not f.startswith("who")]
        if extra or q.sort:
            frames = [f for f in frames if not f.startswith(("which", "are there", "do we"))]
        return rng.choice(frames).format(x=rows)

    def _filter_columns(self, q: Intent) -> str:
        names = [self.p.columns(c) if len(q.show) == 1 and self.rng.random() < 0.4 else self.p.column(c, raw=False) for c in q.show]
        cols = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        of = self.pick("of", "of", "for", "of all", "of the", "for all", "for the")
        if len(q.show) == 1 and self.columns[q.show[0]].kind in ("cat", "year", "date") and self.rng.random() < 0.45:
            return f"{self.pick('', '', 'which ', 'what ', 'list the ', 'show the ', 'list of ', 'give me the ')}{self.p.columns(q.show[0])} {self._when(q)}"
        x = f"{cols} {of} {self.rows(q.where)}"
        return self.pick("{x}", "{x}", "show the {x}", "show me the {x}", "list the {x}", "give me the {x}", "what are the {x}", "show {x}", "get the {x}", "display {x}", "i need the {x}", "list {x}", "please show {x}").format(x=x)

    def _when(self, q: Intent) -> str:
        """Conditions behind a column that isn't the rows' noun: "years when sales were over 5", "in Rome"."""
        loose: list[str] = []
        tests: list[str] = []
        for i, cond in enumerate(q.where):
            place, text = self.p.condition(cond, i, ("prep", "where"))
            (tests if place == "where" else loose).append(text.removeprefix("where "))
        if tests:
            loose.append(f"{self.pick('where', 'where', 'when', 'in which')} {' and '.join(tests)}")
        return " ".join(loose)

    def _show_all(self, q: Intent) -> str:
        e, one = self.p.entity(), self.p.entity(False)
        return self.pick(f"list all {e}", f"show all {e}", f"list the {e}", f"show me every {one}", f"names of all {e}", f"what are the names of the {e}", f"give me a list of the {e}", f"all {e}", f"list {one} names",
                         f"which {e} are in the table", f"show the names of all {e}", f"name all {e}", f"what {e} do we have", f"which {e} are there", f"{one} names")  # fmt: skip

    def _show_sorted(self, q: Intent) -> str:
        extra = q.show[1:]
        e = self.p.entity()
        if q.sort == "desc" and not extra and self.rng.random() < 0.25:
            return f"{self.pick('rank', 'rank the', 'rank all', 'ranking of', 'ranking of all')} {e} by {self.p.column(q.sort_column or 0)}"
        if not extra and self.rng.random() < 0.2:
            name = self.p.column(q.sort_column or 0)
            down = "in descending order" if q.sort == "desc" else self.pick("", "in ascending order")
            return f"{self.pick('sort', 'order', 'sort all', 'arrange the', 'sort the')} {e} by {name} {down}"
        rows = self._with_columns(e, extra) if extra else e
        return self.pick("list all {x}", "show {x}", "list {x}", "{x}", "show me all {x}", "give me the {x}", "all {x}", "display all {x}", "list of {x}").format(x=f"{rows} {self._order(q)}")

    def _list(self, q: Intent) -> str:
        if len(q.listed) == 2:
            a, b = (self.p.column(c, raw=False) for c in q.listed)
            return self.pick(f"list the distinct {a} and {b} pairs", f"all combinations of {a} and {b}", f"which combinations of {a} and {b} exist", f"unique pairs of {a} and {b}", f"distinct {a} and {b}", f"what {a} and {b} combinations are there")
        names, name = self.p.columns(q.listed[0]), self.p.column(q.listed[0], raw=False)
        kind = self.pick("different", "different", "unique", "distinct", "", "possible")
        if q.where and q.where[0].column == q.listed[0]:
            text = str(q.where[0].args[0])
            text = self.pick(text, text.lower(), f"'{text}'", f'"{text}"')
            if q.where[0].op == "contains":
                return f"\ue000{self.pick('', 'which ', 'list ', 'all ')}{names} {self.pick('with', 'containing', 'that contain', 'that include')} {text}{self.pick('', ' in the name', ' in their name', ' in it')}"
            way = ("starting with", "that start with", "beginning with") if q.where[0].op == "starts" else ("ending in", "ending with", "that end with")
            return f"\ue000{self.pick('', 'which ', 'list ', 'all ')}{names} {self.pick(*way)} {text}"
        if q.where:
            if self.rng.random() < 0.25:
                return f"which {names} do {self.rows(q.where)} have"
            if self.rng.random() < 0.25:
                try:
                    return f"{self.pick('', '', 'list ', 'show ', 'which ', 'what are the ', 'all ')}{names} {self.loose(q.where)}"
                except Unsayable:
                    pass
            return self.pick(f"which {names} are there {self.pick('among', 'for')} {self.rows(q.where)}", f"list the {kind or 'different'} {names} of {self.rows(q.where)}", f"{kind or 'unique'} {names} of {self.rows(q.where)}", f"what {names} are found among {self.rows(q.where)}",
                             f"{names} of {self.rows(q.where)}", f"which {names} have the {self.rows(q.where)}", f"{names} for {self.rows(q.where)}",
                             f"distinct {names} for {self.rows(q.where)}", f"in which {names} are there {self.rows(q.where)}", f"what are the different {names} among {self.rows(q.where)}", f"which {names} have {self.rows(q.where)}")  # fmt: skip
        return self.pick(f"what are the {kind} {names}", f"what {names} are there", f"which {names} are there", f"list of the {names}", f"list of {names}", f"list the {names}", f"all the {names}", f"show me the {names}", f"list all {kind} {names}", f"list the {kind} {names}", f"show {kind} {names}", f"show all {names}", f"which {kind} {names} do we have", f"{kind or 'distinct'} {names}",
                         f"what {kind} {names} exist", f"what kinds of {name} are there", f"what {name} values are there", f"give me all {kind} {names}", f"which {names} appear in the data", f"all {names}", f"name all the {names}", f"tell me the {kind} {names}",
                         f"what are all the {kind} {names}", f"values of {name}", f"show me a list of the {names}", f"which {names} occur")  # fmt: skip
