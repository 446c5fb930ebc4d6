"""FP8 e4m3 weights in 128 x 128 blocks with a UE8M0 scale each: W = e4m3 * 2^(byte - 127)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from upwell.formats.ue8m0 import decode_ue8m0, encode_ue8m0

BLOCK = 128
FP8_MAX = 448.0
MIN_AMAX = FP8_MAX * 2.0**-126  # keeps scales among FP32's normals


def scale_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of the scale tensor of an FP8 weight [out, in]."""
    return -(-out_features // BLOCK), -(-in_features // BLOCK)


def dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """weight e4m3 [out, in], scale UE8M0 [ceil(out/128), ceil(in/128)] -> dense [out, in] of `dtype`, exact."""
    rows, cols = weight.shape
    inner = dtype if dtype == torch.bfloat16 else torch.float32  # a power of two is exact in either
    dense = _to_dense(weight, inner)
    factors = decode_ue8m0(scale).to(inner)
    if rows % BLOCK == 0 and cols % BLOCK == 0:
        blocks = dense.view(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
        blocks.mul_(factors[:, None, :, None])
    else:
        dense.mul_(factors.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols])
    return dense.to(dtype)


def _to_dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`, on a CPU by a look-up of two codes at once: torch converts FP8 there one by one."""
    flat = weight.flatten()
    if weight.device.type != "cpu" or flat.numel() % 2 or flat.storage_offset() % 2:
        return weight.to(dtype)
    return _pairs(dtype).index_select(0, flat.view(torch.uint16).int()).view(dtype).view(weight.shape)


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """[65536], by two packed codes: their two values of `dtype` (FP32 or BF16) as one integer."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    codes = torch.arange(1 << 16)
    pairs = torch.stack((values[codes & 0xFF], values[codes >> 8]), dim=-1)
    return pairs.view(torch.int32 if dtype == torch.bfloat16 else torch.int64).flatten()


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [out, in] -> (e4m3 [out, in], UE8M0 uint8 scale [ceil(out/128), ceil(in/128)]).

    Each block's scale is the smallest power of two that brings its largest value within e4m3's 448.
    """
    rows, cols = weight.shape
    block_rows, block_cols = scale_shape(rows, cols)
    padded = weight.new_zeros(block_rows * BLOCK, block_cols * BLOCK, dtype=torch.float32)
    padded[:rows, :cols] = weight
    blocks = padded.view(block_rows, BLOCK, block_cols, BLOCK)
    codes = encode_ue8m0(blocks.abs().amax(dim=(1, 3)).clamp(min=MIN_AMAX) / FP8_MAX)
    quantized = (blocks / decode_ue8m0(codes)[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return quantized.reshape(padded.shape)[:rows, :cols].to(torch.float8_e4m3fn).contiguous(), codes


def round_to_fp8(x: Tensor) -> Tensor:
    """Each value to the nearest e4m3 (ties to even, beyond 448 to 448), FP32, without the dtype: A2 and A3 lack it."""
    x = x.float().clamp(-FP8_MAX, FP8_MAX)
    # The exponent's bits give the spacing: 2^(e - 3), and 2^-9 for all below the smallest normal, 2^-6.
    exponent = ((x.abs().view(torch.int32) >> 23) - 3).clamp(min=127 - 9)
    step = (exponent << 23).view(torch.float32)
    return torch.round(x / step) * step
