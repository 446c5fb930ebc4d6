"""Calls of training's C++ kernels (csrc/training.cpp): FP32, CPU, each by one team of torch's threads."""

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
    """upwell_train_<name> over `rows` cut in parts, by one team: the arguments, then sums, rows and how many parts.

    `sums`: lengths of FP32 vectors that the kernel makes, each part its own, then their totals, which are returned.
    Tensors are passed by address: they must be contiguous (or have strides among the arguments) and stay alive.
    """
    # Enough parts that no thread waits long for another; none tiny.
    count = min((8 if sums else 16) * torch.get_num_threads(), max(1, rows // 128))
    own, totals = [torch.empty(count * n) for n in sums], [torch.empty(n) for n in sums]
    _call(name, *(_convert(a) for a in (*arguments, *own, *totals, rows, count)))
    return totals


def run_alone(name: str, *arguments: Argument) -> None:
    """upwell_train_<name> by the calling thread."""
    _call(name, *(_convert(a) for a in arguments))


def run_whole(name: str, call: ctypes.Structure) -> None:
    """upwell_train_<name> of a whole call, by one team. Tensors behind the call's addresses must stay alive."""
    _call(name, ctypes.byref(call))


def _call(name: str, *arguments: object) -> None:
    library = native.library()
    assert library is not None
    library.upwell_set_threads(torch.get_num_threads())
    getattr(library, f"upwell_train_{name}")(*arguments)


def _convert(argument: Argument) -> object:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
