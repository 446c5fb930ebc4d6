"""RMSNorm with its gradient as one node: keeps the input and one number a row. FP32 on the CPU by the C++ kernels."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import training_kernels


class _Turn(ctypes.Structure):
    """Turn of csrc/training.h."""

    _fields_ = [("pairs", c_int64), ("rows", c_int64), ("cos", c_void_p), ("sin", c_void_p)]


_NO_TURN = _Turn(0, 1, None, None)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        if training_kernels.usable(x, weight):
            return _forward_native(ctx, x.contiguous(), weight, eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        if weight is not None:
            normed.mul_(weight.float())
        ctx.save_for_backward(x, weight, scale)
        return normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        if training_kernels.usable(x, weight, grad):
            return _backward_native(x, weight, scale, grad.contiguous())
        normed = x * scale
        grad_weight = None
        if weight is None:
            product = grad * normed
        else:
            product = grad.float() * normed
            if ctx.needs_input_grad[1]:
                grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
            grad = grad * weight.float()
            product.mul_(weight.float())
        mean = product.mean(-1, keepdim=True)
        grad_x = torch.addcmul(grad.float(), normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def _forward_native(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, turn: _Turn = _NO_TURN) -> Tensor:
    dim = x.shape[-1]
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    training_kernels.run("norm_forward", x.numel() // dim, x, weight, out, scale, dim, eps, turn)
    ctx.save_for_backward(x, weight, scale)
    return out


def _backward_native(
    x: Tensor, weight: Tensor | None, scale: Tensor, grad: Tensor, turn: _Turn = _NO_TURN
) -> tuple[Tensor, Tensor | None, None]:
    dim = x.shape[-1]
    grad_x = torch.empty_like(x)
    (grad_weight,) = training_kernels.run(
        "norm_backward", x.numel() // dim, x, weight, scale, grad, grad_x, dim, turn, sums=(dim,)
    )
    return grad_x, None if weight is None else grad_weight, None


class _TurnedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin = cos.contiguous(), sin.contiguous()
        return _forward_native(ctx, x.contiguous(), weight, eps, _turn(cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        return *_backward_native(x, weight, scale, grad.contiguous(), _turn(*ctx.angles)), None, None


def _turn(cos: Tensor, sin: Tensor) -> _Turn:
    return _Turn(cos.shape[-1], cos.numel() // cos.shape[-1], cos.data_ptr(), sin.data_ptr())


def turned_rms_norm(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope.apply_rope` of `rms_norm`, by the C++ kernels (training_kernels.usable): x [B, S, d], cos and sin
    [S, r/2] or [B, S, r/2], without gradient."""
    out: Tensor = _TurnedRMSNorm.apply(x, weight, eps, cos, sin)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`ops.norm.rms_norm`: x [..., d], weight [d] or None -> x's shape and dtype."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out
