"""Training's attention from raw queries to rotated-back outputs as one node, by the C++ kernels (FP32, CPU).

Head norm, rotation, attention and the rotation back in one pass over the queries; kept are the raw queries, the
outputs and one log-sum a query and head. Window keys and entries are as in `ops.attention.attend`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import gradients, training_kernels

_CHUNK = 128  # the least of AttentionTiling's in csrc/training.h
_UNITS = 16  # of work for each thread


class _Call(ctypes.Structure):
    """AttentionTraining of csrc/training.h."""

    _fields_ = [
        *((name, c_int64) for name in (
            "batch", "steps", "heads", "dim", "rope", "window", "ratio", "entries", "span")),
        ("eps", c_double),
        *((name, c_void_p) for name in (
            "q", "kv", "entry_kv", "sink", "cos", "sin", "out", "log_sum", "grad", "grad_q", "grad_kv",
            "grad_entries", "grad_sink", "shared")),
    ]  # fmt: skip


def usable(q: Tensor, kv: Tensor, entries: Tensor | None) -> bool:
    """Autograd follows the call, and it is one that the kernels take: FP32 without autocast, built, on the CPU."""
    followed = gradients.recording(q, kv) and gradients.compute_dtype(q) == torch.float32
    return followed and training_kernels.usable(q, kv, entries)


def _call(
    tensors: tuple[Tensor | None, ...], out: Tensor, log_sum: Tensor, settings: tuple[int, int, float], span: int,
    *backward: Tensor | None,
) -> _Call:  # fmt: skip
    q, entries, cos = tensors[0], tensors[2], tensors[4]
    assert q is not None and cos is not None
    window, ratio, eps = settings
    count = 0 if entries is None else entries.shape[1]
    addresses = [None if t is None else t.data_ptr() for t in (*tensors, out, log_sum, *backward)]
    return _Call(*q.shape, 2 * cos.shape[-1], window, ratio if count else 0, count, span, eps, *addresses)


def _span(q: Tensor, window: int) -> int:
    """Tokens of a unit of work: whole chunks, as many units as keep all threads busy to the end."""
    batch, steps, chunk = q.shape[0], q.shape[1], max(window, _CHUNK)
    chunks = -(-steps // chunk)
    units = min(chunks, -(-_UNITS * torch.get_num_threads() // batch))  # of a sequence
    return chunk * -(-chunks // units)


class _AttendRaw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, cos: Tensor, sin: Tensor,
        settings: tuple[int, int, float],
    ) -> Tensor:  # fmt: skip
        tensors = tuple(t if t is None else t.contiguous() for t in (q, kv, entries, sink, cos, sin))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_sum = q.new_empty(q.shape[:3])
        span = _span(q, settings[0])
        training_kernels.run_whole("attention_forward", _call(tensors, out, log_sum, settings, span))
        ctx.save_for_backward(*tensors, out, log_sum)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, out, log_sum = ctx.saved_tensors
        q, kv, entries, sink = tensors[:4]
        window, span = ctx.settings[0], _span(q, ctx.settings[0])
        grads = [t if t is None else torch.empty_like(t) for t in (q, kv, entries, sink)]
        own = (window - 1 + (0 if entries is None else entries.shape[1])) * q.shape[-1] + sink.numel()
        shared = q.new_empty(q.shape[0] * -(-q.shape[1] // span), own)
        call = _call(tuple(tensors), out, log_sum, ctx.settings, span, grad.contiguous(), *grads, shared)
        training_kernels.run_whole("attention_backward", call)
        return *grads, None, None, None


def attend_raw(
    q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, cos: Tensor, sin: Tensor, eps: float, window: int,
    ratio: int,
) -> Tensor:  # fmt: skip
    """q [B, S, H, d] before norm and rotation, kv [B, S, d], entries [B, N, d] or None, sink [H], cos and sin of the
    positions, [..., S, r/2] -> [B, S, H, d] rotated back."""
    if entries is not None and entries.shape[1] == 0:
        entries = None
    cos, sin = (angle.expand(q.shape[0], -1, -1) for angle in (cos, sin))
    out: Tensor = _AttendRaw.apply(q, kv, entries, sink, cos, sin, (window, ratio, eps))
    return out
