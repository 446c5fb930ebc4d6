"""Memory on the CPU for what is read again and again: weights as the kernels read them, caches, workspaces."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

_LINE = 64  # bytes at which tensors begin, as torch's own do


def untouched(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros on the CPU whose memory comes page by page as it is written, where torch.zeros would write it all.

    From 4 MiB on numpy asks Linux for pages of 2 MiB, which torch doesn't: a decode step reads more pages of 4 KiB than
    the processor remembers the places of.
    """
    nbytes = prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + _LINE, dtype=np.uint8)
    start = -raw.ctypes.data % _LINE
    return torch.from_numpy(raw[start : start + nbytes]).view(dtype).view(shape)
