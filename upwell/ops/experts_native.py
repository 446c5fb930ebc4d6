"""A layer's routed experts by the C++ kernels, straight from packed weights: FP32 on the host, without gradient.

A table holds the three matrices of each expert. Where experts are paged in, a callback points their matrices to the
memory they came to, some at a time (csrc/layout.h, Take).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
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


def cut(
    w13: Tensor, w2: Tensor, s13: Tensor | None = None, s2: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """w1, w3 and w2 of each expert, with their scales where there are any, of stacked ones (model.moe.Experts)."""
    inter = w13.shape[1] // 2
    for e, (up, down) in enumerate(zip(w13, w2, strict=True)):
        yield up[:inter], None if s13 is None else s13[e, :inter]
        yield up[inter:], None if s13 is None else s13[e, inter:]
        yield down, None if s2 is None else s2[e]


def integers(w13: Tensor, w2: Tensor, s13: Tensor, s2: Tensor) -> tuple[Any, list[Tensor]] | None:
    """Matrices of INT8 or INT4 weights as ops.moe.integer_experts takes them, and the tensors that they point to; None
    where the kernels don't take them."""
    if native.library() is None or not (native.by_row(w13, s13) and native.by_row(w2, s2)):
        return None
    held = [w13.contiguous(), w2.contiguous(), s13.float().contiguous(), s2.float().contiguous()]
    found = (native.integers(weight, scale) for weight, scale in cut(*held) if scale is not None)
    made = [matrix for matrix in found if matrix is not None]
    return ((native.Matrix * len(made))(*made), held) if len(made) == 3 * len(w13) else None


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
