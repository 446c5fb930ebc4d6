"""Every sampling parameter against its formula, written out in plain Python over sorted lists.

The sampler inverts the cumulated distribution at one uniform number a token. Driving that number to the middle and to
both ends of each token's interval shows the whole distribution, with no chance in the test.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from upwell import SamplingParams
from upwell.engine.sampler import _bisected, sample
from upwell.engine.sequence import Request, Sequence

END = 2
EDGE = 1e-6  # what FP32 may round away


class Uniform:
    """Gives the number it is told instead of a random one."""

    def __init__(self) -> None:
        self.value = 0.0

    def random(self) -> float:
        return self.value


def sequence(prompt: list[int], output: list[int], **params: Any) -> Sequence:
    made = Sequence(Request(None, prompt, SamplingParams(**params), 1000, END, print), 0, 0, None)
    made.output, made.counts = output, Counter(output)
    return made


def edited(logits: list[float], prompt: list[int], output: list[int], allowed: list[int] | None, p: Any) -> list[float]:
    """Logits after penalties, bias, min_tokens and mask."""
    out = []
    for token, x in enumerate(logits):
        if token in prompt or token in output:
            x = x / p["repetition_penalty"] if x > 0 else x * p["repetition_penalty"]
        x -= p["frequency_penalty"] * output.count(token) + p["presence_penalty"] * (token in output)
        x += p["logit_bias"].get(token, 0.0)
        if (token in (END, *p["stop_token_ids"]) and len(output) + 1 < p["min_tokens"]) or (
            allowed is not None and token not in allowed
        ):
            x = -math.inf
        out.append(x)
    return out


def softmax(logits: list[float]) -> list[float]:
    most = max(logits)
    weights = [math.exp(x - most) for x in logits]
    return [w / sum(weights) for w in weights]


def truncated(
    probabilities: list[float], min_p: float, top_k: int, top_p: float, clear: Callable[[bool], object]
) -> list[float]:
    """Probabilities after min_p, then top_k, then top_p of what is left; of equals at a limit all stay.

    `clear` is told whether each decision is clear of rounding.
    """
    limit = min_p * max(probabilities)
    clear(all(abs(x - limit) > EDGE * limit or limit == 0 for x in probabilities))
    kept = [x if x >= limit else 0.0 for x in probabilities]
    if 0 < top_k < len(kept):
        least = sorted(kept, reverse=True)[top_k - 1]
        kept = [x if x >= least else 0.0 for x in kept]
    if top_p < 1:
        held, total = 0.0, sum(kept)
        for x in sorted(kept, reverse=True):
            held += x / total
            clear(abs(held - top_p) > EDGE)
            if held >= top_p:
                kept = [y if y >= x * (1 - 1e-12) else 0.0 for y in kept]
                break
    return [x / sum(kept) for x in kept]


def assert_distribution(one: Sequence, logits: torch.Tensor, expected: list[float], allowed: list[int] | None) -> None:
    uniform = Uniform()
    one.rng, one.uniform = uniform, lambda ahead=0: uniform.value  # type: ignore[assignment,attr-defined]
    below = 0.0
    for token, share in enumerate(expected):
        if share > 1e-5:
            edge = max(0.01, 1e-6 / share)  # FP32's sums are off by some 1e-7
            for within in (edge, 0.5, 1 - edge):
                uniform.value = below + share * within
                assert sample(logits.clone()[None], [one], [allowed])[0].token == token
        below += share
    for uniform.value in (0.0, math.nextafter(1.0, 0.0)):
        assert expected[sample(logits.clone()[None], [one], [allowed])[0].token] > 0


# Multiples of 1/64 are exact in FP32, and equal ones come up.
LOGITS = st.lists(st.integers(-400, 400).map(lambda x: x / 64), min_size=4, max_size=24)


@settings(max_examples=150)
@given(data=st.data(), logits=LOGITS)
def test_the_distribution_is_the_formulas(data: st.DataObject, logits: list[float]) -> None:
    tokens = st.integers(0, len(logits) - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=5), "prompt")
    output = data.draw(st.lists(tokens, max_size=6), "output")
    allowed = data.draw(st.none() | st.lists(tokens, min_size=1, unique=True), "allowed")
    params = {
        "temperature": data.draw(st.sampled_from([0.5, 1.0, 1.0, 2.0]), "temperature"),
        "top_p": data.draw(st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.1]), "top_p"),
        "top_k": data.draw(st.sampled_from([0, -1, 1, 3, 50]), "top_k"),
        "min_p": data.draw(st.sampled_from([0.0, 0.0, 0.05, 0.7]), "min_p"),
        "presence_penalty": data.draw(st.sampled_from([0.0, 1.5, -0.5]), "presence"),
        "frequency_penalty": data.draw(st.sampled_from([0.0, 0.75, -0.25]), "frequency"),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.5, 0.75]), "repetition"),
        "logit_bias": data.draw(st.dictionaries(tokens, st.sampled_from([-3.0, 4.5]), max_size=2), "bias"),
        "min_tokens": data.draw(st.sampled_from([0, 3, 9]), "min_tokens"),
        "stop_token_ids": data.draw(st.lists(tokens, max_size=1), "stop"),
        "logprobs": 3,
    }
    changed = edited(logits, prompt, output, allowed, params)
    assume(max(changed) > -math.inf)
    scaled = [x / params["temperature"] for x in changed]
    expected = truncated(softmax(scaled), params["min_p"], params["top_k"], params["top_p"], assume)
    one = sequence(prompt, output, max_tokens=None, **params)
    assert_distribution(one, torch.tensor(logits), expected, allowed)
    # Log-probabilities are those before temperature and truncation.
    draw = sample(torch.tensor([logits]), [one], [allowed])[0]
    shares = softmax(changed)
    assert draw.logprob is not None
    assert draw.logprob.logprob == pytest.approx(math.log(shares[draw.token]), abs=1e-4)
    best = sorted((x for x in shares if x > 0), reverse=True)[:3]
    assert [v for _, v in draw.logprob.top] == pytest.approx([math.log(x) for x in best], abs=1e-4)
    # Greedy takes the best of the edited ones, the first of equals.
    del params["temperature"]
    greedy = sequence(prompt, output, max_tokens=None, temperature=0.0, **params)
    token = sample(torch.tensor([logits]), [greedy], [allowed])[0].token
    assert changed[token] == pytest.approx(max(changed), abs=1e-5)


@pytest.mark.parametrize("top_p", [0.30007, 0.90007, 0.99907])  # no whole number of equal tokens
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_a_nucleus_wider_than_the_candidates(spread: float, top_p: float) -> None:
    """Of 6,000 tokens: the set that is kept is the smallest that holds top_p; nothing is sorted to find it."""
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(1)) * spread
    expected = truncated(softmax(logits.tolist()), 0.0, 0, top_p, bool)
    one = sequence([0], [], top_p=top_p, max_tokens=None)
    uniform = Uniform()
    one.rng, one.uniform = uniform, lambda ahead=0: uniform.value  # type: ignore[assignment,attr-defined]
    below, rng = 0.0, random.Random(1)
    for token, share in enumerate(expected):
        if share > 1e-5 and rng.random() < 0.006:
            uniform.value = below + share / 2
            assert sample(logits.clone()[None], [one], [None])[0].token == token
        below += share
    assert below == pytest.approx(1.0)


@pytest.mark.parametrize("spread", [0.0, 1e-9, 0.3, 4.0, 1e4])
@pytest.mark.parametrize("share", [0.01, 0.7, 0.999])
def test_where_a_wide_nucleus_is_cut(spread: float, share: float) -> None:
    """Among 20,000 values, half of them equal in pairs, some hidden: at the value that double precision finds."""
    values = torch.randn(20000, generator=torch.Generator().manual_seed(3)) * spread
    values[::2] = values[1::2]
    values[torch.arange(0, 20000, 7)] = float("-inf")
    values -= values.max()
    mass = values.double().exp()
    wanted = share * float(mass.sum())
    cut = _bisected(values, wanted)
    assert cut in values
    assert float(mass[values >= cut].sum()) > wanted * (1 - 1e-5)
    assert float(mass[values > cut].sum()) < wanted * (1 + 1e-5)


def test_rows_that_need_a_search_do_not_touch_the_others() -> None:
    flat, peaked = torch.zeros(5000), torch.zeros(5000)
    peaked[[10, 20]] = torch.tensor([12.0, 11.0])
    rows = [sequence([0], [], top_p=0.9, seed=1), sequence([0], [], top_p=0.5, seed=2), sequence([0], [], seed=3)]
    tokens = [d.token for d in sample(torch.stack([flat, peaked, flat]), rows, [None] * 3)]
    alone = [
        sample(x.clone()[None], [sequence([0], [], top_p=p, seed=s)], [None])[0].token
        for x, p, s in ((flat, 0.9, 1), (peaked, 0.5, 2), (flat, 1.0, 3))
    ]
    assert tokens == alone and tokens[1] == 10
