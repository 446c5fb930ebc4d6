"""The tensors a conversion writes, in official order, each with what it is made of and made when it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from upwell.checkpoint.calibrate import Calibration
from upwell.checkpoint.geometry import Slot, fp4_packed_shape, fp4_scale_shape, fp8_scale_shape, slots
from upwell.checkpoint.integers import Rounded, integer_piece
from upwell.checkpoint.load import DTYPES
from upwell.checkpoint.match import INTEGER_SCALE, Plan, Weight
from upwell.checkpoint.recipes import INTEGER_TARGETS, RECIPES, Layout, Target, integer_format
from upwell.checkpoint.save import Piece
from upwell.checkpoint.shards import Stored
from upwell.errors import CheckpointError
from upwell.formats.fp4 import GROUP, quantize_fp4
from upwell.formats.fp8 import quantize_fp8
from upwell.ops.linear import dense_weight

# vllm-ascend's DSpark loader decodes this one itself, and waits for its scale; its converter leaves it as it is.
_DRAFT_WO_A = re.compile(r"^mtp\.\d+\.attn\.wo_a\.weight$")
_MTP_COPIES = {"embed.weight": "mtp.0.emb.tok_emb.weight", "head.weight": "mtp.0.head.weight"}


class _Reader:
    """Reads stored tensors into memory of their own, so that what is held is what is being converted."""

    def tensor(self, stored: Stored) -> Tensor:
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            view = raw.numpy().data
            at = 0
            while at < len(view):
                got = stream.readinto(view[at:])
                if not got:
                    raise CheckpointError(f"{stored}: the file ended while it was read")
                at += got
        dtype = torch.int8 if stored.dtype == "I8" else DTYPES[stored.dtype]
        return raw.view(dtype).view(stored.shape)

    def stored(self, weight: Weight) -> tuple[Tensor, Tensor | None]:
        """The weight and its scale as ops.linear.linear takes them."""
        tensor, scale = weight
        read = self.tensor(tensor)
        if scale is None:
            return read, None
        if tensor.dtype == "I8" and scale.dtype != "F32":
            read = read.view(torch.uint8)  # FP4, two a byte
        return read, self.tensor(scale)

    def dense(self, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
        return dense_weight(*self.stored(weight), dtype)


def conversion_pieces(
    plan: Plan, to: Target, layout: Layout, recipe: str, calibration: Calibration | None = None
) -> Iterator[Piece]:
    """Every tensor of the target. vllm-ascend's MTP is a model of its own and wants copies of embedding and head (a
    DSpark drafter takes the model's). With a calibration, INT4 experts are rounded for the inputs that it kept.

    Raises CheckpointError for a weight whose shape doesn't fit the format.
    """
    reader = _Reader()
    matrix = partial(_matrix, reader, to, layout, recipe)
    single = {slot.name: weight for slot, weight in plan.single}
    for slot in (*slots(plan.config), *plan.drafter):
        if plan.drafter and _DRAFT_WO_A.search(slot.name):
            yield _fp8(reader, slot.name, slot.shape, single[slot.name], None)
        elif slot.kind == "matrix":
            yield matrix(slot, slot.name, single[slot.name])
        elif slot.kind == "expert":
            layer, _, leaf = slot.name.removesuffix(".weight").partition(".{}.")
            for e in range(slot.count):
                to_int4 = None
                if calibration is not None:
                    up = partial(_up, reader, plan, layer, e)
                    to_int4 = partial(calibration.round_to_int4, layer, e, leaf, up)
                yield matrix(slot, slot.name.format(e), _of_expert(plan, layer, leaf, e), to_int4)
        else:
            yield _plain(slot, reader, single[slot.name])
    if layout == "vllm-ascend" and plan.config.num_nextn_predict_layers:
        for slot, weight in plan.single:
            if slot.name in _MTP_COPIES:
                yield _plain(replace(slot, name=_MTP_COPIES[slot.name]), reader, weight)


def _of_expert(plan: Plan, layer: str, leaf: str, expert: int) -> Weight:
    stacks = plan.stacked.get(layer)
    return plan.experts[layer][leaf][expert] if stacks is None else _row_of(stacks, leaf, expert)


def _up(reader: _Reader, plan: Plan, layer: str, expert: int) -> list[Tensor]:
    """An expert's w1 and w3, dense."""
    return [reader.dense(_of_expert(plan, layer, leaf, expert)) for leaf in ("w1", "w3")]


def _row_of(stacks: tuple[Stored, Stored], leaf: str, expert: int) -> Weight:
    """One expert's w1, w3 (halves of w13 [E, 2I, D]) or w2 of transformers' stacks, as a tensor in the file."""
    stack = stacks[1] if leaf == "w2" else stacks[0]
    rows, cols = stack.shape[1:]
    size = stack.nbytes // stack.shape[0]
    start = stack.start + expert * size
    if leaf == "w2":
        return replace(stack, shape=(rows, cols), start=start, end=start + size), None
    half = size // 2
    start += half if leaf == "w3" else 0
    return replace(stack, shape=(rows // 2, cols), start=start, end=start + half), None


def _plain(slot: Slot, reader: _Reader, weight: Weight) -> Piece:
    as_stored = {"table": (torch.int64, "I64"), "float": (torch.float32, "F32")}
    dtype, code = as_stored.get(slot.kind, (torch.bfloat16, "BF16"))
    return Piece(((slot.name, code, slot.shape),), lambda: (reader.tensor(weight[0]).to(dtype),))


def _matrix(
    reader: _Reader, to: Target, layout: Layout, recipe: str, slot: Slot, name: str, weight: Weight,
    to_int4: Rounded | None = None,
) -> Piece:  # fmt: skip
    """A matrix or one expert's weight in the target's format."""
    integer = integer_format(name, to, recipe)
    if integer is not None:
        read, on_grid = partial(reader.stored, weight), RECIPES[recipe].on_grid
        return integer_piece(name, slot.shape, integer, layout, read, on_grid, to_int4)
    if to == "bf16" or to in INTEGER_TARGETS:
        return Piece(((name, "BF16", slot.shape),), lambda: (reader.dense(weight, torch.bfloat16),))
    base, cols = name.removesuffix("weight"), slot.shape[-1]
    if to == "fp4" and slot.kind == "expert":
        if cols % GROUP:
            raise CheckpointError(f"{name}: {cols} columns aren't a multiple of FP4's group of {GROUP}", "use --to fp8")
        specs = ((name, "I8", fp4_packed_shape(slot.shape)), (f"{base}scale", "F8_E8M0", fp4_scale_shape(slot.shape)))
        return Piece(specs, lambda: _kept(reader, weight, ("I8", "U8")) or quantize_fp4(reader.dense(weight)), "fp4")
    return _fp8(reader, name, slot.shape, weight, "fp8")


def _fp8(reader: _Reader, name: str, shape: tuple[int, ...], weight: Weight, format: str | None) -> Piece:
    scale = (name.removesuffix("weight") + "scale", "F8_E8M0", fp8_scale_shape(shape))
    make = partial(_fp8_tensors, reader, weight)
    return Piece(((name, "F8_E4M3", shape), scale), make, format)


def _fp8_tensors(reader: _Reader, weight: Weight) -> tuple[Tensor, ...]:
    return _kept(reader, weight, ("F8_E4M3",)) or quantize_fp8(reader.dense(weight))


def _kept(reader: _Reader, weight: Weight, dtypes: tuple[str, ...]) -> tuple[Tensor, ...] | None:
    """The packed weight and its scale as they are, where they are in the wanted format already."""
    tensor, scale = weight
    if scale is None or tensor.dtype not in dtypes or scale.dtype in INTEGER_SCALE:
        return None
    return reader.tensor(tensor), reader.tensor(scale)
