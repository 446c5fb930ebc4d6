"""The two layers everything is made of: a bias-free linear in any weight format, and RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upwell.ops import gradients, linear_autograd, norm_autograd, training_kernels
from upwell.ops.fake_quant import fake_fp8
from upwell.ops.linear import dense_weight, linear
from upwell.ops.norm import rms_norm
from upwell.ops.rope import apply_rope


class Linear(nn.Module):
    """y = W x. `weight` is dense [out, in], or in one of the formats of ops.linear.linear, with its `scale`.

    `quantize_input`: round the input to FP8 per 128 values first, as the official code does in front of quantized
    weights (numerics="official").
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.scale: Tensor | None
        self.register_buffer("scale", None)
        self.quantize_input = False
        self._decoded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.quantize_input:
            x = fake_fp8(x, 128)
        if self._decoded is not None and self._decoded.dtype == x.dtype and not torch.is_grad_enabled():
            return torch.nn.functional.linear(x, self._decoded)
        return linear(x, self.weight, self.scale)

    def keep_decoded(self, dtype: torch.dtype) -> None:
        """Hold the weight decoded too, for products of inputs of this dtype that are small and many."""
        packed = self.scale is not None
        self._decoded = self.dense(dtype).detach() if packed else None

    def keep_decoded_once(self, dtype: torch.dtype) -> None:
        if self._decoded is None:
            self.keep_decoded(dtype)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self._decoded = None
        return super()._apply(fn, recurse)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight decoded to [out, in] of `dtype`."""
        return dense_weight(self.weight, self.scale, dtype)


def linears(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several products of one x; in FP32 training on the CPU one node, so that x's gradient is summed as it is made."""
    weights = [layer.weight for layer in layers]
    if not any(layer.quantize_input for layer in layers) and linear_autograd.usable(x, *weights):
        return linear_autograd.linears(x, *weights)
    return tuple(layer(x) for layer in layers)


class RMSNorm(nn.Module):
    """weight * x / rms(x), in FP32, cast to x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm of x [B, S, d], cast to `dtype` and rotated: cos, sin [S, r/2] or [B, S, r/2]. In FP32 training on
        the CPU one node."""
        native = dtype == torch.float32 and training_kernels.usable(x, self.weight)
        if native and gradients.recording(x, self.weight):
            return norm_autograd.turned_rms_norm(x, self.weight, self.eps, cos, sin)
        return apply_rope(self(x).to(dtype), cos, sin)
