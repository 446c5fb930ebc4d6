"""mHC as a module: the parameters of one sublayer's connection, and of the final head's (paper section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upwell.config import ModelConfig
from upwell.model.layers import RMSNorm
from upwell.ops import hc_autograd
from upwell.ops import hyper_connections as hc
from upwell.ops.hc_autograd import Leaving

Streams = Tensor | Leaving
"""Residual streams [T, h, D]; in training by kernels also the ones that a sublayer is about to make."""


def settled(streams: Streams) -> Tensor:
    """The streams themselves."""
    return streams.settle() if isinstance(streams, Leaving) else streams


class HyperConnection(nn.Module):
    """fn [(2+h)h, hD], base [(2+h)h], scale [3], all FP32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hc_mult
        self.fn = nn.Parameter(torch.empty((2 + h) * h, h * config.hidden_size))
        self.base = nn.Parameter(torch.zeros((2 + h) * h))
        self.scale = nn.Parameter(torch.ones(3))
        self.iterations, self.eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps

    def enter(self, streams: Streams, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """streams [T, h, D] -> the sublayer's input [T, D], normed; and for `leave`, streams, post [T, h], comb
        [T, h, h]."""
        parameters, settings = (self.fn, self.base, self.scale), (self.iterations, self.eps, self.norm_eps)
        if isinstance(streams, Leaving):
            return streams.enter((*parameters, norm.weight), (*settings, norm.eps))
        if torch.is_grad_enabled() and hc_autograd.usable(streams):
            return hc_autograd.enter(streams, (*parameters, norm.weight), (*settings, norm.eps))
        x, post, comb = hc.enter(streams, *parameters, *settings)
        return norm(x), streams, post, comb

    @staticmethod
    def leave(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Streams:
        """The next streams [T, h, D] from the sublayer's output [T, D]; in training by kernels, on their way there."""
        if torch.is_grad_enabled() and hc_autograd.usable(streams):
            return Leaving(streams, output, post, comb)
        return hc.expand(streams, output, post, comb)


class HyperHead(nn.Module):
    """The last collapse, before the final norm: fn [h, hD], base [h], scale [1], FP32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hc_mult
        self.fn = nn.Parameter(torch.empty(h, h * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(h))
        self.scale = nn.Parameter(torch.ones(1))
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def forward(self, streams: Tensor) -> Tensor:
        """[T, h, D] -> [T, D]."""
        if torch.is_grad_enabled() and hc_autograd.usable(streams):
            return hc_autograd.collapse(streams, self.fn, self.base, self.scale, self.eps, self.norm_eps)
        return hc.collapse(
            streams, hc.head_mix(streams, self.fn, self.base, self.scale, self.eps, self.norm_eps)
        )
