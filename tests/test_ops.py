"""Each operation against its definition, written out in loops and in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from plain_v4 import sinkhorn as literal_sinkhorn
from torch import Tensor

from upwell.config import ModelConfig, Yarn
from upwell.model import KVCache, Step
from upwell.model.cache import Tail
from upwell.model.compressor import Compressor
from upwell.model.hyper_connections import HyperConnection, settled
from upwell.model.layers import RMSNorm
from upwell.ops import attention, indexer
from upwell.ops import hyper_connections as hc
from upwell.ops.compress import overlap_windows, pool_windows
from upwell.ops.moe import grouped_experts, route, router_scores, swiglu
from upwell.ops.norm import rms_norm
from upwell.ops.rope import apply_rope, inverse_frequencies, rope_angles
from upwell.ops.topk import stable_topk


@pytest.fixture
def rand() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


# Top-k


def by_sorting(scores: Tensor, k: int) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def test_topk_breaks_ties_by_the_lowest_index(rand: Callable[..., Tensor]) -> None:
    scores = (rand(40, 90) * 2).round()  # a dozen values: ties everywhere
    picks = stable_topk(scores, 17)
    assert picks.tolist() == [by_sorting(row, 17) for row in scores]
    assert stable_topk(torch.zeros(2, 3, 50), 7).tolist() == [[list(range(7))] * 3] * 2
    close(scores.gather(1, picks), scores.topk(17).values)


def test_topk_of_signs_zeros_and_infinities() -> None:
    scores = torch.tensor([-0.0, 0.0, -1.0, float("-inf"), 2.0, -0.0, float("-inf"), -2.0, float("inf")])
    assert stable_topk(scores, 9).tolist() == [8, 4, 0, 1, 5, 2, 7, 3, 6]
    assert stable_topk(scores, 20).tolist() == [8, 4, 0, 1, 5, 2, 7, 3, 6]  # more than there are: all
    tiny = torch.tensor([1e-45, 0.0, -1e-45, 1.0, 1.0 + 2**-23])
    assert stable_topk(tiny, 5).tolist() == [4, 3, 0, 1, 2]


# Norm and rotary


def test_rms_norm(rand: Callable[..., Tensor]) -> None:
    x, weight = rand(3, 7, 22), rand(22)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(rms_norm(x, None, 1e-6), expected)
    close(rms_norm(x, weight, 1e-6), expected * weight.double())
    assert rms_norm(x.bfloat16(), weight, 1e-6).dtype == torch.bfloat16


def test_rope_rotates_pairs_of_the_last_dims_and_its_inverse_undoes_it(rand: Callable[..., Tensor]) -> None:
    x, positions = rand(2, 5, 3, 22), torch.tensor([[0, 1, 7, 4096, 1048575], [3, 2, 1, 0, 70000]])
    cos, sin = (a.unsqueeze(2) for a in rope_angles(positions, inverse_frequencies(10, 10000.0, None)))
    rotated = apply_rope(x, cos, sin)
    assert torch.equal(rotated[..., :12], x[..., :12])
    close(apply_rope(rotated, cos, sin, inverse=True), x)
    pairs = torch.view_as_complex(x[1, 3, :, 12:].reshape(3, 5, 2))
    close(rotated[1, 3], x[1, 3])  # position 0
    pairs = torch.view_as_complex(x[0, 2, :, 12:].double().reshape(3, 5, 2))
    turn = torch.polar(torch.ones(5).double(), 7 * 10000.0 ** (-2 * torch.arange(5).double() / 10))
    close(rotated[0, 2, :, 12:], torch.view_as_real(pairs * turn).flatten(1))


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    plain = inverse_frequencies(64, 160000.0, None)
    ratio = inverse_frequencies(64, 160000.0, Yarn(16, 65536, 32, 1)) / plain
    low = math.floor(64 * math.log(65536 / (32 * 2 * math.pi)) / (2 * math.log(160000)))
    high = math.ceil(64 * math.log(65536 / (2 * math.pi)) / (2 * math.log(160000)))
    assert (low, high) == (15, 25)
    close(ratio[: low + 1], torch.ones(low + 1))
    close(ratio[high:], torch.full((32 - high,), 1 / 16))
    close(ratio[20], torch.tensor(0.5 / 16 + 0.5))


# Hyper-connections


def test_sinkhorn_is_the_literal_iteration_and_doubly_stochastic(rand: Callable[..., Tensor]) -> None:
    logits = rand(4, 4, 9) * 2
    ours = hc.sinkhorn(logits, 20, 1e-6)
    for t in range(9):
        close(ours[:, :, t], torch.from_numpy(literal_sinkhorn(logits[:, :, t].double().numpy(), 20, 1e-6)))
    close(ours.sum(0), torch.ones(4, 9))
    close(ours.sum(1), torch.ones(4, 9), 2e-2)  # rows come before the last columns: converged, not exact
    close(hc.sinkhorn(logits, 500, 1e-6).sum(1), torch.ones(4, 9), 1e-4)
    one = hc.sinkhorn(logits, 1, 1e-6)[:, :, 0]  # one iteration: columns only
    close(one, torch.from_numpy(literal_sinkhorn(logits[:, :, 0].double().numpy(), 1, 1e-6)))


def literal_hyper_connection(
    x: Tensor, sublayer: Callable[[Tensor], Tensor], fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Section 2.2 in the precision of its arguments: the sublayer's normed input [T, D], and the next streams
    [T, h, D]."""
    h = x.shape[1]
    f = x.flatten(1)
    z = f @ fn.t() / (f.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    pre = torch.sigmoid(z[:, :h] * scale[0] + base[:h]) + 1e-6
    post = 2 * torch.sigmoid(z[:, h : 2 * h] * scale[1] + base[h : 2 * h])
    c = torch.softmax((z[:, 2 * h :] * scale[2] + base[2 * h :]).view(-1, h, h), dim=-1) + 1e-6
    c = c / (c.sum(dim=-2, keepdim=True) + 1e-6)
    for _ in range(iterations - 1):
        c = c / (c.sum(dim=-1, keepdim=True) + 1e-6)
        c = c / (c.sum(dim=-2, keepdim=True) + 1e-6)
    u = torch.stack([sum(pre[t, i] * x[t, i] for i in range(h)) for t in range(len(x))])
    u = u / (u.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * norm
    y = sublayer(u)
    return u, torch.einsum("tj,td->tjd", post, y) + torch.einsum("tij,tid->tjd", c, x)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("tokens", "h", "dim"), [(5, 4, 30), (1, 4, 32), (300, 4, 17), (6, 2, 16)])
def test_hyper_connection_and_its_gradients(
    rand: Callable[..., Tensor], grad: bool, tokens: int, h: int, dim: int
) -> None:
    """Two sublayers, one after the other, by whichever kernels are built here (training has C++ ones, which cross from
    one to the next in one node) against autograd in double precision."""
    config = replace(ModelConfig.preset("v4-flash"), hidden_size=dim, hc_mult=h)
    module, norm = HyperConnection(config), RMSNorm(dim, config.rms_norm_eps)
    weight = rand(dim, dim) * 0.3
    with torch.no_grad():
        module.fn.copy_(rand(*module.fn.shape) * (h * dim) ** -0.5 * 2)
        module.base.copy_(rand(*module.base.shape))
        module.scale.copy_(1 + rand(3) * 0.3)
        norm.weight.copy_(1 + rand(dim) * 0.3)
    singles = [rand(tokens, h, dim).requires_grad_(), module.fn, module.base, module.scale, norm.weight]
    streams, doubles = singles[0], [p.detach().double().requires_grad_() for p in singles]
    u64, out64 = torch.zeros(tokens, dim), doubles[0]
    for _ in range(2):
        entered, out64 = literal_hyper_connection(
            out64, lambda u: torch.tanh(u @ weight.double().t()), *doubles[1:], config.hc_sinkhorn_iters
        )
        u64 = u64 + entered
    with torch.set_grad_enabled(grad):
        first, passed, post, comb = module.enter(streams, norm)
        between = module.leave(passed, torch.tanh(first @ weight.t()), post, comb)
        second, passed, post, comb = module.enter(between, norm)
        u, out = first + second, settled(module.leave(passed, torch.tanh(second @ weight.t()), post, comb))
    close(u.detach(), u64.detach())
    close(out.detach(), out64.detach())
    if not grad:
        return
    toward_u, toward_out = rand(*u.shape), rand(*out.shape)
    ((u * toward_u).sum() + (out * toward_out).sum()).backward()
    ((u64 * toward_u).sum() + (out64 * toward_out).sum()).backward()
    for name, ours, expected in zip(
        ("streams", "fn", "base", "scale", "norm"), singles, doubles, strict=True
    ):
        assert ours.grad is not None and expected.grad is not None
        error = (ours.grad.double() - expected.grad).abs().max() / expected.grad.abs().max()
        assert error < 2e-5, f"gradient of {name} off by {error:.1e}"


# Attention


def naive_attention(
    q: Tensor, latents: Tensor, entries: Tensor | None, sink: Tensor, start: int, window: int, ratio: int,
    selected: Tensor | None,
) -> Tensor:  # fmt: skip
    """One softmax a query and head, over a list of keys. latents [B, start + S, d] from position 0."""
    batch, steps, heads, dim = q.shape
    out = torch.zeros(batch, steps, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for s in range(steps):
            t = start + s
            keys = [latents[b, j] for j in range(t + 1) if t - j < window]
            if entries is not None:
                chosen = range(entries.shape[1]) if selected is None else [w for w in selected[b, s].tolist() if w >= 0]
                keys += [entries[b, w] for w in chosen if w < (t + 1) // ratio]
            k = torch.stack(keys).double()
            for head in range(heads):
                e = torch.exp(k @ q[b, s, head].double() * dim**-0.5)
                out[b, s, head] = (e / (e.sum() + sink[head].double().exp())) @ k
    return out


@pytest.mark.parametrize("start", [0, 3, 19])
@pytest.mark.parametrize("kind", ["sliding", "all entries", "selected"])
@pytest.mark.parametrize("bound", [32 << 20, 1], ids=["one gather", "a query at a time"])
def test_attention(
    rand: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, start: int, kind: str, bound: int
) -> None:
    monkeypatch.setattr(attention, "_GATHER_BYTES", bound)
    window, ratio, steps = 6, 4, 15
    q, latents, sink = rand(2, steps, 3, 10), rand(2, start + steps, 10), rand(3)
    entries = None if kind == "sliding" else rand(2, (start + steps) // ratio, 10)
    selected = None
    if kind == "selected":
        assert entries is not None
        visible = (start + torch.arange(steps) + 1) // ratio
        selected = indexer.select_entries(rand(2, steps, entries.shape[1]), visible.expand(2, -1), 3)
        assert (selected == -1).any() or start > 12
    expected = naive_attention(q, latents, entries, sink, start, window, ratio, selected)
    kept = latents[:, max(0, start - window + 1) :]
    ours = attention.attend(q, kept, entries, sink, start, window, ratio, selected)
    close(ours, expected)
    # More of the past than the window holds changes nothing.
    close(attention.attend(q, latents, entries, sink, start, window, ratio, selected), expected)


def test_attention_of_one_token_a_sequence(rand: Callable[..., Tensor]) -> None:
    q, keys, sink = rand(3, 4, 10), rand(3, 9, 10), rand(4)
    valid = torch.tensor([[True] * 9, [True] + [False] * 8, [False, True] * 4 + [False]])
    ours = attention.attend_step(q, keys, valid, sink)
    for b in range(3):
        expected = naive_attention(
            q[b][None, None], keys[b][valid[b]][None], None, sink, int(valid[b].sum()) - 1, 99, 0, None
        )
        close(ours[b], expected[0, 0])


def test_a_large_sink_takes_all_and_a_small_one_nothing(rand: Callable[..., Tensor]) -> None:
    q, kv = rand(1, 4, 2, 10), rand(1, 4, 10)
    out = attention.attend(q, kv, None, torch.tensor([60.0, -60.0]), 0, 8, 0)
    assert out[:, :, 0].abs().max() < 1e-20
    close(out[0, 0, 1], kv[0, 0])


# Indexer


@pytest.mark.parametrize("bound", [64 << 20, 1])
def test_index_scores_and_selection(rand: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    monkeypatch.setattr(indexer, "_SCORE_BYTES", bound)
    queries, keys, weights = rand(2, 5, 3, 8), rand(2, 7, 8), rand(2, 5, 3)
    scores = indexer.index_scores(queries, keys, weights)
    for b in range(2):
        for s in range(5):
            for w in range(7):
                dots = [float(queries[b, s, h].double() @ keys[b, w].double()) for h in range(3)]
                expected = sum(float(weights[b, s, h]) * max(d, 0.0) for h, d in enumerate(dots))
                assert abs(float(scores[b, s, w]) - expected) < 1e-5
    visible = torch.tensor([[0, 1, 2, 3, 7], [7, 6, 5, 4, 3]])
    picks = indexer.select_entries(scores, visible, 3)
    for b in range(2):
        for s in range(5):
            n = int(visible[b, s])
            expected_picks = by_sorting(scores[b, s, :n], 3)
            assert picks[b, s].tolist()[: len(expected_picks)] == expected_picks
            assert picks[b, s].tolist()[len(expected_picks) :] == [-1] * (3 - len(expected_picks))


def test_dead_indexer_scores_select_the_oldest_entries() -> None:
    # Every relu at zero: transformers' choice is arbitrary there, ours is the lowest indices.
    picks = indexer.select_entries(torch.zeros(1, 1, 40), torch.tensor([[33]]), 5)
    assert picks.tolist() == [[[0, 1, 2, 3, 4]]]


# Compressor


def test_pooling_is_a_softmax_per_channel(rand: Callable[..., Tensor]) -> None:
    kv, gate = rand(3, 5, 6), rand(3, 5, 6)
    gate[0, :2] = float("-inf")
    for n in range(3):
        for d in range(6):
            e = gate[n, :, d].double().exp()
            close(pool_windows(kv, gate)[n, d], (e * kv[n, :, d].double()).sum() / e.sum())


def test_overlap_takes_the_a_half_of_the_window_before(rand: Callable[..., Tensor]) -> None:
    kv, gate = rand(1, 3, 4, 10), rand(1, 3, 4, 10)
    prior_kv, prior_gate = rand(1, 4, 5), rand(1, 4, 5)
    for prior in ((None, None), (prior_kv, prior_gate)):
        slots_kv, slots_gate = overlap_windows(kv, gate, *prior)
        for w in range(3):
            assert torch.equal(slots_kv[0, w, 4:], kv[0, w, :, 5:])
            assert torch.equal(slots_gate[0, w, 4:], gate[0, w, :, 5:])
        assert torch.equal(slots_kv[0, 1:, :4], kv[0, :2, :, :5])
        if prior[0] is None:
            assert torch.equal(slots_gate[0, 0, :4], torch.full((4, 5), float("-inf")))
        else:
            assert torch.equal(slots_kv[0, 0, :4], prior_kv[0]) and torch.equal(slots_gate[0, 0, :4], prior_gate[0])


@pytest.mark.parametrize("ratio", [4, 8])
def test_compressor_in_any_pieces(rand: Callable[..., Tensor], ratio: int) -> None:
    config = replace(
        ModelConfig.preset("v4-flash"), hidden_size=14, head_dim=10, index_head_dim=10, qk_rope_head_dim=4, hca_ratio=8,
        compress_ratios=(4,) * 43,
    )  # fmt: skip
    compressor = Compressor(config, ratio, 10, "exact")
    with torch.no_grad():
        for p in compressor.parameters():
            p.copy_(rand(*p.shape))
    x, freqs = rand(29, 14), inverse_frequencies(4, 160000.0, None)
    with torch.no_grad():
        whole = compressor(x[None], freqs)[0]
        assert whole.shape == (29 // ratio, 10)
        for pieces in ([29], [1] * 29, [3, 4, 1, 9, 12], [8, 8, 13], [5, 24], [28, 1], [7, 1, 1, 1, 19]):
            overlap = 2 if ratio == 4 else 1
            tail = Tail(3, overlap * ratio, overlap * 10, torch.device("cpu"))
            tail.kv.fill_(1e3), tail.gate.fill_(1e3)  # a former sequence's
            made, start = [], 0
            for n in pieces:
                if n == 1 and start % 2:  # decode and prefill take turns
                    entry = compressor.step(x[start : start + 1], Step([2], [start], [1], [[0]]), tail, freqs)
                    assert (entry is not None) == ((start + 1) % ratio == 0)
                    if entry is not None:
                        made.append(entry)
                else:
                    made.append(compressor.extend(x[start : start + n], 2, start, tail, freqs))
                start += n
            close(torch.cat(made), whole)


# Experts


def test_router(rand: Callable[..., Tensor]) -> None:
    x, weight, bias = rand(6, 12), rand(9, 12), rand(9)
    scores = router_scores(x, weight)
    close(scores, torch.log1p((x.double() @ weight.double().t()).exp()).sqrt())
    experts, weights = route(scores, 3, 1.5, bias, None)
    table = torch.tensor([[0, 8, 3]] * 6)
    for t in range(6):
        assert experts[t].tolist() == by_sorting(scores[t] + bias, 3)
        chosen = scores[t][experts[t]].double()
        close(weights[t], chosen / chosen.sum() * 1.5)
        hashed, hash_weights = route(scores, 3, 1.5, None, table)
        assert torch.equal(hashed, table)
        close(hash_weights[t], scores[t][table[t]].double() / scores[t][table[t]].double().sum() * 1.5)
    assert router_scores(x.bfloat16(), weight.bfloat16()).dtype == torch.float32


def test_experts(rand: Callable[..., Tensor]) -> None:
    tokens, k, n, inter, dim, limit = 7, 2, 6, 5, 9, 1.0
    x, w13, w2, weights = rand(tokens, dim), rand(n, 2 * inter, dim), rand(n, dim, inter), rand(tokens, k).abs()
    experts = torch.tensor([[0, 5], [5, 0], [1, 2], [2, 5], [0, 1], [5, 2], [2, 0]])  # 3 and 4 get nothing
    expected = torch.zeros(tokens, dim, dtype=torch.float64)
    for t in range(tokens):
        for j in range(k):
            e = int(experts[t, j])
            gate = (w13[e, :inter].double() @ x[t].double()).clamp(max=limit)
            up = (w13[e, inter:].double() @ x[t].double()).clamp(-limit, limit)
            expected[t] += weights[t, j].double() * (w2[e].double() @ (gate * torch.sigmoid(gate) * up))
    close(grouped_experts(x, experts, weights, w13, w2, limit), expected)


def test_swiglu_clamps_the_gate_above_only() -> None:
    gate, up = torch.tensor([20.0, -20.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 20.0, -20.0])
    silu = torch.nn.functional.silu
    expected = torch.stack(
        [silu(torch.tensor(10.0)), silu(torch.tensor(-20.0)), 10 * silu(gate[2]), -10 * silu(gate[3])]
    )
    close(swiglu(gate, up, 10.0), expected)


# Cache


@pytest.mark.parametrize(
    ("preset", "kinds", "states_mib", "gib"),
    [("v4-flash", (2, 21, 20), 11.6, 6.72), ("v4-pro", (0, 30, 31), 17.8, 9.62)],
)
def test_cache_bytes_are_the_papers(preset: str, kinds: tuple[int, int, int], states_mib: float, gib: float) -> None:
    """BF16 at 1,048,576 tokens: latents of 512 per window position and entry, indexer keys of 128, FP32 states."""
    config = ModelConfig.preset(preset).with_mtp(0)
    tokens = 1 << 20
    cache = KVCache(config, tokens // 256, 1, torch.bfloat16, "meta")
    assert tuple(config.compress_ratios.count(r) for r in (0, 4, 128)) == kinds
    _, csa, hca = kinds
    states = sum(t.nbytes for layer in cache.layers for t in layer.tensors() if t.dtype == torch.float32)
    assert states == csa * 2 * 4 * (8 * 1024 + 8 * 256) + hca * 2 * 4 * 128 * 512
    assert round(states / 2**20, 1) == states_mib
    per_token = csa * (512 + 128) * 2 / 4 + hca * 512 * 2 / 128
    windows = sum(kinds) * 128 * 512 * 2
    assert cache.nbytes - states == per_token * tokens + windows
    assert round((cache.nbytes - states) / 2**30, 2) == gib
    grown = KVCache(config, 2 * tokens // 256, 1, torch.bfloat16, "meta")
    assert grown.nbytes - cache.nbytes == per_token * tokens


def test_flash_cache_is_3440_elements_a_token() -> None:
    config = ModelConfig.preset("v4-flash").with_mtp(0)
    bytes_of = [KVCache(config, blocks, 1, torch.float32, "meta").nbytes for blocks in (1, 2)]
    assert (bytes_of[1] - bytes_of[0]) / 256 == 4 * 3440


def test_a_step_finds_entries_through_its_block_table() -> None:
    step = Step([0, 1], [255, 0], [2, 3], [[7, 2], [4]])
    assert step.entry_rows(4)[0].tolist() == [7 * 64 + i for i in range(64)]
    assert step.entry_rows(128)[0].tolist() == [14, 15]
    assert step.entry_rows(4)[1].tolist() == []
    later = Step([0], [259], [1], [[7, 2]])
    assert later.entry_rows(4)[0].tolist()[-1] == 2 * 64 and later.is_decode
    assert step.positions(3).tolist() == [[255, 256, 257], [0, 1, 2]]
