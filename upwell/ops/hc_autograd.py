"""mHC with gradients through the C++ kernels (csrc/training_streams.h): FP32, CPU. Same functions as hyper_connections.

`enter` is mix and collapse in one, its product with fn included; `leave` is expand. Used in training, where plain
PyTorch's Sinkhorn steps and 4 x 4 batched products would be most of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import training_kernels

_MAX_STREAMS = 4  # kMaxStreams of csrc/training.h
_LINE = 16  # kTrainingLine


def usable(streams: Tensor) -> bool:
    """The kernels are built and the tensor [T, h, D] is one that they take."""
    return streams.shape[1] <= _MAX_STREAMS and training_kernels.usable(streams)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, h, dim = x.shape
        x, fn = x.contiguous(), fn.contiguous()
        dots, u, post, comb, inverse_rms = made = _made_on_entering(x, fn)
        training_kernels.run(
            "enter_forward", tokens, h, x, fn, _turned(fn), base, scale, *made, dim, iterations, eps, norm_eps
        )
        ctx.save_for_backward(x, fn, base, scale, dots, inverse_rms)
        ctx.iterations, ctx.eps = iterations, eps
        return u, x, post, comb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_u: Tensor, grad_past: Tensor, grad_post: Tensor, grad_comb: Tensor) -> Any:
        saved = ctx.saved_tensors
        x, fn, base = saved[:3]
        tokens, h, dim = x.shape
        grads = [g.contiguous() for g in (grad_u, grad_post, grad_comb, grad_past)]
        grad_x = torch.empty_like(x)
        grad_fn, grad_base, grad_scale = training_kernels.run(
            "enter_backward", tokens, h, *saved, *grads, grad_x, dim, ctx.iterations, ctx.eps,
            sums=(fn.numel(), base.numel(), 3),
        )  # fmt: skip
        return grad_x, grad_fn.view_as(fn), grad_base, grad_scale, None, None, None


def _turned(fn: Tensor) -> Tensor:
    """fn [n, hD] transposed, with n up to whole lines."""
    return F.pad(fn, (0, 0, 0, -fn.shape[0] % _LINE)).t().contiguous()


def _made_on_entering(x: Tensor, fn: Tensor) -> tuple[Tensor, ...]:
    """Room for dots [T, n], u [T, D], post [T, h], comb [T, h, h] and inverse_rms [T]."""
    tokens, h, dim = x.shape
    shapes = (tokens, fn.shape[0]), (tokens, dim), (tokens, h), (tokens, h, h), (tokens,)
    return tuple(x.new_empty(shape) for shape in shapes)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        tokens, h, dim = x.shape
        saved = tuple(t.contiguous() for t in (x, y, post, comb))
        out = torch.empty_like(saved[0])
        training_kernels.run("leave_forward", tokens, h, *saved, out, dim)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors
        tokens, h, dim = saved[0].shape
        grad = grad.contiguous()
        grads = tuple(torch.empty_like(t) for t in saved)
        training_kernels.run("leave_backward", tokens, h, *saved, grad, *grads, dim)
        return grads


class _Cross(torch.autograd.Function):
    """_Leave, then _Enter of the next sublayer, a few tokens at a time: what is between them stays in the cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
        iterations: int, eps: float, norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        tokens, h, dim = x.shape
        left, fn = tuple(t.contiguous() for t in (x, y, post, comb)), fn.contiguous()
        out = torch.empty_like(left[0])
        dots, u, next_post, next_comb, inverse_rms = made = _made_on_entering(out, fn)
        training_kernels.run(
            "cross_forward", tokens, h, *left, out, fn, _turned(fn), base, scale, *made, dim, iterations, eps, norm_eps
        )
        ctx.save_for_backward(*left, out, fn, base, scale, dots, inverse_rms)
        ctx.iterations, ctx.eps = iterations, eps
        return u, out, next_post, next_comb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_u: Tensor, grad_past: Tensor, grad_post: Tensor, grad_comb: Tensor) -> Any:
        saved = ctx.saved_tensors
        fn, base = saved[5:7]
        tokens, h, dim = saved[0].shape
        incoming = [g.contiguous() for g in (grad_u, grad_post, grad_comb, grad_past)]
        grads = tuple(torch.empty_like(t) for t in saved[:4])
        grad_fn, grad_base, grad_scale = training_kernels.run(
            "cross_backward", tokens, h, *saved, *incoming, *grads, dim, ctx.iterations, ctx.eps,
            sums=(fn.numel(), base.numel(), 3),
        )  # fmt: skip
        return *grads, grad_fn.view_as(fn), grad_base, grad_scale, None, None, None


@dataclass(frozen=True)
class Leaving:
    """Streams that leave a sublayer, not made before it is known whether they enter another: see `leave`."""

    streams: Tensor
    output: Tensor
    post: Tensor
    comb: Tensor

    def settle(self) -> Tensor:
        """The next streams [T, h, D]."""
        return leave(self.streams, self.output, self.post, self.comb)

    def enter(
        self, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`enter` of the next streams, in one node with `leave`."""
        out: tuple[Tensor, Tensor, Tensor, Tensor] = _Cross.apply(
            self.streams, self.output.float(), self.post, self.comb, fn, base, scale, iterations, eps, norm_eps
        )
        return out


def enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """streams [T, h, D] -> input [T, D], the streams for `leave`, post [T, h], comb [T, h, h].

    The streams go through, so that their gradient past the sublayer is added where the one through it is made.
    """
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _Enter.apply(streams, fn, base, scale, iterations, eps, norm_eps)
    return out


def leave(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """streams [T, h, D], output [T, D] -> the next streams [T, h, D]."""
    out: Tensor = _Leave.apply(streams, output.float(), post, comb)
    return out


def collapse(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """The final head's `head_mix` and `collapse`: streams [T, h, D], fn [h, hD], base [h], scale [1] -> [T, D].

    It is `enter` with a way out that nobody takes.
    """
    spare = fn.shape[0] * (1 + streams.shape[1])
    padded = F.pad(fn, (0, 0, 0, spare)), F.pad(base, (0, spare)), F.pad(scale, (0, 2))
    return enter(streams, *padded, 1, eps, norm_eps)[0]
