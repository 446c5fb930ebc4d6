"""A rank's part of a stored tensor, packed as it is where the part begins at the format's blocks.

Rows of a tensor are a view of the mapped file. Columns are copied: the rest is read past the mapping, so that it never
counts as this process's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upwell.checkpoint.geometry import FP4_GROUP, FP8_BLOCK
from upwell.checkpoint.match import INTEGER_SCALE, Weight
from upwell.checkpoint.shards import Stored
from upwell.errors import InputError
from upwell.model.sharding import Cut
from upwell.ops.linear import dense_weight

if TYPE_CHECKING:
    from upwell.checkpoint.load import MappedFiles


def part_of(files: MappedFiles, weight: Weight, cut: Cut, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The part and its scale, in host memory. An FP8 part that doesn't begin at a block comes decoded to `dtype`, with
    no scale; an FP4 part has to (InputError)."""
    tensor, scale = weight
    if scale is None:
        return _slice(files, tensor, cut), None
    if scale.dtype in INTEGER_SCALE:  # INT8: a scale a row; INT4, two codes a byte: a scale a row, or a group of a row
        if tensor.dtype == "I8":
            return _slice(files, tensor, cut).view(torch.int8), _slice(files, scale, Cut(rows=cut.rows))
        if cut.cols is None:
            return _slice(files, tensor, cut), _slice(files, scale, cut)
        raise InputError(f"{tensor}: columns of INT4 aren't split over ranks", "use --ep, which leaves experts whole")
    if tensor.dtype == "F8_E4M3":
        if _begins(cut.rows, FP8_BLOCK, tensor.shape[0]) and _begins(cut.cols, FP8_BLOCK, tensor.shape[1]):
            blocks = Cut(_units(cut.rows, FP8_BLOCK), _units(cut.cols, FP8_BLOCK))
            return _slice(files, tensor, cut), _slice(files, scale, blocks)
        dense = dense_weight(files.tensor(tensor), files.tensor(scale), dtype)
        return _of(dense, cut).clone(), None
    if cut.cols is None:
        return _slice(files, tensor, cut), _slice(files, scale, cut)
    if not _begins(cut.cols, FP4_GROUP, 2 * tensor.shape[1]):
        raise InputError(
            f"{tensor} has columns {cut.cols[0]} to {cut.cols[1]} for a rank, which isn't at its groups of {FP4_GROUP}",
            "use --ep, which leaves experts whole",
        )
    pairs, groups = _units(cut.cols, 2), _units(cut.cols, FP4_GROUP)
    return _slice(files, tensor, Cut(cut.rows, pairs)), _slice(files, scale, Cut(cut.rows, groups))


def _begins(span: tuple[int, int] | None, unit: int, total: int) -> bool:
    """The span's ends lie between units of the axis, or at its end."""
    return span is None or all(end % unit == 0 or end == total for end in span)


def _units(span: tuple[int, int] | None, unit: int) -> tuple[int, int] | None:
    return None if span is None else (span[0] // unit, -(-span[1] // unit))


def _of(whole: Tensor, cut: Cut) -> Tensor:
    rows = whole if cut.rows is None else whole[cut.rows[0] : cut.rows[1]]
    return rows if cut.cols is None else rows[:, cut.cols[0] : cut.cols[1]]


def _slice(files: MappedFiles, stored: Stored, cut: Cut) -> Tensor:
    if cut.cols is None:
        return _of(files.tensor(stored), cut)
    return _of(_read(files, stored), cut).clone(memory_format=torch.contiguous_format)


def _read(files: MappedFiles, stored: Stored) -> Tensor:
    """The whole tensor in memory of its own."""
    data = bytearray(stored.nbytes)
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        stream.readinto(data)
    return torch.frombuffer(data, dtype=torch.uint8).view(files.tensor(stored).dtype).view(stored.shape)
