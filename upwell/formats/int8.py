"""INT8 weights with a scale a row (an output channel): W = int8 * scale, symmetric, as W8A8 on Ascend takes them."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [out, in] -> (INT8 [out, in], FP32 scale [out]); scale = amax / 127, a row of zeros has scale 1 / 127."""
    wide = weight.float()
    amax = wide.abs().amax(dim=-1)
    scale = torch.where(amax == 0, 1.0, amax) / INT8_MAX
    return torch.round(wide / scale.unsqueeze(-1)).clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """INT8 [out, in] and scale [out] -> dense [out, in] of `dtype`."""
    return (weight.float() * scale.float().unsqueeze(-1)).to(dtype)
