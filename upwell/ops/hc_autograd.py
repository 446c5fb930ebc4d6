"""mHC with gradients through the C++ kernels (csrc/training_streams.h): FP32, CPU. Same functions as hyper_connections.

`enter` is mix, collapse and the sublayer's norm in one, the product with fn included; `leave` is expand. Used in
training, where plain PyTorch's Sinkhorn steps and 4 x 4 batched products would be most of the time.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
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


class _Call(ctypes.Structure):
    """StreamsTraining of csrc/training.h."""

    _fields_ = [
        *((name, c_int64) for name in ("streams", "dim", "iterations")),
        *((name, c_float) for name in ("eps", "rms_eps", "norm_eps")),
        *((name, c_void_p) for name in (
            "x", "y", "post", "comb", "out", "fn", "turned", "base", "scale", "dots", "u", "next_post", "next_comb",
            "inverse_rms", "norm", "normed", "norm_scale", "grad", "grad_next_post", "grad_next_comb", "grad_past",
            "grad_x", "grad_y", "grad_post", "grad_comb")),
    ]  # fmt: skip


Parameters = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""What streams enter a sublayer by: fn [(2+h)h, hD], base [(2+h)h], scale [3], and the norm's weight [D], if any."""
Settings = tuple[int, float, float, float]
"""Sinkhorn's iterations and epsilon; the epsilons of the streams' norm and of the input's."""


def _call(settings: Settings, out: Tensor, **tensors: Tensor | None) -> _Call:
    iterations, *epsilons = settings
    addresses = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    return _Call(*out.shape[1:], iterations, *epsilons, out=out.data_ptr(), **addresses)


class _Cross(torch.autograd.Function):
    """_Leave (unless y is None), then the way into the next sublayer through its norm, a few tokens at a time: what is
    between them stays in the cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, post: Tensor | None, comb: Tensor | None, fn: Tensor, base: Tensor,
        scale: Tensor, norm: Tensor | None, settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        tokens, h, dim = x.shape
        x, fn = x.contiguous(), fn.contiguous()
        y, post, comb = (t if t is None else t.contiguous() for t in (y, post, comb))
        out = x if y is None else torch.empty_like(x)
        turned = F.pad(fn, (0, 0, 0, -fn.shape[0] % _LINE)).t().contiguous()  # n up to whole lines
        shapes = (tokens, fn.shape[0]), (tokens, dim), (tokens, h), (tokens, h, h), (tokens,)
        dots, u, next_post, next_comb, inverse_rms = (x.new_empty(shape) for shape in shapes)
        normed, norm_scale = (None, None) if norm is None else (torch.empty_like(u), torch.empty_like(inverse_rms))
        training_kernels.run("cross_forward", tokens, _call(
            settings, out, x=x, y=y, post=post, comb=comb, fn=fn, turned=turned, base=base, scale=scale, dots=dots,
            u=u, next_post=next_post, next_comb=next_comb, inverse_rms=inverse_rms, norm=norm, normed=normed,
            norm_scale=norm_scale,
        ))  # fmt: skip
        ctx.save_for_backward(x, y, post, comb, out, fn, base, scale, norm, dots, u, inverse_rms, norm_scale)
        ctx.settings = settings
        return u if normed is None else normed, out, next_post, next_comb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *left, out, fn, base, scale, norm, dots, u, inverse_rms, norm_scale = ctx.saved_tensors
        grad, grad_past, grad_next_post, grad_next_comb = (g.contiguous() for g in grads)
        made = [t if t is None else torch.empty_like(t) for t in left]
        call = _call(
            ctx.settings, out, **dict(zip(("x", "y", "post", "comb"), left, strict=True)), fn=fn, base=base,
            scale=scale, dots=dots, u=u, inverse_rms=inverse_rms, norm=norm, norm_scale=norm_scale, grad=grad,
            grad_next_post=grad_next_post, grad_next_comb=grad_next_comb, grad_past=grad_past,
            **dict(zip(("grad_x", "grad_y", "grad_post", "grad_comb"), made, strict=True)),
        )  # fmt: skip
        sums = fn.numel(), base.numel(), 3, 0 if norm is None else norm.numel()
        of_fn, *others, of_norm = training_kernels.run("cross_backward", out.shape[0], call, sums=sums)
        return *made, of_fn.view_as(fn), *others, None if norm is None else of_norm, None


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

    def enter(self, parameters: Parameters, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`enter` of the next streams, in one node with `leave`."""
        left = self.streams, self.output.float(), self.post, self.comb
        out: tuple[Tensor, Tensor, Tensor, Tensor] = _Cross.apply(*left, *parameters, settings)
        return out


def enter(
    streams: Tensor, parameters: Parameters, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """streams [T, h, D] -> normed input [T, D], the streams for `leave`, post [T, h], comb [T, h, h].

    The streams go through, so that their gradient past the sublayer is added where the one through it is made.
    """
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _Cross.apply(streams, None, None, None, *parameters, settings)
    return out


def leave(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """streams [T, h, D], output [T, D] -> the next streams [T, h, D]."""
    out: Tensor = _Leave.apply(streams, output.float(), post, comb)
    return out


def collapse(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
    """The final head's `head_mix` and `collapse`: streams [T, h, D], fn [h, hD], base [h], scale [1] -> [T, D].

    It is `enter` without a norm, with a way out that nobody takes.
    """
    spare = fn.shape[0] * (1 + streams.shape[1])
    padded = F.pad(fn, (0, 0, 0, spare)), F.pad(base, (0, spare)), F.pad(scale, (0, 2))
    return enter(streams, (*padded, None), (1, eps, rms_eps, 0.0))[0]
