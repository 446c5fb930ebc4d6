"""MTP, which transformers doesn't have, against a second derivation (plain_v4.py): float64, token by token.

The main model goes through the same comparison, so the derivation itself is tied to what transformers confirms.
"""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
import torch
from models import Session, assert_close, fill, path, random_ids
from plain_v4 import PlainV4
from torch import Tensor

from upwell.config import ModelConfig, Yarn
from upwell.model import Transformer

LENGTH = 45
# A small window and HCA ratio, so that a few tokens cross every edge; no dimension a power of two.
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=28, num_hidden_layers=3, compress_ratios=(0, 4, 8), num_attention_heads=6, head_dim=22,
    qk_rope_head_dim=6, q_lora_rank=18, o_lora_rank=10, o_groups=3, sliding_window=11, index_n_heads=18,
    index_head_dim=14, index_topk=5, n_routed_experts=7, num_experts_per_tok=3, moe_intermediate_size=19,
    num_hash_layers=1, routed_scaling_factor=1.5, swiglu_limit=0.8, yarn=Yarn(16, 128, 4, 1), hca_ratio=8,
    num_nextn_predict_layers=1, max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG).eval()
    fill(model, 11, CONFIG.n_routed_experts)
    return model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(1, LENGTH + 1, 4)[0]


@pytest.fixture(scope="module")
def plain(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """streams [S, h, D], logits [S, V], drafts [S, V] and draft_streams [S, h, D] of the second derivation."""
    second = PlainV4(model)
    streams = second.streams(ids[:-1].tolist())
    drafts, draft_streams = second.draft(ids[1:].tolist(), streams)
    values = {"streams": streams, "logits": second.logits(streams), "drafts": drafts, "draft_streams": draft_streams}
    return {name: torch.from_numpy(np.array(value)).float() for name, value in values.items()}


def test_the_main_model(model: Transformer, ids: Tensor, plain: dict[str, Tensor]) -> None:
    with torch.no_grad():
        streams = model.streams(ids[None, :-1])
        assert_close(streams, plain["streams"], "streams", 2e-5)
        assert_close(model.logits(streams), plain["logits"], "logits", 2e-5)


def test_draft_from_scratch(model: Transformer, ids: Tensor, plain: dict[str, Tensor]) -> None:
    for n in (1, 2, 11, 12, LENGTH):
        with torch.no_grad():
            streams = model.streams(ids[None, :n])
            logits, out = model.draft(ids[None, 1 : n + 1], streams)
        assert_close(logits, plain["drafts"][:n], f"{n} tokens", 2e-5)
        assert_close(out, plain["draft_streams"][:n], f"streams of {n} tokens", 2e-5)


def test_draft_of_a_batch_keeps_sequences_apart(model: Transformer, ids: Tensor, plain: dict[str, Tensor]) -> None:
    other = random_ids(1, LENGTH + 1, 5)[0]
    both = torch.stack((other, ids))
    with torch.no_grad():
        logits, _ = model.draft(both[:, 1:], model.streams(both[:, :-1]))
    assert_close(logits.view(2, LENGTH, -1)[1], plain["drafts"], tolerance=2e-5)


@pytest.mark.parametrize("by", ["modules", "kernels"])
@pytest.mark.parametrize("sizes", [[1], [5, 1, 1, 13, 2], [12, 11, 1]], ids=["step by step", "odd chunks", "window"])
def test_draft_with_a_cache(
    model: Transformer, ids: Tensor, plain: dict[str, Tensor], sizes: list[int], by: str
) -> None:
    with path(by):
        session = Session(model, [ids], mtp=True).feed_all(cycle(sizes))
    assert_close(session.result()[:-1], plain["logits"], "logits", 2e-5)
    # The last position has no next token yet.
    assert_close(torch.cat(session.drafts[0])[:-1], plain["drafts"], "drafts", 2e-5)


@pytest.mark.parametrize("by", ["modules", "kernels"])
def test_ragged_drafts_with_a_cache(model: Transformer, ids: Tensor, plain: dict[str, Tensor], by: str) -> None:
    session = Session(model, [random_ids(1, 20, 6)[0], ids], mtp=True)
    with path(by):
        for lengths in ({0: 3, 1: 13}, {0: 1, 1: 1}, {0: 9, 1: 2}, {1: 1, 0: 1}, {0: 6, 1: 29}):
            session.feed(lengths)
    assert_close(torch.cat(session.drafts[1])[:-1], plain["drafts"], "the ragged batch", 2e-5)


def test_drafts_follow_the_token_they_are_given(model: Transformer, ids: Tensor) -> None:
    with torch.no_grad():
        streams = model.streams(ids[None, :-1])
        following = ids[None, 1:].clone()
        first = model.draft(following, streams)[0]
        following[0, 20] = (following[0, 20] + 1) % CONFIG.vocab_size
        second = model.draft(following, streams)[0]
    changed = (first != second).any(dim=-1)
    # Nothing before it, itself, and those whose window (11 wide) still holds it.
    assert not changed[:20].any() and changed[20:31].all() and not changed[31:].any()
