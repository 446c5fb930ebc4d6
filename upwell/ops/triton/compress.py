"""The compressor's pooling in Triton: windows are read where they lie, without gathered or overlapped copies
(ops/compress.py is the answer). A softmax over slots, per channel, kept running over chunks of slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from upwell.ops.triton.tiles import Tiles, sized


def pool_ring(
    kv: Tensor, gate: Tensor, slots: Tensor, positions: Tensor, ratio: int, dim: int, tiles: Tiles
) -> Tensor | None:
    """ops.compress.pool_ring, for rings and windows of powers of two."""
    sequences, (_, ring, width) = slots.shape[0], kv.shape
    if ratio & (ratio - 1) or kv.dtype != torch.float32 or not (kv.is_contiguous() and gate.is_contiguous()):
        return None
    out = kv.new_empty(sequences, dim)
    tile = sized(tiles.pool_dims, dim, sequences, tiles.cores)
    blocks = triton.cdiv(dim, tile)
    pool_ring_kernel[(min(sequences * blocks, tiles.cores),)](
        kv, gate, slots, positions, out, sequences, dim, blocks,
        RING=ring, RATIO=ratio, OVERLAP=width != dim, CHUNK=min(ratio, tiles.pool_slots), BD=tile,
    )  # fmt: skip
    return out


def pool(
    kv: Tensor, gate: Tensor, prior_kv: Tensor | None, prior_gate: Tensor | None, ratio: int, dim: int, tiles: Tiles
) -> Tensor | None:
    """ops.compress.pool, for windows of powers of two."""
    batch, tokens, width = kv.shape
    if ratio & (ratio - 1) or kv.dtype != torch.float32 or tokens == 0:
        return None
    n = tokens // ratio
    out = kv.new_empty(batch, n, dim)
    tile = sized(tiles.pool_dims, dim, batch * n, tiles.cores)
    blocks = triton.cdiv(dim, tile)
    kv, gate = kv.contiguous(), gate.contiguous()
    before = (kv, gate)
    if prior_kv is not None and prior_gate is not None:
        before = (prior_kv.contiguous(), prior_gate.contiguous())
    pool_kernel[(min(batch * n * blocks, tiles.cores),)](
        kv, gate, *before, out, batch * n, n, dim, blocks,
        RATIO=ratio, OVERLAP=width != dim, PRIOR=prior_kv is not None, CHUNK=min(ratio, tiles.pool_slots), BD=tile,
    )  # fmt: skip
    return out


@triton.jit
def _add(gates, values, top, weight, total):
    """More slots [CHUNK, BD] into a running softmax: highest gate, weights' and values' sums, [BD] each."""
    new = tl.maximum(top, tl.max(gates, axis=0))
    share = tl.exp(gates - new[None, :])
    fade = tl.exp(top - new)
    return new, weight * fade + tl.sum(share, axis=0), total * fade + tl.sum(share * values, axis=0)


@triton.jit
def _own_window(kv, gate, own, d, inside, width, RATIO: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr):
    """The running softmax (see _add) over the RATIO slots that begin at element `own`."""
    top = tl.full((BD,), float("-inf"), tl.float32)
    weight = tl.zeros((BD,), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for c in range(0, RATIO, CHUNK):
        at = (c + tl.arange(0, CHUNK))[:, None] * width + d[None, :]
        gates = tl.load(gate + own + at, mask=inside, other=0.0)
        values = tl.load(kv + own + at, mask=inside, other=0.0)
        top, weight, total = _add(gates, values, top, weight, total)
    return top, weight, total


@triton.jit
def pool_ring_kernel(
    kv, gate, slots, positions, out, sequences, dim, blocks,
    RING: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """kv, gate [slots, RING, dim or 2 dim] FP32; slots, positions [B] INT64 -> out [B, dim] FP32. A window of a ring
    is contiguous, since the ring's length is a multiple of the window's."""
    width = dim * 2 if OVERLAP else dim
    r = tl.arange(0, CHUNK)
    for item in range(tl.program_id(0), sequences * blocks, tl.num_programs(0)):
        b = item // blocks
        d = (item % blocks) * BD + tl.arange(0, BD)
        inside = (d < dim)[None, :]
        window = tl.load(positions + b) // RATIO
        ring = tl.load(slots + b) * RING
        own = (ring + window * RATIO % RING) * width + (width - dim)
        top, weight, total = _own_window(kv, gate, own, d, inside, width, RATIO, CHUNK, BD)
        if OVERLAP:
            before = (ring + (window * RATIO + RING - RATIO) % RING) * width
            at = r[:, None] * width + d[None, :]
            gates = tl.load(gate + before + at, mask=inside, other=0.0)
            gates = tl.where(window > 0, gates, float("-inf"))
            values = tl.load(kv + before + at, mask=inside, other=0.0)
            top, weight, total = _add(gates, values, top, weight, total)
        tl.store(out + b * dim + d, total / weight, mask=d < dim)


@triton.jit
def pool_kernel(
    kv, gate, prior_kv, prior_gate, out, windows, per_batch, dim, blocks,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, PRIOR: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """kv, gate [windows, RATIO, dim or 2 dim], prior_* [batch, RATIO, dim] -> out [windows, dim], all FP32. A batch's
    first window overlaps with prior_*, or with nothing."""
    width = dim * 2 if OVERLAP else dim
    r = tl.arange(0, CHUNK)
    for item in range(tl.program_id(0), windows * blocks, tl.num_programs(0)):
        w = item // blocks
        d = (item % blocks) * BD + tl.arange(0, BD)
        inside = (d < dim)[None, :]
        own = w * RATIO * width + (width - dim)
        top, weight, total = _own_window(kv, gate, own, d, inside, width, RATIO, CHUNK, BD)
        if OVERLAP:
            first = w % per_batch == 0
            at = (w - 1) * RATIO * width + r[:, None] * width + d[None, :]
            mask = inside & (w % per_batch > 0)
            gates = tl.load(gate + at, mask=mask, other=0.0)
            values = tl.load(kv + at, mask=mask, other=0.0)
            if PRIOR:
                at = w // per_batch * RATIO * dim + r[:, None] * dim + d[None, :]
                gates += tl.load(prior_gate + at, mask=inside & first, other=0.0)
                values += tl.load(prior_kv + at, mask=inside & first, other=0.0)
            else:
                gates = tl.where(first, float("-inf"), gates)
            top, weight, total = _add(gates, values, top, weight, total)
        tl.store(out + w * dim + d, total / weight, mask=d < dim)
