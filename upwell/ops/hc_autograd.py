"""mHC with gradients through the C++ kernels (csrc/hc_autograd.cpp): FP32, CPU. Same functions as hyper_connections.

`enter` is mix and collapse in one, `leave` is expand. Used in training, where plain PyTorch's Sinkhorn steps and
4 x 4 batched products would be most of the time.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upwell.ops import native


def usable(streams: Tensor) -> bool:
    """The kernels are built and the tensor is one they take."""
    return native.library() is not None and streams.device.type == "cpu" and streams.dtype == torch.float32


def _function(name: str) -> Any:
    return getattr(native.library(), name)


def _call(name: str, tokens: int, tensors: tuple[Tensor, ...], *rest: int | float) -> None:
    function = _function(name)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    scalars = [ctypes.c_float(v) if isinstance(v, float) else ctypes.c_int(v) for v in rest[2:]]
    h, dim = ctypes.c_int(int(rest[0])), ctypes.c_int64(int(rest[1]))
    native.parallel_ranges(
        tokens, lambda begin, end: function(*pointers, ctypes.c_int64(begin), ctypes.c_int64(end), h, dim, *scalars)
    )


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dot: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, h, dim = x.shape
        x, dot = x.contiguous(), dot.contiguous()
        u, post = x.new_empty(tokens, dim), x.new_empty(tokens, h)
        comb, inverse_rms = x.new_empty(tokens, h, h), x.new_empty(tokens)
        _call("upwell_hc_enter_forward", tokens, (x, dot, base, scale, u, post, comb, inverse_rms),
              h, dim, iterations, eps, norm_eps)  # fmt: skip
        ctx.save_for_backward(x, dot, base, scale, inverse_rms)
        ctx.iterations, ctx.eps = iterations, eps
        return u, post, comb

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_post: Tensor, grad_comb: Tensor) -> Any:
        x, dot, base, scale, inverse_rms = ctx.saved_tensors
        tokens, h, dim = x.shape
        grad_x, grad_dot = torch.empty_like(x), torch.empty_like(dot)
        partial_base, partial_scale = x.new_zeros(64, base.numel()), x.new_zeros(64, 3)
        function = _function("upwell_hc_enter_backward")
        grads = [g.contiguous() for g in (grad_u, grad_post, grad_comb)]
        slots = iter(range(64))

        def run(begin: int, end: int) -> None:
            slot = next(slots)
            tensors = (x, dot, base, scale, inverse_rms, *grads, grad_x, grad_dot,
                       partial_base[slot], partial_scale[slot])  # fmt: skip
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
            shape = (ctypes.c_int64(begin), ctypes.c_int64(end), ctypes.c_int(h), ctypes.c_int64(dim))
            function(*pointers, *shape, ctypes.c_int(ctx.iterations), ctypes.c_float(ctx.eps))

        native.parallel_ranges(tokens, run)
        return grad_x, grad_dot, partial_base.sum(0), partial_scale.sum(0), None, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        tokens, h, dim = x.shape
        saved = tuple(t.contiguous() for t in (x, y, post, comb))
        out = torch.empty_like(saved[0])
        _call("upwell_hc_leave_forward", tokens, (*saved, out), h, dim)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors
        tokens, h, dim = saved[0].shape
        grads = tuple(torch.empty_like(t) for t in saved)
        _call("upwell_hc_leave_backward", tokens, (*saved, grad.contiguous(), *grads), h, dim)
        return grads


def enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """streams [T, h, D] -> input [T, D], post [T, h], comb [T, h, h]."""
    with torch.autocast("cpu", enabled=False):
        dot = F.linear(streams.flatten(1), fn)
        out: tuple[Tensor, Tensor, Tensor] = _Enter.apply(streams, dot, base, scale, iterations, eps, norm_eps)
    return out


def leave(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """streams [T, h, D], output [T, D] -> the next streams [T, h, D]."""
    out: Tensor = _Leave.apply(streams, output.float(), post, comb)
    return out
