"""A layer's routed experts by the C++ kernels, straight from packed weights: FP32 on the host, without gradient.

A table holds the three matrices of each expert. Where experts are paged in, a callback points their matrices to the
memory they came to, some at a time (csrc/layout.h, Take).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import cast, pointer
from typing import Any

import torch
from torch import Tensor

from upwell.ops import native

LEAVES = ("w1", "w3", "w2")  # an expert's matrices, as the kernels have them

Places = tuple[int, int, int, int, int, int]
"""Addresses of weight and scale of w1, w3, w2."""


def table(kind: torch.dtype, count: int, hidden: int, inter: int) -> Any:
    """Matrices of `count` experts, FP8 or FP4, that point nowhere yet: an array of native.Matrix."""
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    matrices = (native.Matrix(None, None, *shape, native.FORMATS[kind]) for _ in range(count) for shape in shapes)
    return (native.Matrix * (3 * count))(*matrices)


def fits(kind: torch.dtype, hidden: int, inter: int) -> bool:
    """The kernels take these weights."""
    groups = kind == torch.float8_e4m3fn or (kind == torch.uint8 and hidden % 32 == 0 and inter % 32 == 0)
    return groups and native.library() is not None


def fits_integers(w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor) -> bool:
    """The kernels take these stacked integer weights: by row."""
    kinds = native.format_of(w13, s13), native.format_of(w2, s2)
    widest = max(w2.shape[1], w13.shape[1] // 2)
    return None not in kinds and widest <= native.MOST_COLUMNS and native.library() is not None


def integers(w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor) -> Any:
    """Matrices of INT8 or INT4 weights as ops.moe.integer_experts takes them, with FP32 scales, which all have to stay
    where they are."""
    inter, hidden, matrices = w13.shape[1] // 2, w2.shape[1], []
    kinds = native.format_of(w13, s13), native.format_of(w2, s2)
    for up, up_scale, down, down_scale in zip(w13, s13, w2, s2, strict=True):
        for weight, scale, shape, kind in (
            (up[:inter], up_scale[:inter], (inter, hidden), kinds[0]),
            (up[inter:], up_scale[inter:], (inter, hidden), kinds[0]),
            (down, down_scale, (hidden, inter), kinds[1]),
        ):
            matrices.append(native.Matrix(weight.data_ptr(), scale.data_ptr(), *shape, kind))
    return (native.Matrix * len(matrices))(*matrices)


def point(matrices: Any, expert: int, places: Places) -> None:
    """Set where an expert's weights lie."""
    for i in range(3):
        matrix = matrices[3 * expert + i]
        matrix.data, matrix.scale = places[2 * i], places[2 * i + 1]


class Mixture:
    """The routed experts of a geometry: y = each token's experts, weighted and summed."""

    def __init__(self, count: int, hidden: int, inter: int, limit: float) -> None:
        self._model = native.Model(hidden=hidden, inter=inter, experts=count, swiglu_limit=limit)
        self._workspace = torch.empty(0)

    def __call__(
        self, x: Tensor, experts: Tensor, weights: Tensor, matrices: Any, layer: int = 0, take: Any = None
    ) -> Tensor:
        """x [T, D] FP32, experts and weights [T, k] -> [T, D] FP32. Not to be called by two threads at once."""
        lib = native.library()
        assert lib is not None
        x, route, weights = x.contiguous(), experts.to(torch.int32).contiguous(), weights.float().contiguous()
        y, threads = torch.empty_like(x), torch.get_num_threads()
        lib.upwell_set_threads(threads)
        self._model.experts_per_token = experts.shape[1]
        floats = lib.upwell_experts_workspace_bytes(ctypes.addressof(self._model), len(x), threads) // 4
        if self._workspace.numel() < floats:
            self._workspace = torch.empty(floats + 16)
        call = native.ExpertsCall(
            pointer(self._model), cast(matrices, ctypes.POINTER(native.Matrix)), layer, len(x), x.data_ptr(),
            route.data_ptr(), weights.data_ptr(), y.data_ptr(), self._workspace.data_ptr(),
        )  # fmt: skip
        if take is not None:
            call.take = take
        lib.upwell_experts(ctypes.addressof(call))
        return y


def put_first(active: Any, start: int, count: int, ready: Iterable[int]) -> int:
    """Order active[start:count] so that those in `ready` come first; returns where they end."""
    chosen = set(ready)
    rest = [active[i] for i in range(start, count)]
    ordered = [e for e in rest if e in chosen] + [e for e in rest if e not in chosen]
    for i, e in enumerate(ordered, start):
        active[i] = e
    return start + sum(e in chosen for e in rest)
