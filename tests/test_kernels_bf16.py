"""Products of BF16 operands: single ones and whole models, against the plain operations with operands rounded."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import BASE, cut, outputs, random_model
from test_kernels_packed import KINDS, drawn_weight, random_weight
from torch import Tensor

from upwell.checkpoint import load_model, save_checkpoint
from upwell.engine import LLM, SamplingParams
from upwell.engine.fingerprint import fingerprint
from upwell.engine.llm import nano_path
from upwell.formats.fp4 import quantize_fp4
from upwell.formats.fp8 import quantize_fp8
from upwell.model import Transformer, compiled, layers, moe
from upwell.model import attention as model_attention
from upwell.ops import attention, hyper_connections, native
from upwell.ops.linear import dense_weight, linear
from upwell.ops.moe import swiglu

needs_kernels = pytest.mark.skipif(native.library() is None, reason="rounding is the kernels'; none are built here")


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


@needs_kernels
@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_products_are_those_of_rounded_operands(isa: str, data: st.DataObject) -> None:
    tokens, rows, cols = (data.draw(st.integers(1, most)) for most in (280, 90, 200))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x, weight = torch.randn(tokens, cols, generator=generator), torch.randn(rows, cols, generator=generator)
    a, b = rounded(x).double(), rounded(weight).double()
    off = (native.product(x, native.pairs(weight), out_features=rows) - a @ b.T).abs()
    assert (off <= 2e-6 * (a.abs() @ b.abs().T)).all()


@needs_kernels
def test_values_halfway_go_to_the_even_one(isa: str) -> None:
    x = torch.tensor([[1 + 2**-8], [1 + 3 * 2**-8], [1 + 2**-8 + 2**-20], [-1 - 2**-8]])
    want = torch.tensor([[1.0], [1 + 2**-6], [1 + 2**-7], [-1.0]])
    assert torch.equal(native.product(x, native.pairs(torch.ones(1, 1)), out_features=1), want)
    assert torch.equal(native.product(torch.ones(1, 1), native.pairs(x), out_features=4), want.T)


@needs_kernels
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, 1e-41, 3e38])
def test_extremes_are_where_plain_has_them(isa: str, value: float) -> None:
    x, weight = torch.ones(3, 5), torch.ones(40, 5)
    x[1, 2] = value
    got = native.product(x, native.pairs(weight), out_features=40)
    want = rounded(x) @ weight.T
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-30, equal_nan=True)
    weight[7, 4] = value
    got = native.product(torch.ones(2, 5), native.pairs(weight), out_features=40)
    assert torch.allclose(got, torch.ones(2, 5) @ rounded(weight).T, rtol=1e-6, atol=1e-30, equal_nan=True)


def multiplied(x: Tensor) -> Tensor:
    """What packed weights meet with `rounds`: x rounded where the CPU has dot products, with NEON from 6 rows on."""
    least = 1 if platform.machine() == "x86_64" else 6
    return rounded(x) if native.bf16_dots() and len(x) >= least else x


@needs_kernels
@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_products_with_packed_weights_are_those_of_rounded_inputs(isa: str, data: st.DataObject) -> None:
    lows = [-3, -40, -66, -100, 20]  # from 2^+-63 on the plain decode serves
    weight, scale, cols, seed = drawn_weight(data, 2300, lows)
    tokens = data.draw(st.one_of(st.integers(1, 10), st.integers(11, 96)))  # more are cut again
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    a, b = multiplied(x).double(), dense_weight(weight, scale, torch.float32).double()
    off = (native.product(x, weight, scale, rounds=True).double() - a @ b.T).abs()
    assert (off <= 2e-6 * (a.abs() @ b.abs().T) + 1e-37).all()


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-45, 1e-40, 0.0, -0.0])
def test_extremes_meet_packed_weights(isa: str, kind: str, value: float) -> None:
    weight, scale = random_weight(kind, 40, 160, 7, (-12, -8))
    for tokens in (1, 2, 8, 19):
        x = torch.randn(tokens, 160, generator=torch.Generator().manual_seed(2))
        x[-1, 77] = value
        got, plain = native.product(x, weight, scale, rounds=True), linear(multiplied(x), weight, scale)
        assert torch.equal(got.isnan(), plain.isnan()) and torch.equal(got.isinf(), plain.isinf())
        finite, largest = plain.isfinite(), x.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
        assert ((got - plain).abs() <= 1e-4 * (1 + plain.abs()) + 1e-4 * largest)[finite].all()
        only = torch.full_like(x, value if abs(value) < 1 else 0.0)  # nothing but zeros or subnormals
        assert (native.product(only, weight, scale, rounds=True).abs() <= 1e-37).all()


def plain_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return rounded(x) @ rounded(dense_weight(weight, scale, torch.float32)).T


def plain_expert(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float) -> Tensor:
    return plain_linear(swiglu(plain_linear(x, w1), plain_linear(x, w3), limit), w2)


def plain_experts(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    out, inter = torch.zeros_like(x), w2.shape[2]
    for t, (chosen, shares) in enumerate(zip(experts.tolist(), weights, strict=True)):
        for e, share in zip(chosen, shares, strict=True):
            out[t] += share * plain_expert(x[t : t + 1], w13[e, :inter], w13[e, inter:], w2[e], limit)[0]
    return out


def plain_attention(q: Tensor, keys: Tensor, hidden: Tensor, sink: Tensor) -> Tensor:
    """Scaled q [B, S, H, d] over keys [B, N, d], hidden [S, N]; in BF16 where the CPU has dot products of it."""
    on_pairs = rounded if native.bf16_dots() else lambda x: x
    scores = torch.einsum("bshd,bnd->bshn", on_pairs(q), on_pairs(keys)).masked_fill(hidden[:, None], float("-inf"))
    most = torch.maximum(scores.amax(-1, keepdim=True), sink.view(-1, 1))
    probs = (scores - most).exp()
    total = probs.sum(-1, keepdim=True) + (sink.view(-1, 1) - most).exp()
    return torch.einsum("bshn,bnd->bshd", on_pairs(probs), on_pairs(keys)) / total


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def selected_by(attend: Attend) -> Callable[..., Tensor]:
    """attention._attend_selected, each query's rows by `attend`."""

    def selected(q: Tensor, keys: Tensor, hidden: Tensor, entries: Tensor, picks: Tensor, sink: Tensor) -> Tensor:
        steps = []
        for s in range(q.shape[1]):
            chosen = attention.gather_entries(entries, picks[:, s : s + 1].clamp(min=0))[:, 0]
            out = []
            for b in range(len(q)):
                not_these = torch.cat((hidden[s], picks[b, s] < 0)).unsqueeze(0)
                own = torch.cat((keys[b], chosen[b])).unsqueeze(0)
                out.append(attend(q[b : b + 1, s : s + 1], own, not_these, sink))
            steps.append(torch.cat(out))
        return torch.cat(steps, 1)

    return selected


def step_by(attend: Attend) -> Callable[..., Tensor]:
    """attention.attend_step, each sequence's rows by `attend`."""

    def step(q: Tensor, keys: Tensor, valid: Tensor, sink: Tensor) -> Tensor:
        scaled = q.unsqueeze(1) * q.shape[-1] ** -0.5
        each = zip(scaled.unsqueeze(1), keys.unsqueeze(1), valid.unsqueeze(1), strict=True)
        return torch.cat([attend(a, b, ~ok, sink) for a, b, ok in each]).squeeze(1)

    return step


def plain_stream_logits(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    flat = streams.flatten(1)
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return multiplied(flat) @ (rounded(fn) if native.bf16_dots() else fn).T * scale


def plain(model: Transformer, ids: Tensor, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits by the modules with the operands rounded of all products but the router's and the indexer's."""
    bmm, groups = torch.bmm, model.config.o_groups  # wo_a's; mHC's go by tokens
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "plan", lambda model, step=None, heads=False: None)
        patch.setattr(layers, "linear", plain_linear)
        patch.setattr(attention, "_attend_block", plain_attention)
        patch.setattr(attention, "_attend_selected", selected_by(plain_attention))
        patch.setattr(attention, "attend_step", step_by(plain_attention))
        patch.setattr(model_attention, "attend_step", step_by(plain_attention))
        patch.setattr(moe, "grouped_experts", plain_experts)
        patch.setattr(hyper_connections, "stream_logits", plain_stream_logits)
        patch.setattr(torch, "bmm", lambda a, b: bmm(rounded(a), rounded(b)) if len(a) == groups else bmm(a, b))
        return outputs(model, ids, cuts)[0]


WIDE = dataclasses.replace(BASE, index_topk=80)  # every entry is taken: a choice may hang by rounding
CONFIGS = {
    "few heads": WIDE,
    "many heads": dataclasses.replace(WIDE, num_attention_heads=18, head_dim=36, sliding_window=31),
    "picks": dataclasses.replace(WIDE, index_topk=7),
}


@needs_kernels
@pytest.mark.parametrize("cached", [0, 8 << 20])  # layers cut by weights, and by tokens
@pytest.mark.parametrize("sizes", [[300], [1], [7, 1, 100, 33]])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_models_equal_the_modules_with_rounded_operands(
    isa: str, name: str, sizes: list[int], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_CACHED_BYTES", cached)
    model = random_model(CONFIGS[name], 1, 0.1)
    total = 40 if sizes == [1] else 300
    ids = torch.randint(0, 64, (2, total), generator=torch.Generator().manual_seed(2))
    cuts = cut(total, sizes)
    exact, _ = outputs(model, ids, cuts)
    model.multiply_in(torch.bfloat16)
    ours, want = outputs(model, ids, cuts)[0], plain(model, ids, cuts, monkeypatch)
    scale = want.abs().max()
    off, unrounded = ((x - want).abs().amax(-1) / scale for x in (ours, exact))
    # At first nothing differs; later now and then a value that lies halfway is rounded the other way, and is read on.
    assert (off[:, :16] <= 1e-6).float().mean() >= 0.25 and (unrounded[:, :16] >= 1e-5).all()
    assert off.median() <= 1e-3 and off.quantile(0.95) <= 5e-3 and unrounded.median() >= 1.5e-3
    model.multiply_in(torch.float32)
    assert torch.equal(outputs(model, ids, cuts)[0], exact)


@needs_kernels
@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@torch.no_grad()
def test_packed_weights_give_the_same(isa: str, kind: str, decoded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In panels, or (larger models) in panels made on the way: 200 tokens are more than registers serve."""
    if not decoded:
        monkeypatch.setattr(compiled, "_DECODED_BYTES", 0)
    config = dataclasses.replace(WIDE, hidden_size=160, moe_intermediate_size=96, q_lora_rank=64, num_hash_layers=3)
    model, dense = (random_model(config, 3, 0.05) for _ in range(2))
    quantize = quantize_fp8 if kind == "fp8" else quantize_fp4
    for block, wide in zip(model.layers, dense.layers, strict=True):
        routed, stacked, packed = block.ffn.experts, wide.ffn.experts, []
        for e in range(config.n_routed_experts):
            parts = dict(zip(("w1", "w3", "w2"), (*routed.w13[e].chunk(2), routed.w2[e]), strict=True))
            packed.append({name: quantize(part.contiguous()) for name, part in parts.items()})
            decode = {name: dense_weight(*pair, torch.float32) for name, pair in packed[-1].items()}
            stacked.w13[e], stacked.w2[e] = torch.cat((decode["w1"], decode["w3"])), decode["w2"]
        routed.pack(packed)
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(2))
    for each in (model, dense):
        each.multiply_in(torch.bfloat16)
    ours, want = outputs(model, ids, [200])[0], outputs(dense, ids, [200])[0]
    # Few rows of an expert are multiplied in FP32 straight from their codes: as exact as that, or the same.
    assert (ours - want).abs().max() <= (1e-5 if decoded else 2e-2) * want.abs().max()


@needs_kernels
def test_an_llm_in_bf16_holds_fp32_and_rounds(tmp_path: Path) -> None:
    model = random_model(WIDE, 4, 0.1)
    save_checkpoint(model, tmp_path, quantize=False)
    llm, exact = LLM(tmp_path, device="cpu", dtype=torch.bfloat16), LLM(tmp_path, device="cpu")
    assert (llm.model.dtype, llm.model.products) == (torch.float32, torch.bfloat16)
    assert exact.model.products == torch.float32
    assert fingerprint(llm.model) != fingerprint(exact.model)  # a prefix cache on disk must not mix them
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(5, 50))}
    alone = llm.generate(prompt, params)[0].outputs[0].token_ids
    many = llm.generate([prompt, {"prompt_token_ids": [3, 4]}, prompt], params)
    assert [many[i].outputs[0].token_ids for i in (0, 2)] == [alone, alone]


def test_without_kernels_bf16_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    llm = LLM(device="cpu", dtype=torch.bfloat16)
    assert (llm.model.dtype, llm.model.products) == (torch.bfloat16, torch.float32)


@needs_kernels
def test_nano_draws_what_it_draws_in_fp32() -> None:
    """Most of it: its choices seldom hang by a BF16 rounding."""
    held = load_model(nano_path(), dtype=torch.float32)
    ids = torch.randint(2, held.config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = outputs(held, ids, [200])[0].argmax(-1)
        held.multiply_in(torch.bfloat16)
        assert (outputs(held, ids, [200])[0].argmax(-1) == exact).float().mean() >= 0.9
