"""Products with a weight in any of the checkpoint's formats, and the official input quantization in front of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upwell.formats.fp4 import dequantize_fp4
from upwell.formats.fp8 import dequantize_fp8
from upwell.formats.int4 import dequantize_int4, unpack_int4
from upwell.formats.int8 import dequantize_int8
from upwell.ops import linear_autograd, npu

FP8 = torch.float8_e4m3fn
PACKED = torch.uint8  # FP4 beside scales that are bytes, UE8M0; INT4 beside floating-point ones


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight^T -> [..., out] in x's dtype.

    weight: dense [out, in]; FP8 e4m3 [out, in] with scale [ceil(out/128), ceil(in/128)]; FP4 packed two a byte,
    uint8 [out, in/2], with scale [out, in/32], both scales UE8M0 bytes; INT8 [out, in] with scale FP32 [out] (W8A8);
    or INT4 packed two a byte, uint8 [out, in/2], with scale FP32 [out] (W4A8) or BF16 [out, in/group]
    (W4A16).
    """
    if scale is not None and scale.is_floating_point():
        return integer_linear(x, weight, scale)
    dense = dense_weight(weight, scale, x.dtype)
    return linear_autograd.linear(x, dense) if linear_autograd.usable(x, dense) else F.linear(x, dense)


def dense_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as a dense [out, in] tensor of `dtype`, decoded where packed."""
    if weight.dtype == FP8:
        assert scale is not None
        return dequantize_fp8(weight, scale, dtype)
    if weight.dtype == PACKED:
        assert scale is not None
        decode = dequantize_int4 if scale.is_floating_point() else dequantize_fp4
        return decode(weight, scale, dtype)
    if weight.dtype == torch.int8:
        assert scale is not None
        return dequantize_int8(weight, scale, dtype)
    return weight.to(dtype)


def integer_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`linear` for INT8 and INT4 weights. Where scales are one a row, x is rounded too (W8A8, W4A8)."""
    if weight.dtype == torch.int8:
        return int8_linear(x, weight, scale)
    if (kernels := npu.fused(x)) is not None and (out := kernels.int4_linear(x, weight, scale)) is not None:
        return out
    if scale.dim() == 1:
        return int8_linear(x, unpack_int4(weight), scale)
    return F.linear(x, dequantize_int4(weight, scale, x.dtype))


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """W8A8: x [..., in] rounded to INT8 by its own scale a token (amax / 127), weight INT8 [out, in], scale FP32 [out].

    The integers' product is taken in FP32, which holds it to one part in 2^24; then both scales.
    """
    if (kernels := npu.fused(x)) is not None and (out := kernels.quantized_linear(x, weight, scale)) is not None:
        return out
    quantized, per_token = round_to_int8(x)
    return (F.linear(quantized, weight.float()) * per_token * scale).to(x.dtype)


def round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] in steps of amax / 127 of its own row: the integers, as FP32, and the step [..., 1]."""
    wide = x.float()
    step = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.round(wide / step), step
