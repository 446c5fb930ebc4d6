"""The stream of training examples: a table, a question about it, and the plan that answers it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from upwell.analyst.grammar import PlanGrammar
from upwell.analyst.linking import link
from upwell.analyst.plan import Plan, plan_tokens
from upwell.analyst.prompt import render_prompt
from upwell.analyst.rules import Draft, choose_columns, draft_plan
from upwell.analyst.schema import TableProfile
from upwell.analyst.slots import LinkedQuestion
from upwell.nano.generate.asked import Intent
from upwell.nano.generate.intents import FORMS, Sampler
from upwell.nano.generate.lexicon import Domain
from upwell.nano.generate.names import Unsayable
from upwell.nano.generate.noise import typed
from upwell.nano.generate.phrases import Phrases, order_of_mention
from upwell.nano.generate.planning import Planner, Unlinked
from upwell.nano.generate.tables import Table, sample_table
from upwell.nano.generate.unanswerable import ambiguous, missing, notdata
from upwell.nano.generate.wording import Wording

QUESTIONS_PER_TABLE = 12
# Ambiguity needs two like columns, which a third of the tables have.
NOANS = {"missing": 0.09, "notdata": 0.05, "ambiguous": 0.18}


@dataclass(frozen=True, slots=True)
class Example:
    """`target` are the plan's tokens, <end> last, under the column order of `prompt`; `kind` the form."""

    order: list[int]
    target: list[str]
    kind: str
    question: str
    table: TableProfile
    plan: Plan
    linked: LinkedQuestion
    draft: Draft
    rows: dict[str, list[object]]  # the table's columns

    @property
    def prompt(self) -> str:
        """What the model reads; ends in <plan>."""
        return render_prompt(self.table, self.linked, self.order, self.draft)


def profile_of(table: Table) -> TableProfile:
    return TableProfile.from_rows(table.name, {c.header: list(c.values) for c in table.columns})


def examples(seed: int, domains: Sequence[Domain], drops: Counter[str] | None = None) -> Iterator[Example]:
    """Endless examples, the same for the same seed. `drops` counts what was thrown away, by cause."""
    rng = Random(seed)
    drops = Counter() if drops is None else drops
    while True:
        table = sample_table(domains, rng)
        profile = profile_of(table)
        usable = frozenset(i for i, c in enumerate(profile.columns) if c.kind.value == table.columns[i].kind)
        phrases = Phrases(table, rng)
        wording = Wording(phrases, rng)
        sampler = Sampler(table, usable, rng)
        if not sampler.num:
            continue
        rows: dict[str, list[object]] = {c.header: list(c.values) for c in table.columns}
        for _ in range(QUESTIONS_PER_TABLE):
            made = _one(wording, sampler, profile, rows, domains, rng, drops)
            if made is not None:
                yield made


def _one(
    wording: Wording,
    sampler: Sampler,
    profile: TableProfile,
    rows: dict[str, list[object]],
    domains: Sequence[Domain],
    rng: Random,
    drops: Counter[str],
) -> Example | None:
    roll = rng.random()
    for reason, part in NOANS.items():
        roll -= part
        if roll < 0:
            made = _unanswerable(reason, wording, profile, rows, domains, rng, drops)
            if made is not None or reason != "ambiguous":
                return made
            break
    said = _say(wording, sampler, rng)
    if said is None:
        return None
    intent, sentence = said
    mentioned, text = order_of_mention(sentence)
    text = text.replace(" ,", ",")
    question = typed(text, rng, _protected(intent, rng))
    linked = link(question, profile)
    try:
        plan = Planner(wording.p.table, linked).plan(intent, mentioned)
    except Unlinked as cause:
        drops[f"unlinked {cause}"] += 1
        return None
    return _finish(intent.form, question, plan, linked, profile, rows, rng, drops)


def _say(wording: Wording, sampler: Sampler, rng: Random) -> tuple[Intent, str] | None:
    """An intent and its sentence; a form that does not fit at once is tried a few more times."""
    for _ in range(8):
        form = rng.choices(list(FORMS), list(FORMS.values()))[0]
        for _ in range(8):
            intent = sampler.intent(form)
            if intent is None:
                continue
            try:
                return intent, wording.sentence(intent)
            except Unsayable:
                continue
    return None


def _protected(intent: Intent, rng: Random) -> frozenset[str]:
    """The words of the values, most times: a typo there is kept only now and then."""
    if rng.random() < 0.3:
        return frozenset()
    conds = [*intent.where, *(m.cond for m in intent.measures if m.cond)]
    return frozenset(w for c in conds for a in c.args for w in str(a).lower().split())


def _unanswerable(
    reason: str,
    wording: Wording,
    profile: TableProfile,
    rows: dict[str, list[object]],
    domains: Sequence[Domain],
    rng: Random,
    drops: Counter[str],
) -> Example | None:
    pair: tuple[int, int] | None = None
    for _ in range(6):
        try:
            if reason == "missing":
                text = missing(wording, domains, rng)
            elif reason == "notdata":
                text = notdata(wording.p, rng)
            else:
                text, pair = ambiguous(wording, rng)
        except Unsayable:
            continue
        break
    else:
        return None
    question = typed(" ".join(text.split()), rng, polite=0.0 if reason == "notdata" else 0.1)
    linked = link(question, profile)
    if reason == "missing" and _answered(text, wording.p.table, linked):
        drops["missing, but linked"] += 1
        return None
    plan = Plan("noans", reason=reason, columns=pair or ())
    return _finish(reason, question, plan, linked, profile, rows, rng, drops)


def _answered(text: str, table: Table, linked: LinkedQuestion) -> bool:
    """Whether the linker marks, in a question for something missing, words it was not to find."""
    known = {i for i in range(len(table.columns))}
    lower = text.lower()
    for mark in linked.marks:
        if mark.kind == "V":
            value = linked.slots.values[mark.index].value.lower()
            if value not in lower:
                return True
        if mark.kind == "C" and not mark.partial and not set(mark.columns) <= known:
            return True
    return False


def _finish(
    kind: str,
    question: str,
    plan: Plan,
    linked: LinkedQuestion,
    profile: TableProfile,
    rows: dict[str, list[object]],
    rng: Random,
    drops: Counter[str],
) -> Example | None:
    order = choose_columns(profile, linked)
    rng.shuffle(order)
    if plan.reason == "ambiguous":
        # The pair has no order of its own: the place in the prompt decides.
        plan = Plan("noans", reason="ambiguous", columns=tuple(sorted(plan.columns, key=order.index)))
    target = plan_tokens(plan, order)
    if not PlanGrammar(profile, linked.slots, order).accepts(target):
        drops[f"grammar: {kind}"] += 1
        return None
    return Example(order, target, kind, question, profile, plan, linked, draft_plan(profile, linked), rows)
