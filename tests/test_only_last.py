"""Streams after each sequence's last token alone are those of the whole step, and the cache is the whole step's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import path
from test_kernels import BASE, random_model
from torch import Tensor

from upwell.config import ModelConfig
from upwell.model import Step, Transformer, compiled
from upwell.ops import native

LENGTHS = [1, 700, 37, 5, 300, 2]  # more than one call takes, and a sequence of two calls
TABLES = [[b, b + 6, b + 12, b + 18] for b in range(6)]
CONFIGS = {  # by the kind of the last layer
    "window": dataclasses.replace(BASE, compress_ratios=(4, 128, 0)),
    "csa": dataclasses.replace(BASE, compress_ratios=(0, 128, 4)),
    "hca": BASE,
    "hash": dataclasses.replace(BASE, num_hash_layers=3),
    "one layer": dataclasses.replace(BASE, num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=0),
}


def run(model: Transformer, only_last: bool, padded: bool) -> list[Tensor]:
    """Streams after each sequence's last token: of prompts, of prompts that go on beside decoded tokens, of decode."""
    generator, cache, found = torch.Generator().manual_seed(1), model.new_cache(24, 6), list[Tensor]()
    starts = [0] * 6
    with torch.inference_mode():
        for lengths in (LENGTHS, [1, 1, 200, 1, 3, 90], [1] * 6):
            parts = [torch.randint(0, 64, (n,), generator=generator) for n in lengths]
            ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) if padded else torch.cat(parts)[None]
            step = Step([3, 1, 5, 0, 4, 2], starts, lengths, TABLES)
            streams = model.streams(ids, cache, step, only_last=only_last)
            found.append(streams if only_last else streams[step.last_rows(ids)])
            starts = [start + n for start, n in zip(starts, lengths, strict=True)]
    return found


def assert_same(model: Transformer, padded: bool) -> None:
    for ours, whole in zip(run(model, True, padded), run(model, False, padded), strict=True):
        assert ours.shape == whole.shape == (6, 4, 48)
        assert (ours - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["kernels", "modules"])
def test_equals_the_whole_steps(kind: str, config: ModelConfig, padded: bool) -> None:
    with path(kind):
        assert_same(random_model(config, 1), padded)


@pytest.mark.parametrize("by_tokens", [0, 1])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_equals_the_whole_steps_in_each_set(isa: str, products: torch.dtype, by_tokens: int) -> None:
    """Both ways through a layer, with one thread and two."""
    model = random_model(CONFIGS["csa"], 2)
    model.multiply_in(products)
    with torch.no_grad():
        if (plan := compiled.plan(model)) is not None:
            plan.model.by_tokens = by_tokens
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same(model, False)
    torch.set_num_threads(before)


@pytest.mark.skipif(native.library() is None, reason="the kernels' cache")
def test_equals_the_whole_steps_from_a_cache_in_int8() -> None:
    model = random_model(CONFIGS["csa"], 3)
    model.cache_in(torch.int8)
    assert_same(model, False)


def test_the_last_layer_computes_no_more_than_is_asked_for() -> None:
    """Its experts are counted for the last token of each sequence, those of the others for every token."""
    for kind in ("kernels", "modules"):
        with path(kind):
            model = random_model(BASE, 4)
            load = model.count_experts()
            run(model, True, False)
        ends = 3 * 6
        if kind == "kernels" and native.library() is not None:
            ends += 2  # where a call ends within a sequence, it computes that token, too
        assert load[-1].sum() == 3 * ends
        assert all(row.sum() >= 3 * (1045 + 296 + 6) for row in load[:-1])
