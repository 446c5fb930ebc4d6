"""A KV cache in INT8: rows, attention and the indexer's choice against the modules with rows and queries rounded."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_kernels import BASE, cut, outputs, random_model
from test_kernels_bf16 import selected_by, step_by
from torch import Tensor

from upwell.engine import LLM, SamplingParams
from upwell.engine.fingerprint import fingerprint
from upwell.errors import InputError
from upwell.model import Transformer, compiled, indexer
from upwell.model import attention as model_attention
from upwell.ops import attention, native
from upwell.ops import indexer as ops_indexer

needs_kernels = pytest.mark.skipif(native.library() is None, reason="such a cache is the kernels'; none are built here")


def in_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of the last dim as integers of its largest magnitude / 127, and that."""
    amax = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (x * (127 / amax)).round(), amax / 127


def stepped(x: Tensor) -> Tensor:
    integers, step = in_steps(x)
    return integers * step


def plain_attention(q: Tensor, keys: Tensor, hidden: Tensor, sink: Tensor) -> Tensor:
    """Scaled q [B, S, H, d] over keys [B, N, d], hidden [S, N]: all in steps, numerators of the largest among N."""
    integers, step = in_steps(keys)
    scores = torch.einsum("bshd,bnd->bshn", stepped(q), integers * step).masked_fill(hidden[:, None], float("-inf"))
    most = torch.maximum(scores.amax(-1, keepdim=True), sink.view(-1, 1))
    probs = (scores - most).exp()
    total = probs.sum(-1, keepdim=True) + (sink.view(-1, 1) - most).exp()
    probs = probs * step.squeeze(-1)[:, None, None]
    unit = probs.amax(-1, keepdim=True).clamp(min=1e-30) / (255 if unsigned() else 127)
    return torch.einsum("bshn,bnd->bshd", (probs / unit).round(), integers) * unit / total


def unsigned() -> bool:
    library = native.library()
    return library is not None and library.upwell_isa() in (b"avx512vnni", b"avx512bf16")


def plain_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    return _index_scores(stepped(queries), stepped(keys), weights)


_index_scores = ops_indexer.index_scores


def by_modules(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(compiled, "plan", lambda model, step=None, heads=False: None)
    patch.setattr(attention, "_attend_block", plain_attention)
    patch.setattr(attention, "_attend_selected", selected_by(plain_attention))
    patch.setattr(attention, "attend_step", step_by(plain_attention))
    patch.setattr(model_attention, "attend_step", step_by(plain_attention))
    patch.setattr(indexer, "index_scores", plain_scores)
    patch.setattr(ops_indexer, "index_scores", plain_scores)


# One expert: no choice hangs by rounding. Every entry is taken, or (picks) scores lie far enough apart.
WIDE = dataclasses.replace(BASE, n_routed_experts=1, num_experts_per_tok=1, index_topk=80)
CONFIGS = {
    "few heads": WIDE,  # two rows at a time
    "many heads": dataclasses.replace(WIDE, num_attention_heads=18, head_dim=36, sliding_window=31),
    "odd": dataclasses.replace(WIDE, num_attention_heads=9, head_dim=67, sliding_window=6, index_head_dim=19),
    "picks": dataclasses.replace(WIDE, index_topk=7),
}


@needs_kernels
@pytest.mark.parametrize("cached", [0, 8 << 20])  # layers cut by weights, and by tokens
@pytest.mark.parametrize("sizes", [[300], [1], [7, 1, 100, 33]])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_models_equal_the_modules_with_rounded_rows(
    isa: str, name: str, sizes: list[int], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_CACHED_BYTES", cached)
    model = random_model(CONFIGS[name], 1)
    total = 70 if sizes == [1] else 300
    ids = torch.randint(0, 64, (2, total), generator=torch.Generator().manual_seed(2))
    cuts = cut(total, sizes)
    exact, wide = outputs(model, ids, cuts)
    model.cache_in(torch.int8)
    ours, narrow = outputs(model, ids, cuts)
    model.cache_in(None)
    with monkeypatch.context() as patch:
        by_modules(patch)
        want, _ = outputs(model, ids, cuts)
    scale = want.abs().max()
    off, unrounded = ((x - want).abs().amax(-1) / scale for x in (ours, exact))
    # A softmax's numerators are rounded in steps of the largest among 64 rows, here of the largest of all: equal as
    # long as those are the same. Now and then a value that lies halfway is rounded the other way, and is read on.
    assert (off[:, :60] <= 1e-5).float().mean() >= 0.35 and (unrounded[:, :60] >= 1e-5).float().mean() >= 0.99
    assert off.median() <= 1e-3 and off.max() <= 8e-3 and unrounded.median() >= 1e-3
    assert narrow.nbytes < wide.nbytes


@needs_kernels
@pytest.mark.parametrize("cuts", [[120], [50, 1, 1, 40, 28]])
@pytest.mark.parametrize("dim,heads", [(12, 16), (37, 5)])
@torch.no_grad()
def test_choice_is_that_of_rounded_keys_and_queries(
    isa: str, dim: int, heads: int, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(WIDE, compress_ratios=(4,), num_hidden_layers=1, index_n_heads=heads,
                                 index_head_dim=dim, index_topk=8)  # fmt: skip
    model = random_model(config, dim)
    ids = torch.randint(0, 64, (1, sum(cuts)), generator=torch.Generator().manual_seed(9))
    ours, plain, make_call, choose = list[Tensor](), list[Tensor](), native.Call, ops_indexer.select_entries

    def call_with_picks(*fields: object, **named: object) -> native.Call:
        call = make_call(*fields, **named)
        ours.append(torch.full((call.tokens, 8), -1, dtype=torch.int32))
        call.picks = ours[-1].data_ptr()
        return call

    def keep(scores: Tensor, visible: Tensor, k: int) -> Tensor:
        picks = choose(scores, visible, k)
        plain.append(picks.masked_fill((visible.expand(picks.shape[:2]) <= k).unsqueeze(-1), -1)[0])
        return picks

    model.cache_in(torch.int8)
    with monkeypatch.context() as patch:
        patch.setattr(native, "Call", call_with_picks)
        outputs(model, ids, cuts)
    model.cache_in(None)
    by_modules(monkeypatch)
    monkeypatch.setattr(indexer, "select_entries", keep)
    monkeypatch.setattr(ops_indexer, "select_entries", keep)  # where a decode step chooses
    outputs(model, ids, cuts)
    assert len(ours) == len(plain) == len(cuts)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.sort(-1).values.long(), b.sort(-1).values)


@needs_kernels
@torch.no_grad()
def test_rows_are_the_nearest_integers(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache holds, by csrc/attention_bytes.h: a row's step, its integers' sum, then these."""
    model = random_model(WIDE, 3)
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(2))
    model.cache_in(torch.int8)
    _, cache = outputs(model, ids, [39, 1])
    model.cache_in(None)
    with monkeypatch.context() as patch:
        by_modules(patch)
        _, plain = outputs(model, ids, [39, 1])
    pairs = [(cache.layers[0].window, plain.layers[0].window)]  # the layers after it read rounded rows
    first = cache.layers[1], plain.layers[1]
    assert all(layer.entries is not None and layer.index_keys is not None for layer in first)
    for rows, want in pairs:
        held = rows[1:].flatten(0, 1)
        want = want[1:].flatten(0, 1)
        integers, step = in_steps(want)
        dim = want.shape[1]
        assert held.shape[1] == 8 + 32 and (held[:, 8 + dim :] == 0).all()
        assert torch.allclose(held[:, :4].contiguous().view(torch.float32), step, rtol=1e-5)
        near = (held[:, 8 : 8 + dim] - integers).abs()
        assert near.max() <= 1 and near.mean() <= 1e-3  # halves may go either way
        sums = held[:, 8:].sum(1, keepdim=True, dtype=torch.int32)
        assert torch.equal(held[:, 4:8].contiguous().view(torch.int32), sums)


@needs_kernels
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, 1e-40, 0.0])
@torch.no_grad()
def test_a_row_that_is_not_finite_is_met_by_those_who_read_it(isa: str, value: float) -> None:
    model = random_model(dataclasses.replace(WIDE, compress_ratios=(0, 4, 0), sliding_window=9), 4)
    model.embed.weight[63] = value
    ids = torch.randint(0, 63, (1, 40), generator=torch.Generator().manual_seed(2))
    ids[0, 20] = 63
    want, _ = outputs(model, ids, [15, 25])
    model.cache_in(torch.int8)
    got, _ = outputs(model, ids, [15, 25])
    assert torch.equal(got.isnan().any(-1), want.isnan().any(-1))
    fine = ~want.isnan().any(-1)
    assert ((got - want)[fine].abs() <= 0.05 * want[fine].abs().max()).all()


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"speculative_tokens": 4}, {"max_num_seqs": 2, "cache_tokens": 1024}])
def test_the_engine_serves_it(options: dict[str, int]) -> None:
    """Sequences together, preempted or not, with drafts and hits of the prefix cache: about the texts of FP32."""
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (40, 300, 7, 300)]
    wish = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    kept = LLM(kv_cache_dtype=torch.int8, **options)  # type: ignore[arg-type]
    wide = LLM(**options)  # type: ignore[arg-type]
    ours, again = ([out.token_ids for out in kept.generate(prompts, wish)] for _ in range(2))
    want = [out.token_ids for out in wide.generate(prompts, wish)]
    texts = zip(ours + again, want + want, strict=True)
    alike = sum(a == b for one, two in texts for a, b in zip(one, two, strict=True))
    assert alike >= 0.6 * 8 * 24
    assert kept.engine.runner.cache.nbytes < 0.6 * wide.engine.runner.cache.nbytes
    assert fingerprint(kept.model) != fingerprint(wide.model)
    kept.close()
    wide.close()


def test_it_is_refused_where_no_kernels_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(WIDE)
    model.cache_in(torch.int8)
    monkeypatch.setattr(compiled, "plan", lambda model, step=None, heads=False: None)
    with pytest.raises(InputError, match="int8"):
        model.new_cache(1, 1)
