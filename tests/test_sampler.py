"""Sampling parameters are validated; draws follow the distribution they say."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_v4 import build_tokenizer

from upwell import SamplingParams
from upwell.engine import Tokenizer
from upwell.engine.detokenizer import Detokenizer
from upwell.engine.outputs import Draw
from upwell.engine.sampler import sample
from upwell.engine.sequence import Request, Sequence
from upwell.errors import InputError

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def sequence(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: Any) -> Sequence:
    request = Request(None, list(prompt), SamplingParams(**params), 1000, 5, lambda delta: None)
    made = Sequence(request, 0, 0, None)
    made.output = list(output)
    made.counts = Counter(output)
    return made


def draws(count: int, logits: torch.Tensor = LOGITS, **params: Any) -> torch.Tensor:
    """Share of each token among draws of one sequence."""
    one = sequence(**params)
    tokens = []
    for _ in range(count):
        tokens.append(sample(logits.clone()[None], [one], [None])[0].token)
        one.append([Draw(tokens[-1], None)])  # the next token has a random number of its own
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def token(**given: Any) -> int:
    logits = given.pop("logits", LOGITS)
    return sample(logits.clone()[None], [sequence(temperature=0.0, **given)], [None])[0].token


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.75}, [0, 1]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.7}, [0, 1]),
    ],
)
def test_draws_follow_the_truncated_distribution(params: dict[str, Any], kept: list[int]) -> None:
    expected = torch.zeros_like(LOGITS)
    expected[kept] = (LOGITS[kept] / params.get("temperature", 1.0)).softmax(0)
    count = 4000
    share = draws(count, seed=11, **params)
    assert share[expected == 0].sum() == 0
    chi_square = float((count * (share - expected).square()[kept] / expected[kept]).sum())
    assert chi_square < 25  # 5 degrees of freedom: one in 7,000


def test_top_p_on_a_flat_distribution_looks_past_its_candidates() -> None:
    flat = torch.zeros(5000)
    share = draws(300, flat, top_p=0.9, seed=1)
    assert (share > 0).sum() > 250  # ties with the last token kept: none is cut


def test_a_tiny_probability_is_never_drawn_at_zero_and_masked_tokens_never() -> None:
    logits = torch.full((50,), float("-inf"))
    logits[[7, 49]] = torch.tensor([0.0, -5.0])
    share = draws(500, logits, seed=3)
    assert share[7] + share[49] == 1


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert token(logits=torch.tensor([0.0, 3.0, 3.0, 3.0])) == 1


def test_edits() -> None:
    assert token(logit_bias={4: 50}) == 4
    assert token(output=(0,), presence_penalty=1.5) == 1
    assert token(output=(0, 0, 1), frequency_penalty=0.8) == 2
    assert token(prompt=(0,), repetition_penalty=3.0) == 1
    negative = torch.tensor([-1.0, -1.2, -3.0])
    assert token(logits=negative, prompt=(0,), repetition_penalty=2.0) == 1
    ends = torch.tensor([0.0, 0, 0, 0, 0, 9.0])
    assert token(logits=ends) == 5 and token(logits=ends, min_tokens=2) == 0


def test_rows_of_a_batch_keep_their_own_parameters() -> None:
    masked = sequence(temperature=0.0, logprobs=2)
    rows = [sequence(temperature=0.0), sequence(seed=5, top_k=1), masked, sequence(seed=9)]
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS, LOGITS])
    result = sample(logits, rows, [None, None, [3, 4], None])
    assert [d.token for d in result[:3]] == [0, 5, 3]
    assert [d.logprob is None for d in result] == [True, True, False, True]
    top = result[2].logprob.top  # type: ignore[union-attr]
    assert dict(top) == pytest.approx({3: math.log(1 / (1 + math.exp(-1))), 4: math.log(1 / (1 + math.e))}, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "1"), ("temperature", True), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("seed", 1.5), ("max_tokens", 0), ("min_tokens", -1), ("n", 0), ("logprobs", 21),
        ("stop", ""), ("stop", [""]), ("stop", 3), ("stop_token_ids", [-1]), ("stop_token_ids", "12"),
        ("logit_bias", {1: 101}), ("logit_bias", {"x": 1}), ("logit_bias", [1]), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_a_bad_parameter_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(**{name: value})
    assert name in error.value.message
    with pytest.raises(InputError, match="min_tokens is 5, more than max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_whole_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    tokenizer = Tokenizer(build_tokenizer())
    assume(not any(tokenizer.bytes_of(i).decode() in text for i in tokenizer.special_ids))  # these aren't text
    ids = build_tokenizer().encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, stops)
    streamed = ""
    for i in ids:
        if detokenizer.stopped:
            break
        streamed += detokenizer.push(i)
    streamed += detokenizer.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert streamed == text == tokenizer.decode(ids)
        return
    # Bytes come in order: the stop string that is complete first ends the text, before where it begins.
    seen = text[: min(ends)]
    assert streamed == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_incomplete_bytes_wait_and_broken_ones_are_replaced() -> None:
    tokenizer = Tokenizer(build_tokenizer())
    one_by_one = tokenizer.encode("é中")
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in one_by_one] == ["", "é", "", "", "中"]
    assert detokenizer.push(one_by_one[0]) == "" and detokenizer.finish() == "\ufffd"
