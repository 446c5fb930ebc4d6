"""Training's mixture of experts as one node, by the C++ kernels (FP32, CPU): routed experts and the shared one.

Rows are gathered, multiplied, weighted and summed a few hundred at a time, so what lies between stays in the cache.
Kept are what w1 and w3 made; the backward pass gathers inputs again.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import gradients, training_kernels


class _Call(ctypes.Structure):
    """ExpertsTraining of csrc/training.h."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "k", "experts", "dim", "inter", "shared_inter")),
        ("limit", c_double),
        *((name, c_void_p) for name in (
            "x", "source", "back", "bounds", "row_weights", "w13", "w2", "shared_w1", "shared_w3", "shared_w2", "inner",
            "shared_inner", "outs", "y", "grad", "grad_w13", "grad_w2", "grad_row_weights", "grad_shared_w1",
            "grad_shared_w3", "grad_shared_w2", "shared_hidden", "shared_grad_inner")),
    ]  # fmt: skip


def usable(x: Tensor, *weights: Tensor) -> bool:
    """Autograd follows the call, and it is one that the kernels take: FP32 without autocast, built, on the CPU."""
    followed = gradients.recording(x, *weights) and gradients.compute_dtype(x) == torch.float32
    return followed and x.numel() > 0 and training_kernels.usable(x, *weights)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float, *shared: Tensor
    ) -> Tensor:
        tokens, k = experts.shape
        experts, weights = experts.contiguous(), weights.contiguous()
        source, back, bounds = (experts.new_empty(n) for n in (tokens * k, tokens * k, w13.shape[0] + 1))
        row_weights = weights.new_empty(tokens * k)
        training_kernels.run_alone(
            "group", experts, weights, k, w13.shape[0], tokens * k, source, back, bounds, row_weights
        )
        x, w13, w2, *shared_weights = (t.contiguous() for t in (x, w13, w2, *shared))
        inner = x.new_empty(tokens * k, w13.shape[1])
        shared_inner = x.new_empty(tokens, 2 * shared_weights[0].shape[0])
        outs, y = x.new_empty(tokens * k, x.shape[1]), torch.empty_like(x)
        kept = x, source, back, bounds, row_weights, w13, w2, *shared_weights, inner, shared_inner
        training_kernels.run_whole("experts_forward", _call(kept, k, limit, outs, y))
        ctx.save_for_backward(*kept)
        ctx.k, ctx.limit = k, limit
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept = ctx.saved_tensors
        x, _, back, _, row_weights, w13, w2, *shared, inner, shared_inner = kept
        outs, grad_x = x.new_empty(inner.shape[0], x.shape[1]), torch.empty_like(x)
        grads = [torch.empty_like(t) for t in (w13, w2, row_weights, *shared)]
        scratch = x.new_empty(x.shape[0], shared[0].shape[0]), torch.empty_like(shared_inner)
        call = _call(kept, ctx.k, ctx.limit, outs, grad_x, grad.contiguous(), *grads, *scratch)
        training_kernels.run_whole("experts_backward", call)
        grad_w13, grad_w2, grad_rows, *grad_shared = grads
        return grad_x, None, grad_rows[back].view(-1, ctx.k), grad_w13, grad_w2, None, *grad_shared


def _call(kept: tuple[Tensor, ...], k: int, limit: float, *rest: Tensor) -> _Call:
    x, w13, shared_w1 = kept[0], kept[5], kept[7]
    sizes = x.shape[0], k, w13.shape[0], x.shape[1], w13.shape[1] // 2, shared_w1.shape[0]
    return _Call(*sizes, limit, *(t.data_ptr() for t in (*kept, *rest)))


def experts_with_shared(
    x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, shared: tuple[Tensor, Tensor, Tensor],
    limit: float,
) -> Tensor:  # fmt: skip
    """`ops.moe.grouped_experts` plus the shared expert, w1 [J, D], w3 [J, D] and w2 [D, J]: x [T, D] -> [T, D]."""
    w1, w3, down = shared
    out: Tensor = _Experts.apply(x, experts, weights, w13, w2, limit, w1, w3, down)
    return out
