"""RMSNorm, with and without weight: computed in FP32, cast once at the end (ARCHITECTURE: RMSNorm_w)."""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.ops import gradients, norm_autograd, npu


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`weight * x * rsqrt(mean(x^2) + eps)` over the last dim; returns x's shape and dtype."""
    if gradients.recording(x):
        return norm_autograd.rms_norm(x, weight, eps)
    if (kernels := npu.fused(x)) is not None and (out := kernels.rms_norm(x, weight, eps)) is not None:
        return out
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    return normed.to(x.dtype)
