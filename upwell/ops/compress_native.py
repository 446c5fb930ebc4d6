"""Training's compressor pooling as one node, by the C++ kernels (FP32, CPU): nothing but its inputs is kept."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import gradients, training_kernels


class _Call(ctypes.Structure):
    """PoolTraining of csrc/training.h."""

    _fields_ = [
        *((name, c_int64) for name in ("steps", "windows", "ratio", "dim", "width")),
        *((name, c_void_p) for name in ("kv", "gate", "ape", "out", "grad", "grad_kv", "grad_gate")),
    ]  # fmt: skip


def usable(kv: Tensor, gate: Tensor, ape: Tensor) -> bool:
    """Autograd follows the pooling, at least one window is whole, and the kernels are built and take the tensors."""
    return (
        gradients.recording(kv, gate, ape)
        and kv.shape[1] >= ape.shape[0]
        and training_kernels.usable(kv, gate, ape)
    )


def _run(
    name: str, dim: int, kv: Tensor, gate: Tensor, ape: Tensor, *rest: Tensor | None, sums: tuple[int, ...] = ()
) -> list[Tensor]:
    (batch, steps, width), ratio = kv.shape, ape.shape[0]
    addresses = (None if t is None else t.data_ptr() for t in (kv, gate, ape, *rest))
    call = _Call(steps, steps // ratio, ratio, dim, width, *addresses)
    return training_kernels.run(name, batch * (steps // ratio), call, sums=sums)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, gate: Tensor, ape: Tensor, dim: int) -> Tensor:
        kept = kv.contiguous(), gate.contiguous(), ape.contiguous()
        out = kv.new_empty(kv.shape[0], kv.shape[1] // ape.shape[0], dim)
        _run("pool_forward", dim, *kept, out)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        kv, gate, ape = ctx.saved_tensors
        grad, grads = grad.contiguous(), (torch.empty_like(kv), torch.empty_like(gate))
        (grad_ape,) = _run(
            "pool_backward", grad.shape[-1], kv, gate, ape, None, grad, *grads, sums=(ape.numel(),)
        )
        return *grads, grad_ape.view_as(ape), None


def pool(kv: Tensor, gate: Tensor, ape: Tensor, dim: int) -> Tensor:
    """`ops.compress.pool` of sequences from their start: kv, gate [B, S, d or 2d], ape [ratio, d or 2d], which is yet
    to be added to gate by position -> [B, S // ratio, d]. Tokens of a window that isn't whole are not looked at."""
    out: Tensor = _Pool.apply(kv, gate, ape, dim)
    return out
