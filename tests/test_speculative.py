"""Speculative decoding changes nothing but speed: the same tokens, greedy and seed by seed, and the cache as it was."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import fill
from tiny_v4 import VOCAB, build_tokenizer, config

from upwell import LLM, SamplingParams
from upwell.engine import Delta, Engine, StructuredOutputs, Tokenizer
from upwell.engine.pace import Acceptance, Pace
from upwell.errors import EngineError, InputError
from upwell.model import KVCache, Step, Transformer

PLAIN = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}


class Fixed(Pace):
    """Always drafts as many as it may, whatever that takes."""

    def choose(self) -> int:
        return self.most


def build(seed: int = 0) -> Transformer:
    """A tiny V4 with MTP, whose logits are peaked enough that drafts by MTP are sometimes right."""
    model = Transformer(config().with_mtp(1)).eval()
    fill(model, seed, model.config.n_routed_experts)
    with torch.no_grad():
        model.head.weight *= 2.0
        # So that it's not all noise: what MTP makes of a token is near what the model makes of it.
        model.mtp[0].hc_head.load_state_dict(model.hc_head.state_dict())  # type: ignore[union-attr]
        model.mtp[0].norm.load_state_dict(model.norm.state_dict())  # type: ignore[union-attr]
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build()


def llm_of(model: Transformer, drafts: int, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> LLM:
    options = {"max_num_seqs": 4, "cache_tokens": 4096, **options}
    if monkeypatch is not None:
        monkeypatch.setattr("upwell.engine.speculative.Pace", Fixed)
    return LLM.from_model(model, Tokenizer(build_tokenizer()), speculative_tokens=drafts, **options)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def accepted(llm: LLM) -> int:
    stats = llm.engine.stats()
    assert 0 <= stats.draft_accepted <= stats.draft_proposed
    return stats.draft_accepted


def oracle(model: Transformer, monkeypatch: pytest.MonkeyPatch, right: float = 0.7) -> None:
    """MTP that is right as often as wanted: its logits are the model's own for the tokens at hand, or noise.

    The model's argmax is what greedy decoding goes on with; the tests below compare with runs without drafts.
    """
    rng = random.Random(3)
    real = model.draft_logits

    def logits(streams: torch.Tensor, depth: int = 0) -> torch.Tensor:
        out = real(streams, depth)
        for row in out:
            if rng.random() < right and answers:
                row[answers[-1]] += 100.0
        return out

    answers: list[int] = []
    monkeypatch.setattr(model, "draft_logits", logits)


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.3, "seed": 4}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}],
                         ids=["greedy", "cool", "warm"])  # fmt: skip
def test_outputs_are_the_same(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, drafts: int, params: dict[str, Any]
) -> None:
    prompts = [{"prompt_token_ids": ids(n, n)} for n in (1, 130, 250, 300)]
    wanted = SamplingParams(**{**PLAIN, **params, "logprobs": 2})
    expected = llm_of(model, 0).generate(prompts, wanted)
    fast = llm_of(model, drafts, monkeypatch)
    for prompt, before in zip(prompts, expected, strict=True):
        after = fast.generate(prompt, wanted)[0]
        assert after.token_ids == before.token_ids
        for a, b in zip(after.outputs[0].logprobs or [], before.outputs[0].logprobs or [], strict=True):
            assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-3)
    together = fast.generate(prompts, wanted)
    assert [o.token_ids for o in together] == [o.token_ids for o in expected]
    assert fast.engine.stats().draft_proposed > 100 and not fast.engine.has_work
