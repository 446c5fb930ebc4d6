"""Which of the candidate plans answers the question, and how likely it is right.

A logistic choice over named evidence (analyst/evidence.py): each plan's weights are summed, a softmax over the plans
and over "none of these" gives probabilities. The weights are fitted by upwell/nano/rank.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from upwell.analyst.evidence import Asked, evidence
from upwell.analyst.plan import Plan
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


def rank(drawn: Mapping[Plan, float], asked: Asked) -> tuple[Plan, float]:
    """The likeliest plan and the probability in 0..1 that it is right."""
    weight = weights()
    scores = {
        plan: sum(weight.get(name, 0.0) * value for name, value in found.items())
        for plan, found in collect(drawn, asked).items()
    }
    best = max(scores, key=lambda plan: scores[plan])
    top = max(scores[best], weight[NONE])
    total = sum(math.exp(score - top) for score in (*scores.values(), weight[NONE]))
    return best, math.exp(scores[best] - top) / total
