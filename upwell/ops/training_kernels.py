"""Calls of training's C++ kernels (csrc/training.cpp): FP32, CPU, by ranges of rows or whole."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from upwell.ops import native

Argument = Tensor | ctypes.Structure | int | float | None


def usable(*tensors: Tensor | None) -> bool:
    """The kernels are built, and take such tensors."""
    lib = native.library()
    if lib is None or not hasattr(lib, "upwell_train_linear_forward"):  # a build of older sources
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def run(name: str, rows: int, *arguments: Argument, sums: tuple[int, ...] = ()) -> list[Tensor]:
    """upwell_train_<name> over [0, rows), cut in ranges: the arguments, then sums, then the range's begin and end.

    `sums`: lengths of FP32 vectors to which the kernel adds; each range has its own, and their totals are returned.
    Tensors are passed by address: they must be contiguous (or have strides among the arguments) and stay alive.
    """
    function = getattr(native.library(), f"upwell_train_{name}")
    fixed = [_convert(a) for a in arguments]
    partial: dict[int, list[Tensor]] = {}

    def part(begin: int, end: int) -> None:
        own = partial[begin] = [torch.zeros(n) for n in sums]
        function(*fixed, *(_convert(t) for t in own), ctypes.c_int64(begin), ctypes.c_int64(end))

    native.parallel_ranges(rows, part)
    in_order = [partial[begin] for begin in sorted(partial)]  # the same totals in every run
    return [parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in zip(*in_order, strict=True)]


def run_whole(name: str, call: ctypes.Structure) -> None:
    """upwell_train_<name> on one team of as many threads as torch uses. Tensors behind addresses must stay alive."""
    library = native.library()
    assert library is not None
    library.upwell_set_threads(torch.get_num_threads())
    getattr(library, f"upwell_train_{name}")(ctypes.byref(call))


def _convert(argument: Argument) -> object:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
