"""A weight in any of the checkpoint's formats to INT8 or INT4 in one pass: what a conversion spends its time on."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from upwell.formats.int4 import int4_scale, pack_int4, round_to_int4
from upwell.formats.int8 import quantize_int8
from upwell.ops import native
from upwell.ops.linear import FP8, PACKED, dense_weight

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, FP8: 2, PACKED: 3}


class Integers(NamedTuple):
    """codes INT8 [out, in], or packed INT4, uint8; scale FP32 [out], or BF16 [out, in/group]; sums [out, blocks]."""

    codes: Tensor
    scale: Tensor
    sums: Tensor


class _Call(ctypes.Structure):
    """Requantize of csrc/requantize.h."""

    _fields_ = [
        ("weight", c_void_p), ("scale", c_void_p),
        *((name, c_int64) for name in (
            "rows", "cols", "format", "bits", "group", "bf16_scales", "on_grid", "pack_rows", "blocks")),
        ("codes", c_void_p), ("scales", c_void_p), ("sums", c_void_p),
    ]  # fmt: skip


def requantize(
    weight: Tensor, scale: Tensor | None, bits: Literal[8, 4], group: int | None = None, pack_rows: bool = False,
    blocks: int = 0, on_grid: bool = False,
) -> Integers:  # fmt: skip
    """weight and scale as ops.linear.linear takes them, [out, in] -> integers by row, INT4 also by `group` columns.

    `on_grid`: FP8's and FP4's scales are powers of two, and so INT8's are to be (formats/int8.py); other weights have
    no such grid.

    INT4 is packed by columns [out, in/2] (formats/int4.py), or by rows [out/2, in]: byte [j, i] is rows 2j (low nibble)
    and 2j + 1. sums: the integers' sums over each of `blocks` equal parts of a row. A NaN makes its scale NaN.
    """
    on_grid = on_grid and scale is not None and scale.dtype == torch.uint8
    if usable(weight, scale, group):
        return _native(weight, scale, bits, group, pack_rows, blocks, on_grid)
    return plain_requantize(weight, scale, bits, group, pack_rows, blocks, on_grid)


def plain_requantize(
    weight: Tensor, scale: Tensor | None, bits: Literal[8, 4], group: int | None, pack_rows: bool, blocks: int,
    on_grid: bool = False,
) -> Integers:  # fmt: skip
    dense = dense_weight(weight, scale, torch.float32)
    if bits == 8:
        codes, steps = quantize_int8(dense, on_grid)
        return Integers(codes, steps, _sums(codes, blocks))
    steps = int4_scale(dense, group)
    return int4_integers(round_to_int4(dense, steps), steps, pack_rows, blocks)


def int4_integers(codes: Tensor, scale: Tensor, pack_rows: bool, blocks: int) -> Integers:
    """INT4 integers, int8 [out, in], and their scale, packed and summed as `requantize` has them."""
    packed = pack_int4(codes.T.contiguous()).T.contiguous() if pack_rows else pack_int4(codes)
    return Integers(packed, scale, _sums(codes, blocks))


def _sums(codes: Tensor, blocks: int) -> Tensor:
    if not blocks:
        return torch.empty(len(codes), 0, dtype=torch.int32)
    return codes.view(len(codes), blocks, -1).sum(-1, dtype=torch.int32)


def usable(weight: Tensor, scale: Tensor | None, group: int | None) -> bool:
    """The kernel takes the call: formats of releases, on the CPU, and FP4's groups whole."""
    released = weight.dtype in _FORMATS and (scale is None or scale.dtype == torch.uint8)
    on_cpu = weight.device.type == "cpu" and weight.is_contiguous() and (scale is None or scale.is_contiguous())
    fits = weight.dtype != PACKED or (weight.shape[1] % 16 == 0 and (group or 32) % 32 == 0)
    return released and on_cpu and fits and weight.numel() > 0 and _kernel() is not None


def _kernel() -> Any:
    """The C function; None where there are no kernels, or only ones built before it."""
    return getattr(native.library(), "upwell_requantize_weight", None)


def _native(
    weight: Tensor, scale: Tensor | None, bits: int, group: int | None, pack_rows: bool, blocks: int, on_grid: bool
) -> Integers:  # fmt: skip
    rows, cols = weight.shape
    cols *= 2 if weight.dtype == PACKED else 1
    by_group, group = group is not None, group or cols
    if bits == 4 and (rows if pack_rows else cols) % 2:
        raise ValueError(f"INT4 needs an even number to pack, got {rows if pack_rows else cols}")
    if cols % group or (blocks and cols % blocks):
        raise ValueError(f"{cols} columns don't divide into groups of {group} and {blocks} blocks")
    packed = (rows // 2, cols) if pack_rows else (rows, cols // 2)
    codes = torch.empty((rows, cols), dtype=torch.int8) if bits == 8 else torch.empty(packed, dtype=torch.uint8)
    scales = torch.empty(rows, cols // group)
    sums = torch.empty(rows, blocks, dtype=torch.int32)
    at = None if scale is None else scale.data_ptr()
    call = _Call(
        weight.data_ptr(), at, rows, cols, _FORMATS[weight.dtype], bits, group, by_group,
        on_grid and bits == 8, pack_rows and bits == 4, blocks, codes.data_ptr(), scales.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    kernel = _kernel()
    assert kernel is not None
    kernel(ctypes.byref(call))
    return Integers(codes, scales.bfloat16() if by_group else scales.squeeze(1), sums)
