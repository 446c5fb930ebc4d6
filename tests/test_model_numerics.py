"""numerics="official" rounds what the official code rounds, by an independent reference; and BF16 stays close."""

from __future__ import annotations

from itertools import cycle

import ml_dtypes
import numpy as np
import pytest
import torch
from models import Session, assert_close, fill, path, random_ids
from plain_v4 import PlainV4, fp4_rounded, fp8_rounded, hadamard_matrix
from torch import Tensor

from upwell.checkpoint import load_model, save_checkpoint
from upwell.config import ModelConfig, Yarn
from upwell.model import Transformer
from upwell.model.compressor import fake_fp8_nope
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.ops.fake_quant import fake_fp4, fake_fp8, hadamard

LENGTH = 42
# Hidden 160: groups of 128 with a ragged last; a nope part of two groups of 64; a Hadamard of 32.
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=160, num_hidden_layers=3, compress_ratios=(0, 4, 8), num_attention_heads=4,
    head_dim=144, qk_rope_head_dim=16, q_lora_rank=48, o_lora_rank=24, o_groups=2, sliding_window=11, index_n_heads=16,
    index_head_dim=32, index_topk=5, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
    num_hash_layers=1, routed_scaling_factor=1.5, swiglu_limit=10.0, yarn=Yarn(16, 128, 4, 1), hca_ratio=8,
    num_nextn_predict_layers=1, max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint in the released format: FP8 matrices, FP4 experts."""
    model = Transformer(CONFIG).eval()
    fill(model, 3, CONFIG.n_routed_experts)
    path = tmp_path_factory.mktemp("official")
    save_checkpoint(model, path, quantize=True)
    return str(path)


@pytest.fixture(scope="module")
def exact(directory: str) -> Transformer:
    return load_model(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def official(directory: str) -> Transformer:
    return load_model(directory, dtype=torch.float32, numerics="official")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(1, LENGTH + 1, 7)[0]


def forward(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [S, V] and MTP's drafts [S, V]."""
    with torch.no_grad():
        streams = model.streams(ids[None, :-1])
        return model.logits(streams), model.draft(ids[None, 1:], streams)[0]


def plain_forward(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    second = PlainV4(model)
    streams = second.streams(ids[:-1].tolist())
    drafts, _ = second.draft(ids[1:].tolist(), streams)
    return torch.from_numpy(second.logits(streams)).float(), torch.from_numpy(drafts).float()


def distances(ours: Tensor, reference: Tensor) -> Tensor:
    """Each position's error relative to its logits' length, [S]."""
    return (ours - reference).norm(dim=-1) / reference.norm(dim=-1)


# The roundings


def samples() -> Tensor:
    """Rows of 128 at many scales, with zeros, exact limits, and values just beyond a power of two times the limit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 128, generator=generator) * 10.0 ** torch.linspace(-9, 6, 40)[:, None]
    x[3] = 0
    x[5, ::7] = 0
    for row, power in enumerate(range(-12, 12)):
        edge = torch.tensor((448.0, 6.0)[row % 2] * 2.0**power)
        x[row + 10] = x[row + 10] / x[row + 10].abs().max() * edge
        x[row + 10, 0] = torch.nextafter(edge, torch.tensor(float("inf"))) if row % 3 else edge
    return x


@pytest.mark.parametrize("group", [64, 128])
def test_fp8_rounding(group: int) -> None:
    x = samples()
    ours = fake_fp8(x, group)
    expected = np.stack([fp8_rounded(row, group) for row in x.double().numpy()])
    assert np.array_equal(ours.double().numpy(), expected)
    assert torch.equal(fake_fp8(ours, group), ours)
    assert not torch.equal(ours, x)


def test_fp8_rounding_of_a_ragged_last_group() -> None:
    x = samples()[:, :100]
    expected = np.stack([fp8_rounded(row, 64) for row in x.double().numpy()])
    assert np.array_equal(fake_fp8(x, 64).double().numpy(), expected)


def test_fp4_rounding() -> None:
    x = samples()
    ours = fake_fp4(x, 32)
    expected = np.stack([fp4_rounded(row, 32) for row in x.double().numpy()])
    assert np.array_equal(ours.double().numpy(), expected)
    assert torch.equal(fake_fp4(ours, 32), ours)


def test_fp4_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.cat((ties, -ties)).repeat(2)
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert fake_fp4(x, 32).tolist() == expected.tolist()


def test_rounding_passes_gradients_straight_through() -> None:
    for rounded in (lambda x: fake_fp8(x, 64), lambda x: fake_fp4(x, 32)):
        x = torch.linspace(-3, 3, 64).requires_grad_()
        y = rounded(x)
        assert not torch.equal(y.detach(), x.detach())
        torch.testing.assert_close(y.detach(), rounded(x.detach()))
        (y * torch.arange(64.0)).sum().backward()
        assert torch.equal(x.grad, torch.arange(64.0))


def in_steps(groups: int, size: int) -> Tensor:
    """One row whose groups lie 2^12 apart: in a larger neighbour's scale a group would lose bits."""
    x = torch.randn(groups, size, generator=torch.Generator().manual_seed(4))
    return (x * 2.0 ** (-12 * torch.arange(groups))[:, None]).flatten()[None]


def test_a_latents_nope_part_is_rounded_in_groups_of_64() -> None:
    x = torch.cat((in_steps(3, 64), torch.randn(1, 16)), dim=1)
    ours = fake_fp8_nope(x, 16)[0]
    assert np.array_equal(ours[:192].double().numpy(), fp8_rounded(x[0, :192].double().numpy(), 64))
    assert torch.equal(ours[192:], x[0, 192:])


def test_inputs_are_rounded_in_groups_of_128() -> None:
    layer = Linear(384, 384)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(384))
    x = in_steps(3, 128)
    assert torch.equal(layer(x), x)
    layer.quantize_input = True
    expected = fp8_rounded(x[0].double().numpy(), 128)
    assert np.array_equal(layer(x)[0].detach().double().numpy(), expected)


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_hadamard(n: int) -> None:
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ torch.from_numpy(hadamard_matrix(n)).t()
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-5)


# The model


def test_exact_numerics_from_packed_weights(exact: Transformer, ids: Tensor) -> None:
    references = plain_forward(exact, ids)
    for ours, plain in zip(forward(exact, ids), references, strict=True):
        assert_close(ours, plain, tolerance=2e-5)
    for by in ("modules", "kernels"):
        with path(by):
            session = Session(exact, [ids], mtp=True).feed_all(cycle([5, 1, 1, 13, 2]))
        assert_close(session.result()[:-1], references[0], by, 2e-5)
        assert_close(torch.cat(session.drafts[0])[:-1], references[1], by, 2e-5)


def test_official_numerics_against_the_reference(exact: Transformer, official: Transformer, ids: Tensor) -> None:
    """To FP32's precision, though FP32 and float64 may fall on either side of a rounding boundary: where one does,
    the positions that read that value differ by a part of a rounding step, so it's the median that must hold."""
    references = plain_forward(official, ids)
    for ours, without, reference in zip(forward(official, ids), forward(exact, ids), references, strict=True):
        assert distances(without, reference).median() > 0.01
        error = distances(ours, reference)
        assert error.median() < 1e-5, f"median {error.median():.1e}"
        assert (error < distances(without, reference)).all()


def test_official_numerics_change_no_weight(exact: Transformer, official: Transformer) -> None:
    for (name, a), (_, b) in zip(exact.state_dict().items(), official.state_dict().items(), strict=True):
        assert torch.equal(a.float(), b.float()), name


def test_inputs_are_rounded_in_front_of_quantized_weights_only(exact: Transformer, official: Transformer) -> None:
    rounded = {name for name, m in official.named_modules() if isinstance(m, Linear) and m.quantize_input}
    quantized = {name for name, m in official.named_modules() if isinstance(m, Linear) and m.scale is not None}
    assert rounded == {name for name in quantized if not name.endswith("wo_a")}
    leaves = {name.split(".", 2)[-1] for name in rounded if name.startswith("layers.1.")}
    assert leaves == {
        "attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b", "attn.indexer.wq_b",
        "ffn.shared_experts.w1", "ffn.shared_experts.w2", "ffn.shared_experts.w3",
    }  # fmt: skip
    assert {"mtp.0.e_proj", "mtp.0.h_proj"} <= rounded
    assert all(m.quantize_input for m in official.modules() if isinstance(m, Experts))
    assert not any(m.quantize_input for m in exact.modules() if isinstance(m, (Linear, Experts)))


def test_cached_latents_and_index_keys_hold_rounded_values(official: Transformer, ids: Tensor) -> None:
    session = Session(official, [ids]).feed_all(cycle([9, 1, 1]))
    rows = Session(official, [ids]).tables[0]
    nope = CONFIG.nope_head_dim
    for layer, ratio in zip(session.cache.layers, CONFIG.compress_ratios, strict=True):
        stored = [layer.window[session.slots[0]]]
        entries = len(ids) // ratio if ratio else 0
        if layer.entries is not None:
            stored.append(layer.entries[rows[0], :entries])
        for latents in stored:
            for latent in latents.double().numpy():
                assert np.array_equal(fp8_rounded(latent[:nope], 64), latent[:nope])
                assert not np.array_equal(fp8_rounded(latent, 64), latent)  # the rotary part isn't rounded
        if layer.index_keys is not None:
            for key in layer.index_keys[rows[0], :entries].double().numpy():
                assert np.array_equal(fp4_rounded(key, 32), key)


@pytest.mark.parametrize("sizes", [[1], [5, 1, 1, 13, 2]], ids=["step by step", "odd chunks"])
def test_official_numerics_in_pieces(official: Transformer, ids: Tensor, sizes: list[int]) -> None:
    whole, drafts = forward(official, ids)
    session = Session(official, [ids], mtp=True).feed_all(cycle(sizes))
    for ours, expected in ((session.result()[:-1], whole), (torch.cat(session.drafts[0])[:-1], drafts)):
        error = distances(ours, expected)
        assert error.median() < 1e-5, f"median {error.median():.1e}"


# BF16


@pytest.mark.parametrize("numerics", ["exact", "official"])
def test_bf16_is_close_to_fp32(directory: str, numerics: str, ids: Tensor) -> None:
    model = load_model(directory, dtype=torch.bfloat16, numerics=numerics)  # type: ignore[arg-type]
    wide = load_model(directory, dtype=torch.float32, numerics=numerics)  # type: ignore[arg-type]
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> object:
        return lambda module, args, out: seen.__setitem__(name, (out[1] if isinstance(out, tuple) else out).dtype)

    for name, module in model.named_modules():
        if name.endswith(("ffn.gate", "attn", "ffn", "hc_head")):
            module.register_forward_hook(note(name))
    narrow_logits, narrow_drafts = forward(model, ids)
    logits, drafts = forward(wide, ids)
    assert narrow_logits.dtype == torch.float32
    for name, dtype in seen.items():
        assert dtype == (torch.float32 if name.endswith("gate") else torch.bfloat16), name
    for name, tensor in model.state_dict().items():
        if any(part in name for part in ("hc_", "norm", "ape", "attn_sink", "gate.bias")):
            assert tensor.dtype == torch.float32, name
    for ours, expected in ((narrow_logits, logits), (narrow_drafts, drafts)):
        correlation = torch.nn.functional.cosine_similarity(ours, expected)
        agreement = (ours.argmax(-1) == expected.argmax(-1)).float().mean()
        # BF16 values often fall on the other side of FP8's and FP4's boundaries.
        least, least_agreement = (0.99, 0.7) if numerics == "exact" else (0.97, 0.4)
        assert correlation.median() > least, f"{correlation.median():.4f}"
        assert agreement > least_agreement, f"{agreement:.2f}"


def test_bf16_in_pieces(directory: str, ids: Tensor) -> None:
    model = load_model(directory, dtype=torch.bfloat16)
    whole, _ = forward(model, ids)
    for sizes in ([1], [5, 1, 1, 13, 2]):
        ours = Session(model, [ids]).feed_all(cycle(sizes)).result()[:-1]
        correlation = torch.nn.functional.cosine_similarity(ours, whole)
        assert correlation.median() > 0.99 and correlation[:5].min() > 0.99


def test_mixing_and_routing_weights_are_fp32_in_bf16(directory: str, ids: Tensor) -> None:
    model = load_model(directory, dtype=torch.bfloat16)
    streams = torch.randn(3, CONFIG.hc_mult, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    block = model.layers[1]
    with torch.no_grad():
        u, _, post, comb = block.hc_attn.enter(streams.bfloat16(), block.attn_norm)
        _, weights = block.ffn.gate(u, ids[:3])
    assert (u.dtype, post.dtype, comb.dtype, weights.dtype) == (torch.bfloat16, *[torch.float32] * 3)
    # Values, not only dtypes: as fine as FP32's, on the same BF16 streams.
    with torch.no_grad():
        _, _, wide_post, wide_comb = block.hc_attn.enter(streams.bfloat16().float(), block.attn_norm)
    torch.testing.assert_close(post, wide_post, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(comb, wide_comb, rtol=1e-5, atol=1e-6)
