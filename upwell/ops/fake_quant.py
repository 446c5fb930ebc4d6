"""The official numerics' rounding of activations (ARCHITECTURE section 9): values go through FP8 or FP4 and back.

Scales are powers of two, as UE8M0 stores them. Gradients pass straight through (training with the formats in view).
"""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.formats.fp4 import round_to_fp4
from upwell.formats.fp8 import FP8_MAX, round_to_fp8
from upwell.formats.ue8m0 import decode_ue8m0, encode_ue8m0

FP4_MAX = 6.0


def _power_of_two_scale(amax: Tensor, limit: float, floor: float) -> Tensor:
    """2^ceil(log2(max(amax, floor) / limit)), from the exponent's bits: log2 rounds away what is just above a power."""
    return decode_ue8m0(encode_ue8m0(amax.clamp(min=floor) / limit))


def fake_fp8(x: Tensor, group: int) -> Tensor:
    """Round x [..., n] to FP8 e4m3 in groups along the last dim, scale 2^ceil(log2(max(amax, 1e-4) / 448))."""
    wide = _grouped(x, group)
    scale = _power_of_two_scale(wide.abs().amax(-1, keepdim=True), FP8_MAX, 1e-4)
    rounded = round_to_fp8(wide / scale) * scale
    return _straight_through(x, rounded)


def fake_fp4(x: Tensor, group: int) -> Tensor:
    """Round x [..., n] to FP4 e2m1 in groups along the last dim, scale 2^ceil(log2(max(amax, 6 * 2^-126) / 6))."""
    wide = _grouped(x, group)
    scale = _power_of_two_scale(wide.abs().amax(-1, keepdim=True), FP4_MAX, FP4_MAX * 2.0**-126)
    rounded = round_to_fp4(wide / scale) * scale
    return _straight_through(x, rounded)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform over the last dim (a power of two); FP32 inside, x's dtype out."""
    n = x.shape[-1]
    y = x.float()
    step = 1
    while step < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        step *= 2
    return (y * n**-0.5).to(x.dtype)


def _grouped(x: Tensor, group: int) -> Tensor:
    group = min(group, x.shape[-1])
    if x.shape[-1] % group:  # a ragged last group is its own group
        pad = group - x.shape[-1] % group
        x = torch.nn.functional.pad(x, (0, pad))
    return x.detach().float().unflatten(-1, (-1, group))


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    flat = rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return x + (flat - x).detach() if x.requires_grad else flat
