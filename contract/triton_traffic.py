"""A projection, not a measurement: launches and bytes of the Triton kernels beside those of plain ATen, at V4-Flash's
geometry. ATen's are counted as it runs on meta tensors (views are free, every other operator reads its tensors and
writes its result); the kernels' follow from what they load and store.

    python -m contract.triton_traffic [BATCH ...]     a Markdown table
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upwell.ops import attention, compress, moe
from upwell.ops import hyper_connections as hc
from upwell.ops.linear import round_to_int8
from upwell.ops.triton import split_columns
from upwell.ops.triton.tiles import Tiles

H, DIM, HEAD, HEADS, WINDOW, TOPK, EXPERTS, INTER = 4, 4096, 512, 64, 128, 512, 6, 2048
TILES = Tiles(cores=48)


class Traffic(TorchDispatchMode):
    """Counts operators that compute, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        allocates = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not view and not allocates:
            picks = func.overloadpacket.__name__ in ("index", "gather", "index_select")
            # What picks rows reads those rows, not the tensor they lie in.
            self.bytes += sum(t.nbytes for t in ((*given[1:], *made) if picks else given)) + sum(t.nbytes for t in made)
            self.launches += 1
        return out


def plain(call: Callable[[], Any]) -> tuple[int, int]:
    with torch.no_grad(), Traffic() as traffic:
        call()
    return traffic.launches, traffic.bytes


def rows(batch: int) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Name, (launches, bytes) of plain ATen, (launches, bytes) of the kernels."""
    with torch.device("meta"):
        half = {"dtype": torch.bfloat16}
        streams, out = torch.empty(batch, H, DIM, **half), torch.empty(batch, DIM, **half)
        fn, base, scale = torch.empty(24, H * DIM), torch.empty(24), torch.empty(3)
        post, comb = torch.empty(batch, H), torch.empty(batch, H, H)
        at = torch.empty(batch, dtype=torch.long)
        rings = {ratio: torch.empty(batch, ratio * k, HEAD * k) for ratio, k in ((4, 2), (128, 1))}
        q, ring = torch.empty(batch, HEADS, HEAD, **half), torch.empty(batch, WINDOW, HEAD, **half)
        pool, picks = torch.empty(1 << 16, HEAD, **half), torch.empty(batch, TOPK, dtype=torch.long)
        sink = torch.empty(HEADS)
        pairs = torch.empty(batch * EXPERTS, dtype=torch.long)
        packed = torch.empty(256, 2 * INTER, DIM // 2, dtype=torch.uint8)
        x, by_row = torch.empty(batch * EXPERTS, 1, DIM, **half), torch.empty(256, 2 * INTER)
    chunks = -(-H * DIM // TILES.project)
    sums, stream_bytes = chunks * batch * 32 * 4, streams.nbytes
    head_blocks = -(-HEADS // TILES.attend_heads)
    splits = 1 + max(1, min(-(-TOPK // TILES.attend_keys), TILES.cores // 2 // (batch * head_blocks)))
    parts = batch * splits * HEADS * (HEAD + 2) * 4
    keys = batch * (WINDOW + TOPK) * HEAD * 2 * head_blocks
    rounding = plain(lambda: split_columns(round_to_int8(x)[0]).contiguous())
    products = batch * EXPERTS * (INTER * DIM + 4 * DIM + 2 * INTER * (4 + 2))
    return [
        (
            "mHC, into a sublayer", plain(lambda: hc.enter(streams, fn, base, scale, 20, 1e-6, 1e-6)),
            (3, 2 * stream_bytes + fn.nbytes + 2 * sums + 2 * batch * 32 * 4 + out.nbytes),
        ),
        (
            "mHC, out of it", plain(lambda: hc.expand(streams, out, post, comb)),
            (1, 2 * stream_bytes + out.nbytes + batch * 20 * 4),
        ),
        *(
            (
                f"pooling, windows of {ratio}", plain(partial(compress.pool_ring, t, t, at, at, ratio, HEAD)),
                (1, 2 * batch * ratio * HEAD * 4 * (2 if ratio == 4 else 1) + batch * HEAD * 4),
            )
            for ratio, t in rings.items()
        ),
        (
            "CSA attention, 128 + 512 keys", plain(lambda: attention.attend_cached(q, ring, at, at, pool, picks, sink)),
            (3, keys + splits * q.nbytes + 2 * parts + q.nbytes),
        ),
        (
            "W4A8 product of 6 experts", plain(lambda: moe._of_pairs(x, packed, by_row, pairs)),
            (1 + rounding[0], products + rounding[1]),  # ATen rounds to INT8 and orders the columns
        ),
    ]  # fmt: skip


def main(batches: list[int]) -> None:
    print("| operation, sequences | ATen: launches, MB | Triton: launches, MB | bytes |\n|---|---|---|---|")
    for batch in batches:
        for name, (launches, moved), (ours, own) in rows(batch):
            print(f"| {name}, {batch} | {launches}, {moved / 1e6:.2f} | {ours}, {own / 1e6:.2f} | {moved / own:.1f}x |")


if __name__ == "__main__":
    main([int(b) for b in sys.argv[1:]] or [1, 16])
