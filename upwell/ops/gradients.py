"""When an operation should be one autograd node of its own (the *_autograd modules), and in which dtype it computes."""

from __future__ import annotations

import torch
from torch import Tensor


def recording(*tensors: Tensor) -> bool:
    """Autograd is on and follows one of the tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products inside a node, into which autocast doesn't reach: autocast's where it is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
