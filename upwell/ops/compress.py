"""The compressor's pooling (paper section 2.3): a softmax per channel over the slots of a window of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


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
