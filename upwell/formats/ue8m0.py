"""UE8M0: a scale as one exponent byte, 2^(byte - 127); 255 is NaN (OCP Microscaling formats)."""

from __future__ import annotations

import torch
from torch import Tensor

BIAS = 127


def decode_ue8m0(codes: Tensor) -> Tensor:
    """uint8 exponent bytes (or torch's float8_e8m0fnu, the same bytes) to FP32, same shape. 255 decodes to NaN."""
    exponent = codes.view(torch.uint8).to(torch.int32)
    # The byte is FP32's exponent field but at the ends: 0 is 2^-127, a subnormal there, and 255 is NaN, not infinity.
    bits = torch.where(exponent == 0, 1 << 22, exponent << 23)
    return torch.where(exponent == 255, 0x7FC00000, bits).view(torch.float32)


def encode_ue8m0(scale: Tensor) -> Tensor:
    """Positive FP32 values to exponent bytes, uint8: the least power of two that isn't below. The range clamps to
    2^-127 .. 2^127; NaN gives 255."""
    bits = scale.float().contiguous().view(torch.int32)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    # Between powers of two round up. Subnormals have a zero field: those above 2^-127 need 2^-126, byte 1.
    above = torch.where(exponent == 0, fraction > 1 << 22, fraction > 0)
    codes = (exponent + above).clamp(0, 254)
    return torch.where(scale.isnan(), 255, codes).to(torch.uint8)
