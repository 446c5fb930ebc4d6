"""Products with a weight in any of the checkpoint's formats, and the official input quantization in front of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upwell.formats.fp4 import dequantize_fp4
from upwell.formats.fp8 import dequantize_fp8
from upwell.ops import linear_autograd

FP8 = torch.float8_e4m3fn
PACKED_FP4 = torch.uint8


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight^T -> [..., out] in x's dtype.

    weight: dense [out, in]; FP8 e4m3 [out, in] with scale [ceil(out/128), ceil(in/128)]; or FP4 packed two a byte,
    uint8 [out, in/2], with scale [out, in/32]. Scales are UE8M0 bytes.
    """
    dense = dense_weight(weight, scale, x.dtype)
    return linear_autograd.linear(x, dense) if linear_autograd.usable(x, dense) else F.linear(x, dense)


def dense_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as a dense [out, in] tensor of `dtype`, decoded where packed."""
    if weight.dtype == FP8:
        assert scale is not None
        return dequantize_fp8(weight, scale, dtype)
    if weight.dtype == PACKED_FP4:
        assert scale is not None
        return dequantize_fp4(weight, scale, dtype)
    return weight.to(dtype)
