"""Packed routed experts on the CPU by the C++ kernels: FP4 and FP8 are decoded inside each product."""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.ops import native
from upwell.ops.moe import swiglu

Packed = list[dict[str, tuple[Tensor, Tensor]]]
"""By expert: w1, w2, w3 -> (weight, scale)."""


def usable(x: Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
        and native.library() is not None
    )  # fmt: skip


def packed_experts(x: Tensor, places: Tensor, weights: Tensor, packed: Packed, limit: float) -> Tensor:
    """Each row by one expert: x [P, D], places [P], weights [P] -> [P, D]."""
    order = places.argsort(stable=True)
    counts = torch.bincount(places, minlength=len(packed)).tolist()
    rows, row_weights = x[order], weights[order].unsqueeze(1)
    done = torch.empty_like(rows)
    start = 0
    for expert, count in zip(packed, counts, strict=True):
        if not count:
            continue
        part = slice(start, start + count)
        start += count
        gate, up = native.product(rows[part], *expert["w1"]), native.product(rows[part], *expert["w3"])
        done[part] = native.product(swiglu(gate, up, limit) * row_weights[part], *expert["w2"])
    out = torch.empty_like(done)
    out[order] = done
    return out
