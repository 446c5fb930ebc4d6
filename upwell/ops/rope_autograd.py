"""The rotary embedding with its gradient as one node: the gradient is the rotation back, so nothing big is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x's last dims, pairs as complex numbers, times `turn` (complex, broadcasts against x[..., :r/2])."""
    rope_dim = 2 * turn.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., :-rope_dim] = x[..., :-rope_dim]
    pairs = torch.view_as_complex(x[..., -rope_dim:].float().contiguous().unflatten(-1, (-1, 2)))
    out[..., -rope_dim:] = torch.view_as_real(pairs * turn).flatten(-2)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _rotate(x, turn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (turn,) = ctx.saved_tensors
        return _rotate(grad, turn.conj()), None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`ops.rope.apply_rope` for angles without gradient."""
    out: Tensor = _Rope.apply(x, torch.complex(cos, -sin if inverse else sin))
    return out
