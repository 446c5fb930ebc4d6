"""FP4 e2m1 weights, two a byte (the low nibble is the even column), a UE8M0 scale per row and 32 columns.

A code's bit 3 is the sign, the other three index 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.formats.ue8m0 import decode_ue8m0, encode_ue8m0

GROUP = 32
FP4_MAX = 6.0
MIN_AMAX = FP4_MAX * 2.0**-126  # keeps scales among FP32's normals, as the official code does
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor(_MAGNITUDES + tuple(-m for m in _MAGNITUDES))
_BYTES = torch.arange(256)
_PAIRS = torch.stack((_VALUES[_BYTES & 0xF], _VALUES[_BYTES >> 4]), dim=-1)  # [256, 2], by packed byte
_PAIRS_AS_ONE = {  # the two values of a byte as one integer, so that decoding is one look-up a byte
    torch.float32: _PAIRS.view(torch.int64).flatten(),
    torch.bfloat16: _PAIRS.bfloat16().view(torch.int32).flatten(),
}


def dequantize_fp4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """packed uint8 (or int8) [out, in/2], scale UE8M0 [out, in/32] -> dense [out, in] of `dtype`, exact in BF16 too."""
    inner = dtype if dtype in _PAIRS_AS_ONE else torch.float32
    table = _PAIRS_AS_ONE[inner].to(packed.device)
    rows, half = packed.shape
    pairs = table.index_select(0, packed.view(torch.uint8).flatten().int())
    groups = pairs.view(inner).view(rows, 2 * half // GROUP, GROUP)
    return groups.mul_(decode_ue8m0(scale).to(inner).unsqueeze(-1)).view(rows, 2 * half).to(dtype)


def quantize_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [out, in], in a multiple of 32 -> (packed uint8 [out, in/2], UE8M0 uint8 scale [out, in/32]).

    Each group's scale is the smallest power of two that brings its largest value within 6.
    """
    rows, cols = weight.shape
    if cols % GROUP:
        raise ValueError(f"FP4 needs the input dim a multiple of {GROUP}, got {cols}")
    groups = weight.float().reshape(rows, cols // GROUP, GROUP)
    scale = encode_ue8m0(groups.abs().amax(-1).clamp(min=MIN_AMAX) / FP4_MAX)
    codes = _codes(round_to_fp4(groups / decode_ue8m0(scale).unsqueeze(-1))).view(rows, cols // 2, 2)
    return codes[..., 0] | (codes[..., 1] << 4), scale


def round_to_fp4(x: Tensor) -> Tensor:
    """Each value to the nearest of e2m1's 16 (ties to the even code, beyond 6 to 6), FP32."""
    x = x.float()
    magnitude = x.abs()
    # Values lie 0.5 apart below 2, 1 apart below 4, 2 apart beyond; torch.round's ties to even are the codes' too.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (torch.round(x / step) * step).clamp(-FP4_MAX, FP4_MAX)


def _codes(values: Tensor) -> Tensor:
    """e2m1 values to their codes, uint8."""
    v = values.abs()
    code = torch.where(v < 2, 2 * v, torch.where(v < 4, v + 2, v / 2 + 4))
    return code.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
