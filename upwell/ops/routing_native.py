"""Training's router as one node, by the C++ kernels (FP32, CPU): from the gate's outputs to experts and weights."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import training_kernels


class _Call(ctypes.Structure):
    """RoutingTraining of csrc/training.h."""

    _fields_ = [
        ("experts", c_int64), ("k", c_int64), ("scaling", c_float),
        *((name, c_void_p) for name in (
            "logits", "bias", "given", "scores", "chosen", "weights", "grad", "grad_logits")),
    ]  # fmt: skip


def _run(name: str, k: int, scaling: float, logits: Tensor | None, *others: Tensor | None) -> None:
    addresses = (None if t is None else t.data_ptr() for t in (logits, *others))
    tokens, experts = others[2].shape  # type: ignore[union-attr]
    training_kernels.run(name, tokens, _Call(experts, k, scaling, *addresses))


def forward(
    logits: Tensor, k: int, scaling: float, bias: Tensor | None, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """scores [T, E], kept for the backward pass, experts and weights [T, k] of logits [T, E]."""
    given = given if given is None else given.contiguous()
    scores, weights = torch.empty_like(logits), logits.new_empty(logits.shape[0], k)
    chosen = torch.empty(weights.shape, dtype=torch.long)
    _run("routing_forward", k, scaling, logits, bias, given, scores, chosen, weights)
    return scores, chosen, weights


def backward(scores: Tensor, chosen: Tensor, scaling: float, grad: Tensor) -> Tensor:
    """The gradient of the logits from the weights'."""
    grad_logits = torch.empty_like(scores)
    rest = None, None, None, scores, chosen, None, grad, grad_logits
    _run("routing_backward", chosen.shape[1], scaling, *rest)
    return grad_logits


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, k: int, scaling: float, bias: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores, chosen, weights = forward(logits.contiguous(), k, scaling, bias, given)
        ctx.save_for_backward(scores, chosen)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(chosen)
        return chosen, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> Any:
        scores, chosen = ctx.saved_tensors
        return backward(scores, chosen, ctx.scaling, grad.contiguous()), None, None, None, None


def route(
    logits: Tensor, k: int, scaling: float, bias: Tensor | None, experts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.moe.route` of sqrt(softplus(logits)), logits [T, E]: experts [T, k] INT64, weights [T, k]."""
    out: tuple[Tensor, Tensor] = _Route.apply(logits, k, scaling, bias, experts)
    return out
