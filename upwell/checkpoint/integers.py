"""One weight as integers, in either layout: which tensors it becomes, and how they are made.

Upwell's: `weight` (INT8 [out, in], or INT4 two a byte [out, in/2] as U8) and `scale` (formats/int8.py, int4.py).

vllm-ascend's, from what its loader reads (vllm_ascend/quantization/methods/w8a8_dynamic.py, w4a8.py, w4a16.py at
182b75ea): by row `weight`, `weight_scale` and `weight_offset` (zeros) [out, 1]. W4A8 packs rows, byte [j, i] holds row
2j low and row 2j + 1 high, and `scale_bias` is 8 * scale * the row's sum of integers: of w2 as 16 columns, each of one
sixteenth of the inputs, so that tensor-parallel ranks can share them; the loader sums what a rank has. (vllm-ascend's
converter writes one column, which the loader's own shape, 16 / ranks, doesn't take.) W4A16 is the LLM-Compressor's:
`weight_packed` has 8 of integer + 8 in an I32, `weight_scale` is BF16 [out, in/32], `weight_shape` I32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from upwell.checkpoint.recipes import Integer, Layout
from upwell.checkpoint.save import Piece, Specs
from upwell.errors import CheckpointError
from upwell.formats.int4 import GROUP, int4_scale, pack_int4, round_to_int4
from upwell.formats.int8 import quantize_int8

Tensors = tuple[Tensor, ...]
BIAS_COLUMNS = 16  # of w2's scale_bias
QUANT_TYPES: dict[str | None, str] = {"int8": "W8A8_DYNAMIC", "int4": "W4A8_DYNAMIC", "int4-groups": "W4A16"}


def integer_piece(
    name: str, shape: tuple[int, ...], integer: Integer, layout: Layout, dense: Callable[[], Tensor]
) -> Piece:
    """The tensors of weight `name` [out, in]. Raises CheckpointError where its shape doesn't fit the format."""
    _check_shape(name, shape, integer, layout)
    base = name.removesuffix("weight")
    if layout == "upwell":
        return Piece(_upwell_specs(base, shape, integer), lambda: _upwell(dense(), integer), integer)
    blocks = BIAS_COLUMNS if name.endswith(".w2.weight") else 1
    return Piece(_va_specs(base, shape, integer, blocks), lambda: _vllm_ascend(dense(), integer, blocks), integer)


def _check_shape(name: str, shape: tuple[int, ...], integer: Integer, layout: Layout) -> None:
    rows, cols = shape
    if integer == "int8":
        return
    needs = [(cols, GROUP if integer == "int4-groups" else 2, "columns")]
    if integer == "int4" and layout == "vllm-ascend":
        needs = [(rows, 2, "rows"), (cols, BIAS_COLUMNS if name.endswith(".w2.weight") else 1, "columns")]
    for size, multiple, what in needs:
        if size % multiple:
            raise CheckpointError(f"{name}: {size} {what} aren't a multiple of {multiple}, as INT4 needs", "use w8a8")


def _upwell_specs(base: str, shape: tuple[int, ...], integer: Integer) -> Specs:
    rows, cols = shape
    if integer == "int8":
        return (f"{base}weight", "I8", shape), (f"{base}scale", "F32", (rows,))
    scale = (rows, cols // GROUP) if integer == "int4-groups" else (rows,)
    return (f"{base}weight", "U8", (rows, cols // 2)), (f"{base}scale", "F32", scale)


def _upwell(weight: Tensor, integer: Integer) -> Tensors:
    if integer == "int8":
        return quantize_int8(weight)
    scale = int4_scale(weight, GROUP if integer == "int4-groups" else None)
    return pack_int4(round_to_int4(weight, scale)), scale


def _va_specs(base: str, shape: tuple[int, ...], integer: Integer, blocks: int) -> Specs:
    rows, cols = shape
    if integer == "int4-groups":
        return (
            (f"{base}weight_packed", "I32", (rows, cols // 8)), (f"{base}weight_scale", "BF16", (rows, cols // GROUP)),
            (f"{base}weight_shape", "I32", (2,)),
        )  # fmt: skip
    column = ("F32", (rows, 1))
    both = (f"{base}weight_scale", *column), (f"{base}weight_offset", *column)
    if integer == "int8":
        return (f"{base}weight", "I8", shape), *both
    return (f"{base}weight", "I8", (rows // 2, cols)), *both, (f"{base}scale_bias", "F32", (rows, blocks))


def _vllm_ascend(weight: Tensor, integer: Integer, blocks: int) -> Tensors:
    if integer == "int8":
        codes, scale = quantize_int8(weight)
        return codes, scale.unsqueeze(1), torch.zeros(len(scale), 1)
    scale = int4_scale(weight, GROUP if integer == "int4-groups" else None)
    codes = round_to_int4(weight, scale)
    if integer == "int4-groups":
        biased = pack_int4(codes) ^ 0x88  # two's complement to an offset of 8
        return biased.view(torch.int32), scale.bfloat16(), torch.tensor(codes.shape, dtype=torch.int32)
    nibbles = codes.view(torch.uint8) & 0xF
    packed = (nibbles[::2] | (nibbles[1::2] << 4)).view(torch.int8)
    sums = codes.view(len(codes), blocks, -1).sum(-1, dtype=torch.int32)
    column = scale.unsqueeze(1)
    return packed, column, torch.zeros_like(column), 8 * column * sums
