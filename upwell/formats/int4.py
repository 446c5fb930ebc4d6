"""INT4 weights, two a byte (the low nibble is the even column), symmetric: W = int4 * scale, int4 in -7..7.

A scale is FP32, one a row (`[out]`: what W4A8 on Ascend takes, beside activations rounded to INT8 by token), or BF16,
one a row and group of columns (`[out, in/group]`: W4A16, activations stay as they are). Which of the two a weight has
is what tells the two apart; a packed byte tensor with UE8M0 scales is FP4 (formats/fp4.py).

    packed, scale = quantize_int4(weight)                 # by row; quantize_int4(weight, group=32) by group
    codes = round_to_int4(weight, scale)                  # int8 [out, in] with a scale of one's own choice
    packed = pack_int4(codes)                             # uint8 [out, in/2];  unpack_int4(packed) gives codes back
    weight = dequantize_int4(packed, scale)
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MAX = 7
GROUP = 32  # W4A16's group: FP4's own, so that no group mixes two of the source's scales; vllm-ascend's default too


def quantize_int4(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Dense [out, in] -> (uint8 [out, in/2], FP32 scale [out], or BF16 [out, in/group] with a `group`).

    scale = amax / 7; what is zero everywhere has scale 1 / 7. ValueError where `in` is odd or no multiple of `group`.
    A NaN among the weights is one in the scale.
    """
    scale = int4_scale(weight, group)
    return pack_int4(round_to_int4(weight, scale)), scale


def int4_scale(weight: Tensor, group: int | None = None) -> Tensor:
    """The scales that bring each row's (or group's) largest value to 7. Groups' are BF16: they are many, and the NPU's
    products take no others."""
    rows, cols = weight.shape
    if group is not None and cols % group:
        raise ValueError(f"INT4 by groups needs the input dim a multiple of {group}, got {cols}")
    amax = weight.float().view(rows, -1, group or cols).abs().amax(-1)
    scale = torch.where(amax == 0, 1.0, amax) / INT4_MAX
    return scale.bfloat16() if group is not None else scale.squeeze(1)


def round_to_int4(weight: Tensor, scale: Tensor) -> Tensor:
    """Dense [out, in] and a scale [out] or [out, in/group] -> the nearest integers in -7..7, int8 [out, in]."""
    rows, cols = weight.shape
    steps = weight.float().view(rows, scale[0].numel(), -1) / scale.float().reshape(rows, -1, 1)
    return torch.round(steps).clamp_(-INT4_MAX, INT4_MAX).to(torch.int8).view(rows, cols)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 [..., in] in -8..7 -> uint8 [..., in/2], two's complement nibbles. ValueError where `in` is odd."""
    if codes.shape[-1] % 2:
        raise ValueError(f"INT4 needs an even input dim, got {codes.shape[-1]}")
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., in/2] -> int8 [..., in]."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def dequantize_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [out, in/2] and a scale [out] or [out, in/group] -> dense [out, in] of `dtype`."""
    codes = unpack_int4(packed)
    rows, cols = codes.shape
    groups = codes.float().view(rows, scale[0].numel(), -1)
    return (groups * scale.float().reshape(rows, -1, 1)).view(rows, cols).to(dtype)
