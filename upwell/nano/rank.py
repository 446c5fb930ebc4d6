"""Fits how candidate plans are weighed: upwell/analyst/ranking.json, from the development questions.

    python -m upwell.nano.rank            # from the repository's root; prints the scores of whole tables left out

Every question's candidates are drawn from the embedded model once and judged by running them. The weights are those
of a softmax over a question's candidates and "none of these" that make the right ones likeliest, drawn towards PRIOR.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upwell.analyst.ask import Asker
from upwell.analyst.evidence import Asked
from upwell.analyst.linking import link
from upwell.analyst.plan import Plan
from upwell.analyst.ranking import NONE, WEIGHTS, collect, same_rows
from upwell.analyst.rules import draft_plan
from upwell.analyst.schema import TableProfile
from upwell.analyst.sql import to_sql
from upwell.bench.questions import load_judge

DEV = Path(__file__).parent / "dev"
JUDGE = Path(__file__).parents[2] / "benchmarks" / "questions"
SETS = ("questions", "hard", "sorting")
FOLDS = 9  # of whole tables
PULL = 2e-4  # of the weights towards PRIOR, beside the mean loss
# A reading that leaves a value or a number of the question unused is seldom right.
PRIOR = {"weight": 1.0, "unused value": math.log(0.2), "unused number": math.log(0.2),
         "unused column": math.log(0.05), "unused loose column": math.log(0.6)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One question's candidates, in the same order: `evidence`, `right`, whether each `answers`, and which of them give
    the same table (by the number of the first that does)."""

    table: str
    set: str
    evidence: list[dict[str, float]]
    right: list[bool]
    answers: list[bool]
    tables: list[int]


def cases(asker: Asker) -> Iterator[Case]:
    script = load_judge(JUDGE)
    judge = script.Judge(DEV / "tables")
    for name in SETS:
        questions = script.load_questions(DEV / f"{name}.jsonl")
        for table, group in groupby(questions, key=lambda q: q.table):
            asked = list(group)
            profile = asker.open(judge.path(table)).profile
            linked = [link(" ".join(q.question.split()), profile) for q in asked]
            drafts = [draft_plan(profile, each) for each in linked]
            for q, of, draft, drawn in zip(
                asked, linked, drafts, asker.candidates(profile, linked, drafts), strict=True
            ):
                found = collect(drawn, Asked(profile, of, draft))
                right = [_right(judge, q, plan, profile, of.slots) for plan in found]
                answers = [plan.kind != "noans" for plan in found]
                yield Case(table, name, list(found.values()), right, answers, alike(found, profile))


def alike(plans: Iterable[Plan], profile: TableProfile) -> list[int]:
    """For each plan the number of the first that gives the same table."""
    first: dict[Plan, int] = {}
    return [first.setdefault(same_rows(plan, profile), n) for n, plan in enumerate(plans)]


def _right(judge: Any, question: Any, plan: Plan, profile: Any, slots: Any) -> bool:
    if plan.kind == "noans":
        status = "unsure" if plan.reason == "ambiguous" else "refused"
        return bool(judge.right(question, status, None))
    return bool(question.answerable and judge.right(question, "answer", to_sql(plan, profile, slots)))


class Fit:
    """The cases as tensors: x [cases, candidates, names], y, mask [cases, candidates]; "none" is the last of each."""

    def __init__(self, data: Sequence[Case]) -> None:
        self.names = [*sorted({name for case in data for found in case.evidence for name in found}), NONE]
        place = {name: i for i, name in enumerate(self.names)}
        width = max(len(case.right) for case in data) + 1
        self.x = torch.zeros(len(data), width, len(self.names))
        self.y = torch.zeros(len(data), width, dtype=torch.bool)
        self.same = torch.zeros(len(data), width, width)  # [n, i, k]: candidates i and k give the same table
        self.mask = torch.full((len(data), width), -math.inf)
        for n, case in enumerate(data):
            for k, found in enumerate(case.evidence):
                self.x[n, k, [place[name] for name in found]] = torch.tensor(list(found.values()))
            self.y[n, : len(case.right)] = torch.tensor(case.right)
            tables = torch.tensor(case.tables)
            self.same[n, : len(tables), : len(tables)] = (tables[:, None] == tables[None]).float()
            self.mask[n, : len(case.right)] = 0.0
            self.x[n, -1, -1] = 1.0
            self.y[n, -1] = not any(case.right)
            self.mask[n, -1] = 0.0
        self.prior = torch.tensor([PRIOR.get(name, 0.0) for name in self.names])

    def fit(self, rows: Sequence[int], pull: float = PULL) -> Tensor:
        """Weights [names] from these cases."""
        x, y, mask = self.x[rows], self.y[rows], self.mask[rows]
        weight = self.prior.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            scores = x @ weight + mask
            right = scores.masked_fill(~y, -math.inf)
            value = (scores.logsumexp(1) - right.logsumexp(1)).mean() + pull * (weight - self.prior).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return weight.detach()

    def chosen(self, weight: Tensor, rows: Sequence[int]) -> tuple[list[int], list[float]]:
        """The best candidate of each case, never "none", and its probability."""
        p = (self.x[rows] @ weight + self.mask[rows]).softmax(1)
        shared = (self.same[rows] @ p[..., None]).squeeze(-1)[:, :-1]
        best = (shared + 1e-6 * p[:, :-1]).argmax(1)
        return best.tolist(), shared.gather(1, best[:, None]).squeeze(1).tolist()


def left_out(data: Sequence[Case], fit: Fit) -> list[tuple[bool, bool, float]]:
    """(right, answers, confidence) of each case, by weights fitted without its table."""
    tables = sorted({case.table for case in data})
    out: dict[int, tuple[bool, bool, float]] = {}
    for k in range(FOLDS):
        held = [n for n, case in enumerate(data) if case.table in tables[k::FOLDS]]
        weight = fit.fit([n for n in range(len(data)) if n not in set(held)])
        for n, best, p in zip(held, *fit.chosen(weight, held), strict=True):
            out[n] = data[n].right[best], data[n].answers[best], p
    return [out[n] for n in range(len(data))]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    data = list(cases(Asker()))
    fit = Fit(data)
    scored = left_out(data, fit)
    for name in SETS:
        of = [score for score, case in zip(scored, data, strict=True) if case.set == name]
        print(f"{name}: {sum(r for r, *_ in of)} of {len(of)} right, tables left out")
    for limit in (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        sure = [right for right, answers, p in scored if answers and p >= limit]
        print(f"confidence >= {limit}: {len(sure)} answers, {sum(sure) / max(len(sure), 1):.3f} right")
    weight = fit.fit(range(len(data)))
    told = {name: round(float(w), 3) for name, w in zip(fit.names, weight, strict=True)}
    WEIGHTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
