"""Linear maps with gradients as one node, by the C++ kernels (FP32, CPU): several maps of one input, or of its groups.

Maps of one input share one backward pass over it, so its gradient is summed as it is made.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import gradients, training_kernels


class _Map(ctypes.Structure):
    """LinearMap of csrc/training.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "y", "grad_x", "grad_weight")),
        *((name, c_int64) for name in ("inputs", "outputs", "x_row", "y_row", "grad_x_row", "adds")),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    """LinearTraining of csrc/training.h."""

    _fields_ = [("tokens", c_int64), ("count", c_int64), ("maps", POINTER(_Map))]


def usable(x: Tensor, *weights: Tensor) -> bool:
    """Autograd follows the product, and it is one that the kernels take: FP32 without autocast, built, on the CPU."""
    followed = gradients.recording(x, *weights) and gradients.compute_dtype(x) == torch.float32
    return followed and x.numel() > 0 and training_kernels.usable(x, *weights)


def _run(name: str, tokens: int, maps: list[_Map]) -> None:
    training_kernels.run_whole(name, _Call(tokens, len(maps), (_Map * len(maps))(*maps)))


def forward_to(outs: tuple[Tensor, ...], x: Tensor, weights: tuple[Tensor, ...]) -> None:
    """outs [..., out_i] = x [..., in] times each weight^T; all contiguous."""
    dim = x.shape[-1]
    _run("linear_forward", x.numel() // dim, [
        _Map(x.data_ptr(), w.data_ptr(), y.data_ptr(), None, None, dim, w.shape[0], dim, w.shape[0], 0, 0)
        for w, y in zip(weights, outs, strict=True)
    ])  # fmt: skip


def backward_to(
    grad_x: Tensor | None, grad_weights: list[Tensor | None], grads: tuple[Tensor, ...], x: Tensor,
    weights: tuple[Tensor, ...], adds: bool = False,
) -> None:  # fmt: skip
    """Gradients of x (`adds`: added to what grad_x holds) and of each weight from those of the outs; all contiguous."""
    dim, first = x.shape[-1], 2 if adds else 0
    _run("linear_backward", x.numel() // dim, [
        _Map(x.data_ptr(), w.data_ptr(), g.data_ptr(), None if grad_x is None else grad_x.data_ptr(),
             None if gw is None else gw.data_ptr(), dim, w.shape[0], dim, w.shape[0], dim, 1 if i else first)
        for i, (w, g, gw) in enumerate(zip(weights, grads, grad_weights, strict=True))
    ])  # fmt: skip


class _Maps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x, weights = x.contiguous(), tuple(w.contiguous() for w in weights)
        outs = tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights)
        forward_to(outs, x, weights)
        ctx.save_for_backward(x, *weights)
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        wanted, *of_weights = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if wanted else None
        grad_weights = [torch.empty_like(w) if needed else None for w, needed in zip(weights, of_weights, strict=True)]
        backward_to(grad_x, grad_weights, tuple(g.contiguous() for g in grads), x, tuple(weights))
        return grad_x, *grad_weights


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        _run("linear_forward", x.numel() // x.shape[-1], _groups(x, weight, out, groups, None, None))
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        maps = _groups(x, weight, grad.contiguous(), ctx.groups, grad_x, grad_weight)
        _run("linear_backward", x.numel() // x.shape[-1], maps)
        return grad_x, grad_weight, None


def _groups(
    x: Tensor, weight: Tensor, y: Tensor, groups: int, grad_x: Tensor | None, grad_weight: Tensor | None
) -> list[_Map]:
    rows = weight.shape[0] // groups
    inputs, x_row, y_row = weight.shape[1], x.shape[-1], y.shape[-1]

    def at(t: Tensor | None, index: int) -> int | None:
        return None if t is None else t.data_ptr() + 4 * index

    return [
        _Map(at(x, g * inputs), at(weight, g * rows * inputs), at(y, g * rows), at(grad_x, g * inputs),
             at(grad_weight, g * rows * inputs), inputs, rows, x_row, y_row, x_row, 0)
        for g in range(groups)
    ]  # fmt: skip


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    return linears(x, weight)[0]


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Each weight's product with the same x [..., in]: weights [out_i, in] -> [..., out_i]."""
    outs: tuple[Tensor, ...] = _Maps.apply(x, *weights)
    return outs


def grouped_linear(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Group i of the weight's rows sees group i of x's columns: x [..., groups * in], weight [groups * out, in] ->
    [..., groups * out]."""
    out: Tensor = _Grouped.apply(x, weight, groups)
    return out
