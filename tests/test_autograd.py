"""Training's autograd nodes against autograd through the plain definitions, in FP32 and under BF16 autocast.

Each node that has C++ kernels is checked in plain PyTorch and with every instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_v4 import build_model
from torch import Tensor

from upwell.ops import (
    attention,
    attention_autograd,
    attention_native,
    compress,
    compress_native,
    gradients,
    hc_autograd,
    hyper_connections,
    linear_autograd,
    loss_autograd,
    moe,
    moe_autograd,
    moe_native,
    native,
    norm_autograd,
    rope_autograd,
    routing_native,
    training_kernels,
)
from upwell.ops.norm import rms_norm
from upwell.ops.rope import apply_rope, rope_angles

Node = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In these tests the operations of upwell.ops stay what they are defined as; nodes are called by name."""
    monkeypatch.setattr(gradients, "recording", lambda *_tensors: False)


@pytest.fixture(params=["plain", *native.ISAS])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Plain PyTorch, or the kernels of one instruction set (the CPU's best in place of one that it lacks)."""
    library = native.library()
    if request.param == "plain" or library is None:
        monkeypatch.setattr(training_kernels, "usable", lambda *_tensors: False)
        yield "plain"
        return
    before = library.upwell_isa().decode()
    native.set_isa(request.param)
    yield library.upwell_isa().decode()
    assert native.set_isa(before)


def derive(node: Node, inputs: list[Tensor], bf16: bool) -> list[Tensor]:
    """The output and each input's gradient, for one fixed random gradient of the output."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = node(*leaves)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return [out.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves)]


def assert_same(ours: Node, plain: Node, inputs: list[Tensor], bf16: bool) -> None:
    exact = derive(plain, inputs, False)
    for i, (a, b) in enumerate(zip(derive(ours, inputs, bf16), exact, strict=True)):
        assert a.shape == b.shape
        error = (a.float() - b).norm() / b.norm().clamp(min=1e-30)
        assert error < (0.02 if bf16 else 1e-5), f"tensor {i}: relative error {error:.2e}"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("steps", "window", "ratio"),
    [(1, 8, 4), (3, 8, 0), (31, 64, 4), (33, 8, 4), (70, 16, 0), (97, 128, 128), (300, 64, 128), (161, 32, 4)],
)
def test_attention_matches_the_definition(steps: int, window: int, ratio: int, bf16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, dim = 3, 24
    shapes = [(2, steps, heads, dim), (2, steps, dim), (heads,)]
    if ratio:
        shapes.insert(2, (2, steps // ratio, dim))
    inputs = [torch.randn(s, generator=generator) for s in shapes]

    def call(function: Node) -> Node:
        def run(q: Tensor, kv: Tensor, *rest: Tensor) -> Tensor:
            return function(q, kv, rest[0] if ratio else None, rest[-1])

        return run

    plain = call(lambda q, kv, e, s: attention.attend(q, kv, e, s, 0, window, ratio))
    ours = call(lambda q, kv, e, s: attention_autograd.attend_whole(q, kv, e, s, window, ratio))
    assert_same(ours, plain, inputs, bf16)


@pytest.mark.parametrize(
    ("steps", "window", "ratio", "heads", "dim", "rope"),
    [
        (1, 8, 4, 3, 24, 8),
        (3, 8, 0, 3, 24, 8),
        (31, 64, 4, 5, 20, 6),
        (33, 8, 4, 3, 24, 8),
        (70, 16, 0, 4, 16, 16),
        (97, 128, 128, 7, 64, 32),
        (300, 64, 128, 16, 64, 32),
        (161, 32, 4, 70, 40, 12),
        (300, 128, 4, 2, 37, 10),
    ],
)
def test_raw_attention_matches_the_definition(
    steps: int, window: int, ratio: int, heads: int, dim: int, rope: int, kernels: str
) -> None:
    """From raw queries to rotated-back outputs, in spans of one chunk, of several, and of whole sequences."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, steps, heads, dim), (2, steps, dim), (heads,)]
    if ratio:
        shapes.insert(2, (2, steps // ratio, dim))
    inputs = [torch.randn(s, generator=generator) for s in shapes]
    cos, sin = rope_angles(torch.arange(steps).unsqueeze(0), torch.rand(rope // 2, generator=generator))

    def plain(q: Tensor, kv: Tensor, *rest: Tensor) -> Tensor:
        q = apply_rope(rms_norm(q, None, 1e-6), cos.unsqueeze(-2), sin.unsqueeze(-2))
        out = attention.attend(q, kv, rest[0] if ratio else None, rest[-1], 0, window, ratio)
        return apply_rope(out, cos.unsqueeze(-2), sin.unsqueeze(-2), inverse=True)

    def ours(q: Tensor, kv: Tensor, *rest: Tensor) -> Tensor:
        entries = rest[0] if ratio else None
        return attention_native.attend_raw(q, kv, entries, rest[-1], cos, sin, 1e-6, window, ratio)

    if kernels == "plain":
        assert not attention_native.usable(*inputs[:2], None)
        return
    assert_same(ours, plain, inputs, False)
    whole = derive(ours, inputs, False)
    for span in (256, steps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_native, "_span", lambda *_, span=span: span)
            for a, b in zip(derive(ours, inputs, False), whole, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("dim", [40, 64, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_matches_the_definition(weighted: bool, dim: int, kernels: str) -> None:
    x = torch.randn(3, 5, 2, dim, generator=torch.Generator().manual_seed(0)) * 3
    inputs = [x, torch.rand(dim) + 0.5] if weighted else [x]

    def call(function: Node) -> Node:
        return lambda x, weight=None: function(x, weight, 1e-6)

    assert_same(call(norm_autograd.rms_norm), call(rms_norm), inputs, False)
    half = derive(call(norm_autograd.rms_norm), [t.bfloat16() for t in inputs], False)
    assert all(t.dtype == torch.bfloat16 for t in half)
    for a, b in zip(half, derive(call(rms_norm), inputs, False), strict=True):
        assert (a.float() - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("inverse", [False, True])
def test_rope_matches_the_definition(inverse: bool) -> None:
    x = torch.randn(2, 7, 3, 20, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_angles(torch.arange(7), torch.rand(4))
    cos, sin = cos[:, None], sin[:, None]
    assert_same(
        lambda x: rope_autograd.apply_rope(x, cos, sin, inverse),
        lambda x: apply_rope(x, cos, sin, inverse),
        [x],
        False,
    )


@pytest.mark.parametrize("shared_angles", [False, True])
def test_norm_with_rope_matches_the_definition(shared_angles: bool, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 70, 21, generator=generator), torch.rand(21, generator=generator) + 0.5]
    cos, sin = rope_angles(torch.randint(0, 99, (70,) if shared_angles else (3, 70)), torch.rand(5))
    if kernels == "plain":
        return

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return apply_rope(rms_norm(x, weight, 1e-6), cos, sin)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return norm_autograd.turned_rms_norm(x, weight, 1e-6, cos, sin)

    assert_same(ours, plain, inputs, False)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("steps", "ratio", "dim"), [(4, 4, 16), (31, 4, 21), (300, 128, 8), (1030, 4, 40)])
def test_pooling_matches_the_definition(steps: int, ratio: int, dim: int, overlap: bool, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    width, whole = dim * (1 + overlap), steps // ratio * ratio
    inputs = [torch.randn(s, generator=generator) for s in (*2 * ((3, steps, width),), (ratio, width))]
    if kernels == "plain":
        assert not compress_native.usable(*inputs)
        return

    def plain(kv: Tensor, gate: Tensor, ape: Tensor) -> Tensor:
        biased = gate[:, :whole] + ape.repeat(whole // ratio, 1)
        return compress.pool(kv[:, :whole], biased, None, None, ratio, dim)

    assert_same(lambda *inputs: compress_native.pool(*inputs, dim), plain, inputs, False)


@pytest.mark.parametrize("kind", ["bias", "no bias", "table"])
def test_routing_matches_the_definition(kind: str, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, n, k = 500, 21, 3
    logits = 6 * torch.randn(tokens, n, generator=generator)
    logits[7] = logits[7, 0]  # all equal: the first ones win
    bias = torch.randn(n, generator=generator) if kind == "bias" else None
    table = torch.rand(tokens, n, generator=generator).argsort(1)[:, :k] if kind == "table" else None
    if kernels == "plain":
        return

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return moe.route(torch.nn.functional.softplus(x).sqrt(), k, 1.5, bias, table)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return routing_native.route(x, k, 1.5, bias, table)

    assert torch.equal(ours(logits)[0], plain(logits)[0])
    assert_same(lambda x: ours(x)[1], lambda x: plain(x)[1], [logits], False)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_experts_match_the_definition(limit: float, bf16: bool, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n, tokens, k, dim, inter = 7, 50, 3, 24, 20
    # Expert 2 gets no token.
    experts = torch.stack([torch.randperm(n - 1, generator=generator)[:k] for _ in range(tokens)])
    experts[experts == 2] = n - 1
    inputs = [
        0.3 * torch.randn(s, generator=generator)
        for s in ((tokens, dim), (tokens, k), (n, 2 * inter, dim), (n, dim, inter))
    ]
    inputs[1] = inputs[1].abs()

    def call(function: Node) -> Node:
        return lambda x, weights, w13, w2: function(x, experts, weights, w13, w2, limit)

    if bf16 and limit < 1:
        # BF16 moves values across the limit, where the gradient jumps: compare with autograd under the same autocast.
        ours = derive(call(moe_autograd.grouped_experts), inputs, True)
        for a, b in zip(ours, derive(call(moe.grouped_experts), inputs, True), strict=True):
            assert (a - b).norm() / b.norm() < 0.02
        return
    assert_same(call(moe_autograd.grouped_experts), call(moe.grouped_experts), inputs, bf16)


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_swiglu_matches_the_definition(limit: float, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 15, 21, generator=generator) for _ in range(2)]
    assert_same(lambda g, u: moe_autograd.swiglu(g, u, limit), lambda g, u: moe.swiglu(g, u, limit), inputs, False)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(1, 20, (7,)), (37, 64, (1024, 5)), (530, 300, (33, 64)), (300, 256, (12, 256, 600)), (1030, 7, (280, 16))],
)
def test_linear_maps_match_the_definition(tokens: int, inputs: int, outputs: tuple[int, ...], kernels: str) -> None:
    """Several maps of one input; sizes off and on the kernels' tiles, panels and units."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, tokens, inputs, generator=generator)]
    tensors += [torch.randn(n, inputs, generator=generator) for n in outputs]
    if kernels == "plain":
        assert not linear_autograd.usable(*tensors)
        return

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat(linear_autograd.linears(x, *weights), dim=-1)

    assert_same(ours, lambda x, *weights: x @ torch.cat(weights).t(), tensors, False)
    assert_one_thread_gives_the_same(ours, tensors)


@pytest.mark.parametrize(
    ("tokens", "dim", "vocab", "room"),
    [(1, 5, 7, 0), (40, 24, 33, 1 << 20), (600, 64, 300, 0), (1100, 20, 530, 1 << 19)],
)
def test_head_loss_matches_the_definition(
    tokens: int, dim: int, vocab: int, room: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block of tokens and in several; some tokens don't count."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, dim, generator=generator) for n in (tokens, vocab))
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[1::5] = loss_autograd.IGNORED
    if kernels == "plain":
        assert not linear_autograd.usable(x, weight)
        return
    monkeypatch.setattr(loss_autograd, "_BLOCK_FLOATS", room)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return loss_autograd.head_loss(x, weight, targets)

    assert_same(ours, lambda x, w: torch.nn.functional.cross_entropy(x @ w.t(), targets), [x, weight], False)
    assert_one_thread_gives_the_same(ours, [x, weight])
    for wrong in (-1, vocab):
        targets[0] = wrong
        with pytest.raises(IndexError, match="outside the vocabulary"):
            ours(x, weight)


@pytest.mark.parametrize(("tokens", "h", "dim"), [(1, 4, 30), (300, 4, 64), (37, 2, 17)])
def test_head_collapse_matches_the_definition(tokens: int, h: int, dim: int, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, h, dim), (h, h * dim), (h,), (1,)
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors[1] *= (h * dim) ** -0.5
    if kernels == "plain":
        assert not hc_autograd.usable(tensors[0])
        return

    def plain(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        pre = hyper_connections.head_mix(streams, fn, base, scale, 1e-2, 1e-6)
        return hyper_connections.collapse(streams, pre)

    def ours(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        return hc_autograd.collapse(streams, fn, base, scale, 1e-2, 1e-6)

    *most, scale = tensors
    assert_same(lambda *inputs: ours(*inputs, scale), lambda *inputs: plain(*inputs, scale), most, False)
    # The scale's gradient is one number, a sum that cancels: off by little of what its terms, one a token, amount to.
    terms = derive(lambda one_each: plain(*most, one_each), [scale.expand(tokens, 1)], False)[1].double()
    error = (derive(lambda s: ours(*most, s), [scale], False)[1].double() - terms.sum()).abs()
    assert error <= 1e-5 * terms.abs().sum()


@pytest.mark.parametrize(("tokens", "groups", "inputs", "outputs"), [(3, 2, 5, 4), (600, 4, 256, 64), (270, 3, 40, 50)])
def test_grouped_linear_matches_the_definition(
    tokens: int, groups: int, inputs: int, outputs: int, kernels: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, groups * inputs, generator=generator)
    weight = torch.randn(groups * outputs, inputs, generator=generator)
    if kernels == "plain":
        assert not linear_autograd.usable(x, weight)
        return

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        parts = zip(x.chunk(groups, dim=-1), weight.chunk(groups), strict=True)
        return torch.cat([part @ w.t() for part, w in parts], dim=-1)

    assert_same(lambda x, w: linear_autograd.grouped_linear(x, w, groups), plain, [x, weight], False)


@pytest.mark.parametrize("limit", [0.5, 10.0])
@pytest.mark.parametrize(
    ("tokens", "n", "k", "dim", "inter", "shared"),
    [(1, 3, 2, 8, 5, 6), (50, 7, 3, 24, 20, 20), (700, 5, 2, 64, 32, 48), (300, 3, 2, 270, 130, 33)],
)
def test_a_whole_mixture_matches_the_definition(
    tokens: int, n: int, k: int, dim: int, inter: int, shared: int, limit: float, kernels: str
) -> None:
    """Router, experts and the shared one. Expert 0 gets no token, the last one more than go through it together."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([1 + torch.randperm(n - 1, generator=generator)[:k] for _ in range(tokens)])
    experts[:, 0] = torch.where((experts != n - 1).all(1), n - 1, experts[:, 0])
    shapes = (tokens, dim), (n, dim), (n, 2 * inter, dim), (n, dim, inter)
    tensors = [0.3 * torch.randn(s, generator=generator) for s in (*shapes, *2 * ((shared, dim),), (dim, shared))]
    if kernels == "plain":
        assert not moe_native.usable(*tensors)
        return
    router = moe_native.Router(k, 1.5, None, experts)

    def ours(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, *own: Tensor) -> Tensor:
        out, chosen = moe_native.mixture(x, gate, router, w13, w2, (own[0], own[1], own[2]), limit)
        assert torch.equal(chosen, experts)
        return out

    def plain(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, *own: Tensor) -> Tensor:
        of_shared = moe.swiglu(x @ own[0].t(), x @ own[1].t(), limit) @ own[2].t()
        chosen, weights = moe.route(torch.nn.functional.softplus(x @ gate.t()).sqrt(), *router)
        return moe.grouped_experts(x, chosen, weights, w13, w2, limit) + of_shared

    assert_same(ours, plain, tensors, False)
    assert_one_thread_gives_the_same(ours, tensors)


def assert_one_thread_gives_the_same(node: Node, tensors: list[Tensor]) -> None:
    """Bit for bit: a sum is made by one thread, whichever."""
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(derive(node, tensors, False))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_model_gradients_match_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter's gradient of a whole model, with nodes and without; under BF16 no further from FP32's."""
    ids = torch.randint(0, 300, (2, 150), generator=torch.Generator().manual_seed(0))

    def run(bf16: bool) -> dict[str, Tensor]:
        model = build_model()  # weights of a clear scale: with near-equal streams, gradients are rounding noise
        for block in model.layers:
            if block.attn.indexer is not None:
                block.attn.indexer.topk = 1 << 30
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(model.streams(ids), targets.flatten())
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, plain_bf16 = run(False), run(True)
    monkeypatch.undo()
    ours, ours_bf16 = run(False), run(True)
    assert ours.keys() == plain.keys()
    for name, grad in plain.items():
        error = (ours[name] - grad).norm() / grad.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"

    def distance(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([(grads[n] - g).flatten() for n, g in plain.items()]).norm()

    assert distance(ours_bf16) < 1.3 * distance(plain_bf16)
