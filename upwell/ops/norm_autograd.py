"""RMSNorm with its gradient as one node: keeps the input and one number a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
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


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`ops.norm.rms_norm`: x [..., d], weight [d] or None -> x's shape and dtype."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out
