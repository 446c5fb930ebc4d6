"""Which of the candidate plans answers the question, and how likely it is right.

A logistic choice over named evidence (analyst/evidence.py): each plan's weights are summed, a softmax over the plans
and over "none of these" gives probabilities. The weights are fitted by upwell/nano/rank.py.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from upwell.analyst.evidence import Asked, evidence
from upwell.analyst.plan import Plan
from upwell.analyst.schema import TableProfile
from upwell.analyst.sql import named
from upwell.analyst.variants import variants

WEIGHTS = Path(__file__).with_name("ranking.json")
NONE = "none of these"


@lru_cache(maxsize=1)
def weights() -> dict[str, float]:
    """The fitted weight of each kind of evidence; of NONE the score of having no right candidate."""
    read: dict[str, float] = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    return read


def collect(drawn: Mapping[Plan, float], asked: Asked) -> dict[Plan, dict[str, float]]:
    """Every candidate, which are the model's plans with their probabilities, the draft and their variants, and what
    speaks for it."""
    every = {asked.draft.plan: 0.0, **drawn}
    near = variants(every, asked)
    return {
        **{plan: evidence(plan, asked, every) for plan in every},
        **{plan: evidence(plan, asked, {**every, plan: p}, variant=True) for plan, p in near.items()},
    }


def same_rows(plan: Plan, profile: TableProfile) -> Plan:
    """The one plan for all that give the same table: rows are shown with their names and what sorts them anyway."""
    if plan.kind != "show":
        return plan
    order = () if plan.sort_column is None else (plan.sort_column,)
    shown = named(plan.columns, profile) + order
    return replace(plan, where=tuple(sorted(plan.where, key=repr)), columns=tuple(sorted(set(shown))))


def rank(drawn: Mapping[Plan, float], asked: Asked) -> tuple[Plan, float]:
    """The likeliest plan and the probability in 0..1 that it is right, which plans for the same table share."""
    weight = weights()
    scores = {
        plan: sum(weight.get(name, 0.0) * value for name, value in found.items())
        for plan, found in collect(drawn, asked).items()
    }
    top = max(*scores.values(), weight[NONE])
    shares = {plan: math.exp(score - top) for plan, score in scores.items()}
    table_of = {plan: same_rows(plan, asked.profile) for plan in shares}
    tables: dict[Plan, float] = defaultdict(float)
    for plan, share in shares.items():
        tables[table_of[plan]] += share
    best = max(shares, key=lambda plan: (tables[table_of[plan]], shares[plan]))
    return best, tables[table_of[best]] / (sum(shares.values()) + math.exp(weight[NONE] - top))
