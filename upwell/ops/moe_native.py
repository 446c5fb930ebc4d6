"""Training's mixture of experts as one node, by the C++ kernels (FP32, CPU): router, routed experts and the shared one.

Rows are gathered, multiplied, weighted and summed a few hundred at a time, so what lies between stays in the cache.
Kept are what w1 and w3 made; the backward pass gathers inputs again.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import gradients, linear_autograd, routing_native, training_kernels


class _Call(ctypes.Structure):
    """ExpertsTraining of csrc/training.h."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "k", "experts", "dim", "inter", "shared_inter")),
        ("limit", c_double),
        *((name, c_void_p) for name in (
            "x", "source", "back", "bounds", "row_weights", "w13", "w2", "shared_w1", "shared_w3", "shared_w2", "inner",
            "shared_inner", "outs", "y", "grad", "grad_w13", "grad_w2", "grad_weights", "grad_shared_w1",
            "grad_shared_w3", "grad_shared_w2", "grad_row_weights", "shared_hidden", "shared_grad_inner")),
    ]  # fmt: skip


class Router(NamedTuple):
    """How a token's k experts are chosen: by score and bias [E], or as given [T, k]; `scaling` is of their weights."""

    k: int
    scaling: float
    bias: Tensor | None
    given: Tensor | None


def usable(x: Tensor, *weights: Tensor) -> bool:
    """Autograd follows the call, and it is one that the kernels take: FP32 without autocast, built, on the CPU."""
    followed = gradients.recording(x, *weights) and gradients.compute_dtype(x) == torch.float32
    return followed and x.numel() > 0 and training_kernels.usable(x, *weights)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, w1: Tensor, w3: Tensor, down: Tensor,
        router: Router, limit: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, gate, *stacked = (t.contiguous() for t in (x, gate, w13, w2, w1, w3, down))
        (tokens, dim), n, k = x.shape, gate.shape[0], router.k
        logits = x.new_empty(tokens, n)
        linear_autograd.forward_to((logits,), x, (gate,))
        scores, chosen, weights = routing_native.forward(logits, k, router.scaling, router.bias, router.given)
        source, back, bounds = (chosen.new_empty(count) for count in (tokens * k, tokens * k, n + 1))
        row_weights = weights.new_empty(tokens * k)
        training_kernels.run_alone("group", chosen, weights, k, n, tokens * k, source, back, bounds, row_weights)
        inner, shared_inner = x.new_empty(tokens * k, w13.shape[1]), x.new_empty(tokens, 2 * w1.shape[0])
        outs, y = x.new_empty(tokens * k, dim), torch.empty_like(x)
        kept = x, source, back, bounds, row_weights, *stacked, inner, shared_inner
        training_kernels.run_whole("experts_forward", _call(kept, k, limit, outs, y))
        ctx.save_for_backward(gate, scores, chosen, *kept)
        ctx.scaling, ctx.limit = router.scaling, limit
        ctx.mark_non_differentiable(chosen)
        return y, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        gate, scores, chosen, *kept = ctx.saved_tensors
        x, _source, _back, _bounds, row_weights, *stacked, inner, shared_inner = kept
        k, hidden = chosen.shape[1], stacked[2].shape[0]
        outs, grad_x = x.new_empty(inner.shape[0], x.shape[1]), torch.empty_like(x)
        w13, w2, *shared = grads = [torch.empty_like(t) for t in stacked]
        grad_weights = x.new_empty(chosen.shape)
        scratch = torch.empty_like(row_weights), x.new_empty(x.shape[0], hidden), torch.empty_like(shared_inner)
        call = _call(
            tuple(kept), k, ctx.limit, outs, grad_x, grad.contiguous(), w13, w2, grad_weights, *shared, *scratch
        )
        training_kernels.run_whole("experts_backward", call)
        grad_logits = routing_native.backward(scores, chosen, ctx.scaling, grad_weights)
        grad_gate = torch.empty_like(gate)
        linear_autograd.backward_to(grad_x, [grad_gate], (grad_logits,), x, (gate,), adds=True)
        return grad_x, grad_gate, *grads, None, None


def _call(kept: tuple[Tensor, ...], k: int, limit: float, *rest: Tensor) -> _Call:
    x, w13, shared_w1 = kept[0], kept[5], kept[7]
    sizes = x.shape[0], k, w13.shape[0], x.shape[1], w13.shape[1] // 2, shared_w1.shape[0]
    return _Call(*sizes, limit, *(t.data_ptr() for t in (*kept, *rest)))


def mixture(
    x: Tensor, gate: Tensor, router: Router, w13: Tensor, w2: Tensor, shared: tuple[Tensor, Tensor, Tensor],
    limit: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole mixture of experts: `ops.moe.route` of x gate^T, `grouped_experts` and the shared expert, w1 [J, D],
    w3 [J, D] and w2 [D, J]: x [T, D] -> [T, D], and the experts that were chosen [T, k]."""
    out: tuple[Tensor, Tensor] = _Mixture.apply(x, gate, w13, w2, *shared, router, limit)
    return out
