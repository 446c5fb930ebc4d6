"""The parts of sentences: rows with conditions, measures, groupings, and the frames around them."""

# ruff: noqa: E501 - a line holds the variants of one sentence
# fmt: off

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from upwell.nano.generate.asked import Cond, Dim, Measure
from upwell.nano.generate.lexicon import plural
from upwell.nano.generate.names import Unsayable
from upwell.nano.generate.phrases import Phrases

FULL = ("adj", "prep", "post", "pred", "whose", "where")

AVG = ("average", "average", "average", "average", "avg", "avg", "mean", "mean", "typical", "avg.")
SUM = ("total", "total", "total", "total", "sum of", "sum of", "overall", "combined", "sum of all", "total amount of", "total sum of")
MAX = ("highest", "highest", "maximum", "max", "max", "largest", "biggest", "greatest", "top", "peak")
MIN = ("lowest", "lowest", "minimum", "min", "min", "smallest")
LATE = ("latest", "latest", "most recent", "last", "newest", "max")
EARLY = ("earliest", "earliest", "first", "oldest", "min")
MOST = ("highest", "highest", "largest", "greatest", "biggest", "maximum", "max")
LEAST = ("lowest", "lowest", "smallest", "minimum", "least", "min")

NOUN_FRAMES = (
    "what is the {x}", "what is the {x}", "what is the {x}", "what's the {x}", "what's the {x}", "whats the {x}", "what was the {x}", "{x}", "{x}",
    "{x}", "{x}", "{x}", "show me the {x}", "show the {x}", "show {x}", "give me the {x}", "give me {x}",
    "find the {x}", "tell me the {x}", "i need the {x}", "calculate the {x}", "compute {x}", "get {x}",
    "can you give me the {x}", "could you tell me what the {x} is", "please show the {x}", "display the {x}",
    "i'd like to see the {x}", "i want to know the {x}", "report the {x}", "what would the {x} be",
    "do you know the {x}", "please give me the {x}", "the {x}", "can i see the {x}", "return the {x}", "what is our {x}",
    "find out the {x}", "work out the {x}", "determine the {x}", "pull the {x}", "let me see the {x}",
)  # fmt: skip
LIST_FRAMES = (
    "list {x}", "list {x}", "list all {x}", "list the {x}", "show {x}", "show me {x}", "show me all {x}", "show all {x}", "give me {x}",
    "give me all {x}", "give me a list of {x}", "give me the list of all {x}", "find {x}", "find all {x}",
    "get all {x}", "which {x} are there", "{x}", "{x}", "all {x}", "what are the {x}", "display {x}", "i need {x}", "i need a list of {x}",
    "i want to see all {x}", "are there any {x}", "do we have {x}", "name the {x}", "name all {x}", "can you list the {x}", "could you show me the {x}",
    "please list {x}", "pull up {x}", "i'd like a list of {x}", "let me see {x}", "names of {x}", "names of all {x}", "what are the names of {x}",
    "give me the names of the {x}", "who are the {x}", "look up {x}",
)  # fmt: skip
BY = ("by {d}", "by {d}", "by {d}", "by {d}", "by {d}", "per {d}", "per {d}", "per {d}", "for each {d}", "for each {d}", "in each {d}", "for every {d}",
       "across {ds}", "broken down by {d}", "grouped by {d}", "split by {d}", "across the different {ds}", "for the different {ds}", "of each {d}",
       "for all {ds}", "within each {d}", "according to {d}", "depending on {d}", "group by {d}", "in every {d}")  # fmt: skip
UNIT = {"year": ("year", "years", "yearly", "annual"), "month": ("month", "months", "monthly", "monthly"),
         "quarter": ("quarter", "quarters", "quarterly", "quarterly"),
         "weekday": ("weekday", "weekdays", "", ""), "": ("", "", "", "")}  # fmt: skip


ACTIVE = {
    "joined": "join", "started": "start", "opened": "open", "launched": "launch", "ended": "end", "finished": "finish", "began": "begin", "signed up": "sign up",
    "came out": "come out", "left": "leave", "died": "die", "graduated": "graduate", "expired": "expire", "closed": "close", "formed": "form", "arrived": "arrive",
    "enrolled": "enroll", "retired": "retire", "debuted": "debut", "moved in": "move in", "came in": "come in", "subscribed": "subscribe", "departed": "depart",
}
AGENTS = frozenset("""owner manager author doctor director driver teacher instructor coach trainer seller supervisor boss handler operator photographer artist engineer
    technician publisher manufacturer maker sponsor supplier vendor vet lawyer judge captain pilot architect rep agent recruiter reviewer analyst composer designer examiner
    inspector salesperson nurse investor""".split())
PLACES = frozenset("city country location place site town".split())
WHEN_WAS = frozenset(
    """hired born built founded released opened created signed ordered shipped purchased sold
    registered launched published established delivered admitted recorded installed made issued
    closed completed discharged manufactured bought planted placed received paid inspected
    constructed finished filed reported deployed updated produced listed enrolled erected
    inaugurated conquered discovered invented planted checked surveyed visited treated dispatched
    billed reviewed serviced repaired performed tested booked written recorded observed collected
    measured harvested approved broadcast aired added logged""".split()
)


_FUNCTIONS = {"avg": ("average", "mean", "avg"), "sum": ("sum", "total"), "min": ("minimum", "min"), "max": ("maximum", "max"), "median": ("median",)}


_RATES = dict(pair.split("-") for pair in """churned-churn returned-return cancelled-cancellation canceled-cancellation defaulted-default passed-pass failed-failure
    completed-completion approved-approval rejected-rejection renewed-renewal survived-survival died-death attended-attendance won-win lost-loss opened-open clicked-click
    converted-conversion delayed-delay insured-insurance vaccinated-vaccination infected-infection employed-employment graduated-graduation recovered-recovery
    hospitalised-hospitalisation hospitalized-hospitalization refunded-refund retired-retirement automated-automation certified-certification successful-success
    smokers-smoking resolved-resolution reopened-reopening fraudulent-fraud fraud-fraud readmitted-readmission adopted-adoption promoted-promotion""".split())


class Sentences:
    """Sentences for the intents of one table; conditions are marked (`phrases.order_of_mention`)."""

    def __init__(self, phrases: Phrases, rng: Random) -> None:
        self.p = phrases
        self.rng = rng
        self.columns = phrases.table.columns

    # -- parts ------------------------------------------------------------------------------

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def frame(self, text: str) -> str:
        return self.pick(*NOUN_FRAMES).format(x=text)

    def rows(self, where: Sequence[Cond], many: bool = True, first: int = 0, noun: str = "") -> str:
        """The rows' noun with its conditions around it: "female staff in Sales who earn over 9"."""
        rng = self.rng
        terse = many and rng.random() < 0.12
        before: list[str] = []
        preps: list[str] = []
        posts: list[str] = []
        clauses: list[str] = []
        tests: list[str] = []
        head = noun
        for offset, cond in enumerate(where):
            places: tuple[str, ...] = FULL + (("head",) if not head and many else ())
            if terse:
                places = ("adj", "terse", "post", "prep")
            if not many:
                places = ("adj", "prep", "post", "whose")
            if len(before) >= 2 or noun:
                places = tuple(p for p in places if p not in ("adj", "head"))
            place, text = self.p.condition(cond, first + offset, places)
            if place == "head":
                head = text
            elif place == "adj":
                before.append(text)
            elif place == "prep":
                preps.append(text)
            elif place in ("post", "terse"):
                posts.append(text)
            elif place == "where":
                tests.append(text)
            elif place == "whose":
                clauses.append(text)
            else:
                clauses.append(f"{self.p.who()} {text}")
        head = head or self.p.entity(many)
        rng.shuffle(preps)
        tail = preps + posts
        joined = " and ".join(clauses)
        if len(tests) > 1:
            joined_tests = " and ".join([tests[0], *(t.replace("where ", "", 1) for t in tests[1:])])
        else:
            joined_tests = "".join(tests)
        return " ".join(x for x in (*before, head, *tail, joined, joined_tests) if x)

    def loose(self, where: Sequence[Cond], first: int = 0) -> str:
        """Conditions that need no noun: "in Paris in 2019"."""
        texts = [self.p.condition(c, first + i, ("prep",))[1] for i, c in enumerate(where)]
        self.rng.shuffle(texts)
        return " ".join(texts)

    def scoped(self, what: str, where: Sequence[Cond], entity_chance: float = 0.35) -> str:
        """A measure and the rows it is taken over: "average age of women", "in Rome, average age"."""
        rng = self.rng
        link = self.pick("of", "of", "for", "for", "among", "across", "of all", "for all", "of the", "for the")
        if not where:
            return f"{what} {link} {self.p.entity()}" if rng.random() < entity_chance else what
        roll = rng.random()
        if roll < 0.3:
            try:
                return f"{what} {self.loose(where)}"
            except Unsayable:
                pass
        if roll < 0.38 and len(where) == 1:
            try:
                place, text = self.p.condition(where[0], 0, ("terse", "terse", "adj"))
                return f"{text} {what}" if place == "adj" else f"{what} {text}"
            except Unsayable:
                pass
        if roll < 0.48:
            tests = [self.p.condition(c, i, ("where",))[1] for i, c in enumerate(where)]
            return f"{what} " + " and ".join([tests[0], *(t.replace("where ", "", 1) for t in tests[1:])])
        return f"{what} {link} {self.rows(where)}"

    def fronted(self, question: str, where: Sequence[Cond]) -> str:
        """The conditions put before the question."""
        if self.rng.random() < 0.35:
            try:
                return f"{self.loose(where)}, {question}"
            except Unsayable:
                pass
        start = self.pick("for", "for", "among", "among the", "considering only", "looking at", "out of the", "of the", "only for")
        return f"{start} {self.rows(where)}, {question}"

    def measure(self, m: Measure, bare: float = 0.2) -> str:
        """A noun phrase of an aggregate, without article; `bare` the chance of no word for it."""
        rng = self.rng
        if m.op == "count":
            return self.pick("number of", "number of", "count of", "total number of", "# of", "no. of") + " " + self.p.entity()
        assert m.column is not None
        column = self.columns[m.column]
        name = self.p.column(m.column)
        if m.op == "distinct":
            kind = self.pick("number of different", "number of distinct", "number of unique", "count of distinct", "distinct count of", "count of unique")
            return f"{kind} {self.p.columns(m.column)}"
        if m.op in _FUNCTIONS and rng.random() < 0.16:
            op = self.pick(*_FUNCTIONS[m.op])
            if column.kind == "num" and rng.random() < 0.12 and " " not in column.header:
                return f"{op.split()[0]}({column.header})"
            return self.pick(f"{op} of {name}", f"{op} of the {name}", f"{op} value of {name}", f"{name} {op}", f"{op} of all {plural(name)}" if m.op in ("avg", "median") and not column.opaque else f"{op} {name}")
        if m.op == "avg":
            if not column.spec.additive and rng.random() < bare:
                return name
            return f"{name} on average" if rng.random() < 0.07 else f"{self.pick(*AVG)} {name}"
        if m.op == "median":
            return f"{self.pick('median', 'median', 'median', 'middle')} {name}"
        if m.op == "sum":
            if rng.random() < bare:
                return name
            return f"{name} in total" if rng.random() < 0.06 else f"{self.pick(*SUM)} {name}"
        if column.kind in ("date", "year"):
            return f"{self.pick(*(LATE if m.op == 'max' else EARLY))} {name}"
        own = [w for w in (column.hi if m.op == "max" else column.lo) if w.endswith("est") and " " not in w]
        if own and rng.random() < 0.07:
            return f"{rng.choice(own)} {name}"
        if rng.random() < 0.03:
            return f"{self.pick('upper end', 'upper limit') if m.op == 'max' else self.pick('lower end', 'lower limit')} of {name}"
        return f"{self.pick(*(MAX if m.op == 'max' else MIN))} {name}"

    def dim(self, d: Dim) -> tuple[str, str]:
        """Singular and plural noun of a grouping."""
        column = self.columns[d.column]
        if d.unit:
            one, many, _, _ = UNIT[d.unit]
            if d.unit == "weekday":
                one, many = self.rng.choice((("weekday", "weekdays"), ("day of the week", "days of the week"), ("day of week", "days of the week")))
            if self.p.unnamed_time(d.column) and self.rng.random() < 0.75:
                return one, many
            name = self.p.column(d.column)
            name = name.removesuffix(" date").removesuffix("_date") if self.rng.random() < 0.3 else name
            return self.rng.choice(((f"{one} of {name}", f"{many} of {name}"), (f"{name} {one}", f"{name} {many}")))
        if column.kind == "year" and self.p.unnamed_time(d.column) and self.rng.random() < 0.45:
            return "year", "years"
        if column.kind == "flag" and column.spec.yes and self.rng.random() < 0.25:
            return f"{column.spec.yes[0]} or not", f"{column.spec.yes[0]} or not"
        name = self.p.column(d.column) if column.say or column.opaque else self.flag_noun(d.column)
        return name, name if column.opaque else plural(name)

    def rate_noun(self, cond: Cond) -> str | None:
        """The name of a flag's share: "churn rate"; None where "rate" could be a column."""
        column = self.columns[cond.column]
        if cond.op not in ("yes", "no") or not self.p.own("rate", cond.column) or column.opaque:
            return None
        for way in column.spec.yes if cond.op == "yes" else column.spec.no:
            last = way.split()[-1]
            if last in _RATES:
                return f"{_RATES[last]} rate"
        ways = [w for w in (column.spec.yes if cond.op == "yes" else column.spec.no) if len(w.split()) == 1]
        return f"rate of {self.rng.choice(ways)} {self.p.entity()}" if ways and not ways[0].endswith("s") else None

    def flag_noun(self, index: int) -> str:
        header = self.columns[index].header_words
        if not self.p.own(header, index):
            raise Unsayable("flag")
        return header

    def by(self, d: Dim) -> str:
        one, many = self.dim(d)
        flag = self.columns[d.column].kind == "flag"
        if flag:
            return self.pick("by {d}", "by {d}", "split by {d}", "grouped by {d}").format(d=one)
        return self.pick(*BY).format(d=one, ds=many)

    def scope(self, where: Sequence[Cond]) -> str:
        if not where:
            return ""
        if self.rng.random() < 0.4:
            try:
                return " " + self.loose(where)
            except Unsayable:
                pass
        return f" {self.pick('for', 'for', 'among', 'of', 'considering only', 'counting only', 'just for', 'only')} {self.rows(where)}"
