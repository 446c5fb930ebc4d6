"""Partial rotary embedding: interleaved pairs in the last r dims, plain or with YaRN (no mscale in V4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upwell.config import Yarn
from upwell.ops import gradients, npu, rope_autograd


def inverse_frequencies(rope_dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """The r/2 angular frequencies, FP32: theta^(-2i/r), each blended with itself / factor where YaRN is set."""
    freqs = 1.0 / (theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim))
    if yarn is None:
        return freqs

    def dim_at(rotations: float) -> float:
        return (
            rope_dim
            * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(dim_at(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_at(yarn.beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1.0 - ramp.clamp(0, 1)
    return freqs / yarn.factor * (1 - keep) + freqs * keep


def rope_angles(positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, FP32, shape positions.shape + [r/2]."""
    angles = positions[..., None].float() * freqs
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last r = 2 * cos.shape[-1] dims of `x`; the dims before them pass through.

    `cos`, `sin` broadcast against x[..., :r/2] (add a head axis where x has one). `inverse` rotates back.
    """
    if gradients.recording(x):
        return rope_autograd.apply_rope(x, cos, sin, inverse)
    if (kernels := npu.fused(x)) is not None and (out := kernels.apply_rope(x, cos, sin, inverse)) is not None:
        return out
    rope_dim = 2 * cos.shape[-1]
    nope, rope = x[..., :-rope_dim], x[..., -rope_dim:]
    pairs = rope.float().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    if inverse:
        sin = -sin
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((nope, rotated.to(x.dtype)), dim=-1)
