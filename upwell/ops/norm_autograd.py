"""RMSNorm with its gradient as one node: keeps the input and one number a row. FP32 on the CPU by the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import training_kernels


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


def _forward_native(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    dim = x.shape[-1]
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    training_kernels.run("norm_forward", x.numel() // dim, x, weight, out, scale, dim, eps)
    ctx.save_for_backward(x, weight, scale)
    return out


def _backward_native(x: Tensor, weight: Tensor | None, scale: Tensor, grad: Tensor) -> Any:
    dim = x.shape[-1]
    grad_x = torch.empty_like(x)
    (grad_weight,) = training_kernels.run(
        "norm_backward", x.numel() // dim, x, weight, scale, grad, grad_x, dim, sums=(dim,)
    )
    return grad_x, None if weight is None else grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`ops.norm.rms_norm`: x [..., d], weight [d] or None -> x's shape and dtype."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out
