"""Top-k with a fixed tie-break, so that a selection never depends on batch shape, kernel or device."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dim, largest first; of equals, the lowest index first. -> [..., k].

    FP32 order and index go into one integer key, so there is no data-dependent branch (graph capture needs that).
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0 equal to 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # FP32 order as signed-integer order
    last = scores.shape[-1] - 1
    tie_break = last - torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered.long() << 32) | tie_break
    return keys.topk(min(k, scores.shape[-1]), dim=-1).indices
