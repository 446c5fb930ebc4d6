"""Manifold-constrained hyper-connections (mHC, paper section 2.2): how h residual streams feed and take a sublayer.

`mix` derives the three weights from the streams, `collapse` makes the sublayer's input (`enter` is both), `expand`
takes its output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upwell.ops import npu


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """[h, h, T] logits (row, column, token) to (nearly) doubly stochastic matrices of the same shape, FP32.

    Softmax over columns, then `iterations` column and `iterations - 1` row normalisations, ending on columns.
    The token axis is last so that each step runs over contiguous memory.
    """
    comb = logits.softmax(dim=1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb


def stream_logits(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn @ RMS(flatten(streams)): streams [T, h, D], fn [n, h*D] -> [T, n], FP32."""
    flat = streams.flatten(1).float()
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn.float()) * scale


def mix(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of one sublayer from streams [T, h, D]: pre [T, h], post [T, h], comb [T, h, h], all FP32.

    fn [(2+h)h, hD], base [(2+h)h], scale [3]. comb[t, i, j] is what stream i gives to stream j.
    """
    h = streams.shape[1]
    z = stream_logits(streams, fn, norm_eps)
    scale, base = scale.float(), base.float()
    pre = torch.sigmoid(z[:, :h] * scale[0] + base[:h]) + eps
    post = 2 * torch.sigmoid(z[:, h : 2 * h] * scale[1] + base[h : 2 * h])
    logits = z[:, 2 * h :] * scale[2] + base[2 * h :]
    comb = sinkhorn(logits.t().reshape(h, h, -1), iterations, eps)
    return pre, post, comb.permute(2, 0, 1)


def enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input [T, D], and for `expand` post [T, h] and comb [T, h, h]. Arguments as of `mix`."""
    if (kernels := npu.fused(streams)) is not None:
        entered = kernels.enter_streams(streams, fn, base, scale, iterations, eps, norm_eps)
        if entered is not None:
            return entered
    pre, post, comb = mix(streams, fn, base, scale, iterations, eps, norm_eps)
    return collapse(streams, pre), post, comb


def head_mix(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    """The final head's weights from streams [T, h, D]: pre [T, h], FP32. fn [h, hD], base [h], scale [1]."""
    return torch.sigmoid(stream_logits(streams, fn, norm_eps) * scale.float() + base.float()) + eps


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """sum_i pre_i X_i: [T, h, D], [T, h] -> [T, D] in the streams' dtype."""
    return torch.bmm(pre.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)


def expand(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'_j = post_j y + sum_i comb[i, j] X_i: streams [T, h, D], output [T, D] -> [T, h, D] in the streams' dtype."""
    if (kernels := npu.fused(streams)) is not None:
        expanded = kernels.expand_streams(streams, output, post, comb)
        if expanded is not None:
            return expanded
    mixed = torch.baddbmm(
        post.unsqueeze(-1) * output.float().unsqueeze(1), comb.transpose(1, 2), streams.float()
    )
    return mixed.to(streams.dtype)
