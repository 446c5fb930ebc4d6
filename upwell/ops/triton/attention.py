"""A decode step's attention in Triton, straight from the cache: the window's ring and the picked rows of the entries'
pool are read where they lie, each once for all heads of a block (ops/attention.py is the answer).

Keys are split over programs, each with a running softmax of its own; a last kernel joins the splits and the sink.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from upwell.ops.triton.tiles import Tiles

_HALF = (torch.float16, torch.bfloat16)


def attend_cached(
    q: Tensor, window: Tensor, slots: Tensor, positions: Tensor, pool: Tensor, rows: Tensor, sink: Tensor, tiles: Tiles
) -> Tensor | None:
    """ops.attention.attend_cached, with heads' dim a power of two up to 512, in BF16 or FP16."""
    (batch, heads, dim), (_, places, _) = q.shape, window.shape
    if dim & (dim - 1) or not 16 <= dim <= 512 or q.dtype not in _HALF or not q.dtype == window.dtype == pool.dtype:
        return None
    if batch == 0 or places % 16 or not (window.is_contiguous() and pool.is_contiguous()):
        return None
    keys = tiles.attend_keys
    ring_tiles, pick_tiles = triton.cdiv(places, keys), triton.cdiv(rows.shape[1], keys)
    head_blocks = triton.cdiv(heads, tiles.attend_heads)
    # As many splits as keep the cube cores busy, a cube core being half of the vector cores' number.
    splits = max(1, min(pick_tiles, tiles.cores // 2 // (batch * head_blocks)))
    per_split = triton.cdiv(pick_tiles, splits)
    splits = triton.cdiv(pick_tiles, per_split) if pick_tiles else 0
    tops = torch.empty(batch, splits + 1, heads, dtype=torch.float32, device=q.device)
    sums = torch.empty_like(tops)
    parts = torch.empty(batch, splits + 1, heads, dim, dtype=torch.float32, device=q.device)
    q, rows = q.contiguous(), rows.contiguous()
    fixed = {"D": dim, "BH": tiles.attend_heads, "BN": keys}
    shared = (tops, sums, parts, batch, heads)
    work = batch * head_blocks
    attend_kernel[(min(work, tiles.cores // 2),)](
        q, window, rows, slots, positions, *shared, places, 1, ring_tiles, 0, splits + 1, dim**-0.5, RING=True, **fixed
    )
    if splits:
        attend_kernel[(min(work * splits, tiles.cores // 2),)](
            q, pool, rows, slots, positions, *shared, rows.shape[1], splits, per_split, 1, splits + 1, dim**-0.5,
            RING=False, **fixed,
        )  # fmt: skip
    out = torch.empty_like(q)
    blocks = triton.cdiv(heads, tiles.combine_heads)
    combine_kernel[(min(batch * blocks, tiles.cores),)](
        tops, sums, parts, sink, out, batch, heads, splits + 1, blocks, D=dim, BH=tiles.combine_heads
    )
    return out


@triton.jit
def attend_kernel(
    q, keys, rows, slots, positions, tops, sums, parts, batch, heads, count, splits, per_split, first_split, all_splits,
    scale, RING: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q [B, heads, D] over per_split tiles of BN keys a split: of the ring at slots [B] (RING; keys [slots, count, D],
    place n holding a token iff n <= position), or of keys [R, D] at rows [B, count], -1 for none.

    -> tops, sums [B, all_splits, heads], parts [B, all_splits, heads, D] FP32, at split number first_split on.
    """
    head_blocks = tl.cdiv(heads, BH)
    d = tl.arange(0, D)
    for item in range(tl.program_id(0), batch * head_blocks * splits, tl.num_programs(0)):
        split = item % splits
        b = item // splits // head_blocks
        h = (item // splits % head_blocks) * BH + tl.arange(0, BH)
        query = tl.load(q + b * heads * D + h[:, None] * D + d[None, :], mask=(h < heads)[:, None], other=0.0)
        top = tl.full((BH,), -1e30, tl.float32)
        weight = tl.zeros((BH,), tl.float32)
        total = tl.zeros((BH, D), tl.float32)
        for tile in range(per_split):
            n = (split * per_split + tile) * BN + tl.arange(0, BN)
            if RING:
                base = keys + tl.load(slots + b) * count * D
                key = tl.load(base + n[:, None] * D + d[None, :], mask=(n < count)[:, None], other=0.0)
                there = (n <= tl.load(positions + b)) & (n < count)
            else:
                row = tl.load(rows + b * count + n, mask=n < count, other=-1)
                key = tl.load(keys + tl.maximum(row, 0)[:, None] * D + d[None, :])
                there = row >= 0
            scores = tl.dot(query, tl.trans(key)) * scale
            scores = tl.where(there[None, :], scores, -1e30)
            new = tl.maximum(top, tl.max(scores, axis=1))
            share = tl.where(there[None, :], tl.exp(scores - new[:, None]), 0.0)
            fade = tl.exp(top - new)
            top, weight = new, weight * fade + tl.sum(share, axis=1)
            total = total * fade[:, None] + tl.dot(share.to(key.dtype), key)
        at = (b * all_splits + first_split + split) * heads + h
        tl.store(tops + at, top, mask=h < heads)
        tl.store(sums + at, weight, mask=h < heads)
        tl.store(parts + at[:, None] * D + d[None, :], total, mask=(h < heads)[:, None])


@triton.jit
def combine_kernel(tops, sums, parts, sink, out, batch, heads, splits, blocks, D: tl.constexpr, BH: tl.constexpr):
    """The splits of attend_kernel and the sink [heads], one more logit without a value -> out [B, heads, D]."""
    d = tl.arange(0, D)
    for item in range(tl.program_id(0), batch * blocks, tl.num_programs(0)):
        b = item // blocks
        h = (item % blocks) * BH + tl.arange(0, BH)
        inside = h < heads
        top = tl.load(sink + h, mask=inside, other=0.0).to(tl.float32)
        weight = tl.full((BH,), 1.0, tl.float32)
        total = tl.zeros((BH, D), tl.float32)
        for split in range(splits):
            at = (b * splits + split) * heads + h
            other = tl.load(tops + at, mask=inside, other=-1e30)
            part = tl.load(parts + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            new = tl.maximum(top, other)
            fade, share = tl.exp(top - new), tl.exp(other - new)
            weight = weight * fade + tl.load(sums + at, mask=inside, other=0.0) * share
            total = total * fade[:, None] + part * share[:, None]
            top = new
        result = (total / weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + b * heads * D + h[:, None] * D + d[None, :], result, mask=inside[:, None])
