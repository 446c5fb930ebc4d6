"""The compressor's pooling (paper section 2.3): a softmax per channel over the slots of a window of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.ops import npu


def pool_windows(kv: Tensor, gate: Tensor) -> Tensor:
    """Weighted mean over slots, weights softmax(gate) per channel: [..., slots, d] twice -> [..., d], FP32.

    A slot whose gate is -inf has weight 0.
    """
    return (kv.float() * gate.float().softmax(dim=-2)).sum(dim=-2)


def overlap_windows(
    kv: Tensor, gate: Tensor, prior_kv: Tensor | None, prior_gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """CSA's slots: the a half of the window before, then the b half of the own one.

    kv, gate [B, n, m, 2d] with the position bias already in gate; prior_* [B, m, d] is the a half of the window
    before the first (None: there is none, weight 0). Returns kv, gate [B, n, 2m, d].
    """
    d = kv.shape[-1] // 2
    if prior_kv is None or prior_gate is None:
        prior_kv = kv.new_zeros(kv.shape[0], kv.shape[2], d)
        prior_gate = gate.new_full((gate.shape[0], gate.shape[2], d), float("-inf"))
    before_kv = torch.cat((prior_kv.unsqueeze(1).to(kv.dtype), kv[:, :-1, :, :d]), dim=1)
    before_gate = torch.cat((prior_gate.unsqueeze(1).to(gate.dtype), gate[:, :-1, :, :d]), dim=1)
    return torch.cat((before_kv, kv[..., d:]), dim=2), torch.cat((before_gate, gate[..., d:]), dim=2)


def pool(
    kv: Tensor, gate: Tensor, prior_kv: Tensor | None, prior_gate: Tensor | None, ratio: int, dim: int
) -> Tensor:
    """Whole windows of `ratio` tokens, one after another: kv, gate [B, n*m, d or 2d] FP32 -> [B, n, d] FP32. Where the
    width is 2d windows overlap, and prior_* [B, m, d] come before the first one (overlap_windows)."""
    if (kernels := npu.fused(kv)) is not None:
        pooled = kernels.pool(kv, gate, prior_kv, prior_gate, ratio, dim)
        if pooled is not None:
            return pooled
    kv, gate = kv.unflatten(1, (-1, ratio)), gate.unflatten(1, (-1, ratio))
    if kv.shape[-1] != dim:
        kv, gate = overlap_windows(kv, gate, prior_kv, prior_gate)
    return pool_windows(kv, gate)


def pool_ring(kv: Tensor, gate: Tensor, slots: Tensor, positions: Tensor, ratio: int, dim: int) -> Tensor:
    """The window that each sequence's position is in, from rings by position: kv, gate [slots, ring, d or 2d] FP32,
    slots, positions [B] -> [B, d] FP32. Where the width is 2d, the ring holds the window before too."""
    if (kernels := npu.fused(kv)) is not None:
        pooled = kernels.pool_ring(kv, gate, slots, positions, ratio, dim)
        if pooled is not None:
            return pooled
    ring, window, rows = kv.shape[1], positions // ratio, slots.unsqueeze(1)
    first = (window * ratio).unsqueeze(1)
    inside = torch.arange(ratio, device=kv.device)
    at = (first + inside) % ring
    prior_kv = prior_gate = None
    if kv.shape[-1] != dim:
        before = (first - ratio + inside) % ring
        prior_kv = kv[rows, before][..., :dim]
        none = (window == 0).view(-1, 1, 1)
        prior_gate = gate[rows, before][..., :dim].masked_fill(none, float("-inf"))
    return pool(kv[rows, at], gate[rows, at], prior_kv, prior_gate, ratio, dim)[:, 0]
