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
from upwell.formats.int4 import GROUP
from upwell.ops.linear import dense_weight
from upwell.ops.requantize import Integers, int4_integers, requantize

Tensors = tuple[Tensor, ...]
BIAS_COLUMNS = 16  # of w2's scale_bias
Rounded = Callable[[Tensor, int | None], tuple[Tensor, Tensor]]  # a dense weight and a group to INT4 integers and scale
QUANT_TYPES: dict[str | None, str] = {"int8": "W8A8_DYNAMIC", "int4": "W4A8_DYNAMIC", "int4-groups": "W4A16"}


def integer_piece(
    name: str, shape: tuple[int, ...], integer: Integer, layout: Layout,
    read: Callable[[], tuple[Tensor, Tensor | None]], on_grid: bool, to_int4: Rounded | None = None,
) -> Piece:  # fmt: skip
    """The tensors of weight `name` [out, in]; `read` gives it and its scale as ops.linear.linear takes them. INT8's
    scales are as ops.requantize has them; INT4 is rounded by `to_int4`, to nearest where there is none.

    Raises CheckpointError where its shape doesn't fit the format, and when made where it holds a NaN.
    """
    _check_shape(name, shape, integer, layout)
    base = name.removesuffix("weight")
    va = layout == "vllm-ascend"
    blocks = 0 if not va or integer != "int4" else BIAS_COLUMNS if name.endswith(".w2.weight") else 1
    group = GROUP if integer == "int4-groups" else None

    def make() -> Tensors:
        by_rows = va and integer == "int4"
        if to_int4 is not None and integer != "int8":
            dense = dense_weight(*read(), torch.float32)
            finite = bool(dense.isfinite().all())
            codes, scale = to_int4(dense if finite else torch.zeros_like(dense), group)
            made = int4_integers(codes, scale if group is None else scale.bfloat16(), by_rows, blocks)
        else:
            made = requantize(*read(), 8 if integer == "int8" else 4, group, by_rows, blocks, on_grid)
            finite = bool(made.scale.isfinite().all())
        if not finite:
            raise CheckpointError(f"{name}: the source holds numbers that aren't finite", "download it again")
        return _vllm_ascend(made, integer, shape) if va else (made.codes, made.scale)

    specs = _va_specs(base, shape, integer, blocks) if va else _upwell_specs(base, shape, integer)
    return Piece(specs, make, integer)


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
    by_group = integer == "int4-groups"
    scale = ("BF16", (rows, cols // GROUP)) if by_group else ("F32", (rows,))
    return (f"{base}weight", "U8", (rows, cols // 2)), (f"{base}scale", *scale)


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


def _vllm_ascend(made: Integers, integer: Integer, shape: tuple[int, ...]) -> Tensors:
    if integer == "int4-groups":
        biased = made.codes ^ 0x88  # two's complement to an offset of 8
        return biased.view(torch.int32), made.scale, torch.tensor(shape, dtype=torch.int32)
    column = made.scale.unsqueeze(1)
    both = column, torch.zeros_like(column)
    if integer == "int8":
        return made.codes, *both
    return made.codes.view(torch.int8), *both, 8 * column * made.sums
