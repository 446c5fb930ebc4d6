"""A question about a table, answered: link, ask the model for a plan, compile it, run it, say how it was read.

The model only ever chooses among plans that the grammar allows for this table. It is asked under several column
orders at once; its plans and those near them are weighed by its probabilities and by the question's own words
(analyst/ranking.py), which also gives the confidence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upwell.analyst.evidence import Asked
from upwell.analyst.grammar import PlanGrammar, State
from upwell.analyst.linking import link
from upwell.analyst.plan import Plan, parse_plan
from upwell.analyst.prompt import render_prompt
from upwell.analyst.query import run_query
from upwell.analyst.ranking import rank
from upwell.analyst.reading import describe
from upwell.analyst.rules import Draft, choose_columns, draft_plan
from upwell.analyst.schema import TableProfile
from upwell.analyst.slots import LinkedQuestion
from upwell.analyst.sources import OpenTable, open_table
from upwell.analyst.sql import to_sql
from upwell.errors import InputError, QueryError

if TYPE_CHECKING:
    from upwell.engine import LLM

Status = Literal["answer", "unsure", "refused"]

SURE = 0.8  # confidence from which a reading counts as sure
ORDERS = 4  # column orders a question is asked under
DRAWS = 3  # further plans drawn in each order, as candidates
MAX_PLAN_TOKENS = 64
MAX_QUESTION = 2000  # characters


@dataclass(frozen=True)
class Answer:
    """What the user gets. `status` answer: sure; unsure: the best reading, to be checked; refused: no reading.

    confidence is a probability in 0..1; columns and rows are the result (JSON-safe values), empty when refused.
    """

    question: str
    status: Status
    reading: str = ""
    sql: str | None = None
    columns: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    confidence: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Reading:
    """One plan and the probability that it is right."""

    plan: Plan
    confidence: float


class Asker:
    """Answers questions about one open table with a planning model: `llm`, or the embedded nano on `device`."""

    def __init__(self, llm: LLM | None = None, device: str = "cpu") -> None:
        self._llm, self._device = llm, device
        self._table: OpenTable | None = None

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            from upwell.engine import LLM

            self._llm = LLM(device=self._device)
        return self._llm

    def open(self, path: str | Path, table: str | None = None, memory_limit: str | None = None) -> OpenTable:
        """Load a file (see sources.open_table); questions go to the last one opened."""
        self._table = open_table(path, table, memory_limit)
        return self._table

    def ask(self, question: str) -> Answer:
        """Answer in terms of the open table. Raises InputError without a table or with an unusable question."""
        return self.ask_all([question])[0]

    def ask_all(self, questions: Sequence[str]) -> list[Answer]:
        """Several questions about the open table, which the model reads in one batch."""
        if self._table is None:
            raise InputError("no table is open", "call open(path) first")
        texts = [" ".join(question.split()) for question in questions]
        for text in texts:
            if not text:
                raise InputError("the question is empty", "ask something about the table")
            if len(text) > MAX_QUESTION:
                raise InputError(f"the question has {len(text)} characters", f"at most {MAX_QUESTION} are read")
        profile = self._table.profile
        linked = [link(text, profile) for text in texts]
        read = self.read_all(profile, linked)
        return [self._answer(*each) for each in zip(questions, linked, read, strict=True)]

    def _answer(self, question: str, linked: LinkedQuestion, reading: Reading) -> Answer:
        assert self._table is not None
        profile = self._table.profile
        if reading.plan.kind == "noans":
            return self._refuse(question, profile, linked, reading)
        sql = to_sql(reading.plan, profile, linked.slots)
        told = describe(reading.plan, profile, linked.slots)
        try:
            result = run_query(self._table.connection, sql)
        except QueryError as error:
            return Answer(question, "refused", told, sql, confidence=reading.confidence, message=error.message)
        sure = reading.confidence >= SURE
        message = "" if sure else "I'm not sure I read this right; this is my best reading. Is it what you meant?"
        if result.truncated:
            message = f"{message} Only the first {len(result.rows)} rows are kept.".strip()
        return Answer(question, "answer" if sure else "unsure", told, sql, result.columns, result.rows,
                      reading.confidence, message)  # fmt: skip

    def read(self, profile: TableProfile, linked: LinkedQuestion) -> Reading:
        """One question's likeliest plan."""
        return self.read_all(profile, [linked])[0]

    def read_all(self, profile: TableProfile, asked: Sequence[LinkedQuestion]) -> list[Reading]:
        """Each question's likeliest plan."""
        drafts = [draft_plan(profile, linked) for linked in asked]
        readings = []
        for linked, draft, drawn in zip(asked, drafts, self.candidates(profile, asked, drafts), strict=True):
            readings.append(Reading(*rank(drawn, Asked(profile, linked, draft))))
        return readings

    def candidates(
        self, profile: TableProfile, asked: Sequence[LinkedQuestion], drafts: Sequence[Draft]
    ) -> list[dict[Plan, float]]:
        """Plans and their probability, averaged over ORDERS column orders: each order's greedy one and DRAWS draws."""
        from upwell.engine import SamplingParams

        tokenizer = self.llm.tokenizer
        orders: list[list[int]] = []  # of every prompt; ORDERS prompts a question
        masks: list[PlanMask] = []
        prompts: list[dict[str, list[int]]] = []
        for linked, draft in zip(asked, drafts, strict=True):
            for order in column_orders(profile, linked, ORDERS):
                orders.append(order)
                masks.append(PlanMask(PlanGrammar(profile, linked.slots, order), tokenizer))
                prompt = render_prompt(profile, linked, order, draft)
                prompts.append({"prompt_token_ids": prompt_ids(tokenizer, prompt)})
        if not masks:
            return []
        end = masks[0].end
        if end is None:
            raise InputError("this model's tokenizer has no plan tokens", "questions need upwell-nano")
        found: dict[tuple[int, Plan], float] = {}  # by prompt: a plan drawn twice counts once
        for temperature, n in ((0.0, 1), (1.0, DRAWS)):
            params = SamplingParams(temperature=temperature, n=n, seed=0, max_tokens=MAX_PLAN_TOKENS, logprobs=0,
                                    stop_token_ids=[end], ignore_eos=True)  # fmt: skip
            for k, output in enumerate(self.llm.generate(prompts, params, token_mask=masks)):
                for completion in output.outputs:
                    tokens = masks[k].words(completion.token_ids)
                    if not tokens or tokens[-1] != "<end>":
                        continue  # ran past the longest plan: no reading
                    plan = _order_free(parse_plan(tokens, orders[k]))
                    found[k, plan] = math.exp(sum(entry.logprob for entry in completion.logprobs or []))
        weights: list[dict[Plan, float]] = [{} for _ in asked]
        for (k, plan), probability in found.items():
            of = weights[k // ORDERS]
            of[plan] = of.get(plan, 0.0) + probability / ORDERS
        return weights

    def _refuse(self, question: str, profile: TableProfile, linked: LinkedQuestion, reading: Reading) -> Answer:
        plan = reading.plan
        if plan.reason == "ambiguous":
            names = " or ".join(profile.columns[c].name for c in plan.columns)
            return Answer(question, "unsure", confidence=reading.confidence, message=f"Which do you mean: {names}?")
        if plan.reason == "notdata":
            message = "That isn't a question this table can answer. Ask about its rows and columns."
        else:
            columns = ", ".join(c.name for c in profile.columns[:12])
            message = f"I find nothing in this table that answers that. Its columns: {columns}"
            message += " and more." if len(profile.columns) > 12 else "."
        return Answer(question, "refused", describe(plan, profile, linked.slots), None, confidence=reading.confidence,
                      message=message)  # fmt: skip


class PlanMask:
    """A token mask over one grammar: the ids that may follow the plan so far. Completions of one prompt share it."""

    def __init__(self, grammar: PlanGrammar, tokenizer: Any) -> None:
        self.grammar = grammar
        self._id_of, self._word_of = tokenizer.id_of, tokenizer.bytes_of
        self.end = self._id_of("<end>")
        self._found: dict[tuple[int, ...], tuple[State, list[int]]] = {(): self._with_ids(grammar.start())}

    def __call__(self, generated: Sequence[int]) -> list[int]:
        return self._after(tuple(generated))[1]

    def words(self, ids: Sequence[int]) -> list[str]:
        """The plan's words for token ids."""
        return [self._word(i) for i in ids]

    def _after(self, generated: tuple[int, ...]) -> tuple[State, list[int]]:
        """Where a plan stands after these tokens, and the ids that may follow."""
        if generated not in self._found:
            before, _ = self._after(generated[:-1])
            self._found[generated] = self._with_ids(self.grammar.advance(before, self._word(generated[-1])))
        return self._found[generated]

    def _with_ids(self, state: State) -> tuple[State, list[int]]:
        return state, [self._id_of(word) for word in self.grammar.allowed(state)]

    def _word(self, token: int) -> str:
        word: str = self._word_of(token).decode()
        return word


def column_orders(profile: TableProfile, linked: LinkedQuestion, n: int) -> list[list[int]]:
    """The table's own order and n - 1 fixed shuffles of it."""
    base = choose_columns(profile, linked)
    rng = random.Random(0)
    orders = [base]
    for _ in range(n - 1):
        shuffled = list(base)
        rng.shuffle(shuffled)
        orders.append(shuffled)
    return orders


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as the model was trained on it: the beginning-of-sequence token (id 0) first."""
    return [0, *tokenizer.encode(prompt)]


def _order_free(plan: Plan) -> Plan:
    """An ambiguous pair has no order: the same pair is the same plan."""
    if plan.reason != "ambiguous":
        return plan
    return Plan("noans", reason="ambiguous", columns=tuple(sorted(plan.columns)))
