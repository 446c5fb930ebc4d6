"""INT8 weights with a scale a row (an output channel): W = int8 * scale, symmetric, as W8A8 on Ascend takes them.

A scale that is a power of two lies on the grid of FP4 and FP8 weights, whose own scales are powers of two. FP4's values
are multiples of a half up to 6, so a row of FP4 becomes INT8 without any error where its groups' scales lie within a
factor of 8 of each other; of a row of FP8, all values above an eighth of its largest do.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127


def quantize_int8(weight: Tensor, on_grid: bool = False) -> tuple[Tensor, Tensor]:
    """Dense [out, in] -> (INT8 [out, in], FP32 scale [out]); scale = amax / 127, a row of zeros has scale 1 / 127.

    `on_grid`: the one of three scales with which a row has the least squared error: the power of two at or above that,
    half of it (what is larger is cut off), and amax / 127 itself.
    """
    wide = weight.float()
    amax = wide.abs().amax(dim=-1)
    scale = torch.where(amax == 0, 1.0, amax) / INT8_MAX
    if on_grid:
        scale = _least_error(wide, scale)
    return _rounded(wide, scale).to(torch.int8), scale


def _rounded(wide: Tensor, scale: Tensor) -> Tensor:
    return torch.round(wide / scale.unsqueeze(-1)).clamp_(-INT8_MAX, INT8_MAX)


def _least_error(wide: Tensor, full: Tensor) -> Tensor:
    covers = _power_at_least(full)
    best, least = covers, torch.full_like(full, torch.inf, dtype=torch.float64)
    for scale in (covers, covers / 2, full):
        error = (wide.double() - _rounded(wide, scale).double() * scale.double().unsqueeze(-1)).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return torch.where(full.isnan(), full, best)


def _power_at_least(x: Tensor) -> Tensor:
    """The powers of two at or above positive FP32 numbers."""
    return ((x.contiguous().view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def dequantize_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """INT8 [out, in] and scale [out] -> dense [out, in] of `dtype`."""
    return (weight.float() * scale.float().unsqueeze(-1)).to(dtype)
