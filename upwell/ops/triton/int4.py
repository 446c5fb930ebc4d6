"""Packed INT4 in Triton: a decode step's products straight from the packed bytes of the experts that were picked, and
decoding into an operand for the cube (formats/int4.py is the format: the low nibble is the even column)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from upwell.ops.triton import split_columns
from upwell.ops.triton.tiles import Tiles


def products(
    rows: Tensor, packed: Tensor, scales: Tensor, picks: Tensor, row_scales: Tensor | None, dtype: torch.dtype,
    tiles: Tiles,
) -> Tensor | None:  # fmt: skip
    """Each row by its own pick of the weights: rows [P, in], packed uint8 [E, out, in/2], scales FP32 [E, out] or
    [E, out, in/group], picks [P], row_scales [P] FP32 or None -> [P, out] of `dtype`, summed in FP32."""
    pairs, (_, outputs, half) = rows.shape[0], packed.shape
    groups = scales.shape[2] if scales.dim() == 3 else 0
    group = 2 * half // groups if groups else 0
    if pairs == 0 or not _covers(group, tiles) or scales.dtype != torch.float32:
        return None
    if not (packed.is_contiguous() and scales.is_contiguous()):
        return None
    split = split_columns(rows).contiguous()
    out = rows.new_empty(pairs, outputs, dtype=dtype)
    blocks = triton.cdiv(outputs, tiles.int4_rows)
    product_kernel[(min(pairs * blocks, tiles.cores),)](
        split, packed.view(torch.int8), scales, picks, scales if row_scales is None else row_scales, out,
        pairs, outputs, half, groups, blocks,
        BN=tiles.int4_rows, BK=tiles.int4_bytes, GROUP=group, ROW_SCALES=row_scales is not None,
    )  # fmt: skip
    return out


def decode(packed: Tensor, scale: Tensor | None, dtype: torch.dtype, tiles: Tiles) -> Tensor | None:
    """uint8 [out, in/2] -> [out, in] of `dtype`, its even columns before its odd ones (as split_columns has them): the
    integers where `scale` is None, else their values by scale FP32 [out, in/group]."""
    outputs, half = packed.shape
    group = 0 if scale is None else 2 * half // scale.shape[1]
    if not _covers(group, tiles) or not packed.is_contiguous() or (scale is not None and not scale.is_contiguous()):
        return None
    out = torch.empty(outputs, 2 * half, dtype=dtype, device=packed.device)
    row_blocks, byte_blocks = triton.cdiv(outputs, tiles.int4_rows), triton.cdiv(half, tiles.int4_bytes)
    decode_kernel[(min(row_blocks * byte_blocks, tiles.cores),)](
        packed.view(torch.int8), out if scale is None else scale, out, outputs, half, row_blocks, byte_blocks,
        BN=tiles.int4_rows, BK=tiles.int4_bytes, GROUP=group,
    )  # fmt: skip
    return out


def _covers(group: int, tiles: Tiles) -> bool:
    """By row (0), or a power of two of columns that a tile holds whole."""
    return group == 0 or (group & (group - 1) == 0 and 16 <= group <= 2 * tiles.int4_bytes)


@triton.jit
def product_kernel(
    rows, packed, scales, picks, row_scales, out, pairs, outputs, half, groups, blocks,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ROW_SCALES: tl.constexpr,
):  # fmt: skip
    """rows [P, 2, half], packed INT8 [E, outputs, half] -> out [P, outputs]. A byte's nibbles as signed integers are
    shifts; the scale comes after the sum, of a group or of a row (GROUP 0)."""
    for item in range(tl.program_id(0), pairs * blocks, tl.num_programs(0)):
        p = item // blocks
        n = (item % blocks) * BN + tl.arange(0, BN)
        inside = n < outputs
        first = tl.load(picks + p) * outputs
        weight, steps = packed + first * half, scales + first * groups
        total = tl.zeros((BN,), tl.float32)
        for k0 in range(0, half, BK):
            k = k0 + tl.arange(0, BK)
            mask = inside[:, None] & (k < half)[None, :]
            byte = tl.load(weight + n[:, None] * half + k[None, :], mask=mask, other=0).to(tl.int32)
            even = tl.load(rows + p * 2 * half + k, mask=k < half, other=0.0).to(tl.float32)
            odd = tl.load(rows + p * 2 * half + half + k, mask=k < half, other=0.0).to(tl.float32)
            terms = ((byte << 28) >> 28).to(tl.float32) * even[None, :] + (byte >> 4).to(tl.float32) * odd[None, :]
            if GROUP == 0:
                total += tl.sum(terms, axis=1)
            else:
                SPAN: tl.constexpr = 2 * BK // GROUP
                g = k0 * 2 // GROUP + tl.arange(0, SPAN)
                known = inside[:, None] & (g < groups)[None, :]
                step = tl.load(steps + n[:, None] * groups + g[None, :], mask=known, other=0.0)
                total += tl.sum(tl.sum(tl.reshape(terms, (BN, SPAN, GROUP // 2)), axis=2) * step, axis=1)
        if GROUP == 0:
            total *= tl.load(scales + first + n, mask=inside, other=0.0)
        if ROW_SCALES:
            total *= tl.load(row_scales + p)
        tl.store(out + p * outputs + n, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    packed, scales, out, outputs, half, row_blocks, byte_blocks, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):
    """packed INT8 [outputs, half] -> out [outputs, 2, half]: integers (GROUP 0), or values by scales [outputs, groups]."""
    for item in range(tl.program_id(0), row_blocks * byte_blocks, tl.num_programs(0)):
        n = (item // byte_blocks) * BN + tl.arange(0, BN)
        k = (item % byte_blocks) * BK + tl.arange(0, BK)
        inside = n < outputs
        mask = inside[:, None] & (k < half)[None, :]
        at = n[:, None] * half + k[None, :]
        byte = tl.load(packed + at, mask=mask, other=0).to(tl.int32)
        even, odd = ((byte << 28) >> 28).to(tl.float32), (byte >> 4).to(tl.float32)
        if GROUP > 0:
            SPAN: tl.constexpr = 2 * BK // GROUP
            groups = 2 * half // GROUP
            g = (item % byte_blocks) * SPAN + tl.arange(0, SPAN)
            known = inside[:, None] & (g < groups)[None, :]
            step = tl.load(scales + n[:, None] * groups + g[None, :], mask=known, other=0.0)[:, :, None]
            even = tl.reshape(tl.reshape(even, (BN, SPAN, GROUP // 2)) * step, (BN, BK))
            odd = tl.reshape(tl.reshape(odd, (BN, SPAN, GROUP // 2)) * step, (BN, BK))
        to = out + n[:, None] * 2 * half + k[None, :]
        tl.store(to, even.to(out.dtype.element_ty), mask=mask)
        tl.store(to + half, odd.to(out.dtype.element_ty), mask=mask)
