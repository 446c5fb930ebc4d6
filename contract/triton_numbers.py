"""Computes every Triton kernel under Triton's interpreter and holds it against the plain operation, over many shapes.

    python -m contract.triton_numbers [streams|pooling|packed|attending]     in triton-ascend's venv; status 1 on failure
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from upwell.devices.npu import chip
from upwell.formats.int4 import dequantize_int4, pack_int4, quantize_int4, unpack_int4
from upwell.ops import attention, compress
from upwell.ops import hyper_connections as hc
from upwell.ops.triton import Kernels, split_columns
from upwell.ops.triton.tiles import tiles_of

Case = tuple[str, Tensor | None, Tensor, float]
"""What was computed, by the kernel (None: it didn't take the call), by the plain operation, and how far apart they may
be, in parts of the largest value."""

BF16 = torch.bfloat16


class Numbers:
    """Draws inputs, the same ones in every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(6)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * size).to(dtype)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def streams(kernels: Kernels, draw: Numbers) -> Iterator[Case]:
    """mHC: odd widths, Flash's and Pro's, many tokens; gates driven to their ends."""
    shapes = [(1, 4, 4096, BF16), (3, 4, 7168, BF16), (2, 4, 250, torch.float32), (19, 2, 33, BF16)]
    shapes += [(1, 4, 16, torch.float16), (70, 4, 64, BF16), (64, 4, 48, torch.float32), (200, 2, 24, BF16)]
    for (tokens, h, dim, dtype), size in [(shape, 1.0) for shape in shapes] + [((5, 4, 96, BF16), 300.0)]:
        x, fn = draw.normal(tokens, h, dim, dtype=dtype, size=size), draw.normal((2 + h) * h, h * dim, size=size / dim)
        base, scale, out = draw.normal((2 + h) * h, size=size), draw.normal(3), draw.normal(tokens, dim, dtype=dtype)
        name = f"mHC {tokens} x {h} x {dim} {dtype} size {size:g}"
        pre, post, comb = hc.mix(x, fn, base, scale, 20, 1e-6, 1e-6)
        ours = kernels.enter(x, fn, base, scale, 20, 1e-6, 1e-6)
        rounding = 1e-5 if dtype == torch.float32 else 0.01
        yield name, ours and ours[0], hc.collapse(x, pre), rounding
        yield name + " post", ours and ours[1], post, 1e-4
        yield name + " comb", ours and ours[2], comb, 2e-4
        yield name + " expand", kernels.expand(x, out, post, comb.contiguous()), hc.expand(x, out, post, comb), rounding
        zeros = kernels.enter(torch.zeros_like(x), fn, base, scale, 20, 1e-6, 1e-6)
        yield name + " of zeros", zeros and zeros[2], hc.mix(torch.zeros_like(x), fn, base, scale, 20, 1e-6, 1e-6)[2], 2e-4


def pooling(kernels: Kernels, draw: Numbers) -> Iterator[Case]:
    """The compressor: CSA's and HCA's windows, indexer's dims, first windows, gates far apart."""
    for ratio, dim, size in ((4, 512, 1.0), (4, 128, 30.0), (4, 36, 1.0), (128, 512, 1.0), (128, 40, 100.0), (8, 72, 1.0)):
        overlap = ratio != 128
        width, ring = dim * (1 + overlap), ratio * (1 + overlap)
        kv, gate = draw.normal(5, ring, width), draw.normal(5, ring, width, size=size)
        slots, positions = torch.tensor([3, 0, 4, 3]), torch.tensor([0, ratio - 1, 7 * ratio + 2, 4 * ratio])
        yield (
            f"ring, windows of {ratio}, {dim} dims, gates of {size:g}",
            kernels.pool_ring(kv, gate, slots, positions, ratio, dim),
            compress.pool_ring(kv, gate, slots, positions, ratio, dim), 1e-5,
        )  # fmt: skip
        for batch, n, given in ((1, 3, True), (2, 2, False), (3, 1, True)):
            kv, gate = draw.normal(batch, n * ratio, width), draw.normal(batch, n * ratio, width, size=size)
            prior = draw.normal(batch, ratio, dim), draw.normal(batch, ratio, dim, size=size)
            before = prior if given and overlap else (None, None)
            yield (
                f"{batch} x {n} windows of {ratio}, {dim} dims, gates of {size:g}, prior {before[0] is not None}",
                kernels.pool(kv, gate, *before, ratio, dim), compress.pool(kv, gate, *before, ratio, dim), 1e-5,
            )  # fmt: skip


def packed(kernels: Kernels, draw: Numbers) -> Iterator[Case]:
    """INT4: by rows and by groups, widths that no tile divides, all sixteen codes, an expert's true width."""
    for experts, outputs, width, group in (
        (3, 40, 64, None), (2, 17, 96, 32), (1, 5, 2, None), (4, 33, 1032, None), (2, 48, 608, 16), (2, 20, 4096, 32),
        (1, 16, 4096, None), (1, 7, 256, 128),
    ):  # fmt: skip
        codes, scales = zip(
            *(quantize_int4(draw.normal(outputs, width, size=10.0 ** -e), group) for e in range(experts)), strict=True
        )
        weights, scale = torch.stack(codes), torch.stack(scales)
        picks = draw.below(experts, 5)
        name = f"INT4 {experts} x {outputs} x {width}, group {group}"
        dense = torch.stack([dequantize_int4(w, s) for w, s in zip(weights, scale, strict=True)])
        rows = draw.normal(5, width, dtype=BF16)
        exact = torch.einsum("pi,poi->po", rows.float(), dense[picks])
        yield name, kernels.int4_products(rows, weights, scale, picks, None, torch.float32), exact, 1e-5
        steps = draw.normal(5).abs()
        stepped = kernels.int4_products(rows.float(), weights, scale, picks, steps.view(5, 1, 1), BF16)
        yield name + " with steps", stepped, (exact * steps[:, None]).bfloat16(), 0.01
        by_group = None if group is None else scale[0]
        decoded = kernels.int4_decode(weights[0], by_group, torch.int8 if group is None else BF16)
        plain = unpack_int4(weights[0]) if group is None else dequantize_int4(weights[0], scale[0], BF16)
        yield name + " decoded", decoded, split_columns(plain), 0.008
    every = pack_int4(torch.arange(-8, 8, dtype=torch.int8).repeat(3, 4))
    yield "INT4, every code", kernels.int4_decode(every, None, torch.int8), split_columns(unpack_int4(every)), 0.0


def attending(kernels: Kernels, draw: Numbers) -> Iterator[Case]:
    """Attention over the cache: Flash's and Pro's heads, few and no picks, a window not yet full, sinks that win. In
    FP16: the interpreter multiplies matrices of BF16 as if they were integers."""
    dtype = torch.float16
    for batch, heads, dim, places, picks in (
        (2, 64, 512, 128, 512), (1, 128, 512, 128, 130), (3, 5, 64, 128, 7), (2, 8, 128, 16, 65), (1, 17, 32, 48, 1),
        (9, 2, 16, 32, 40),
    ):  # fmt: skip
        q = draw.normal(batch, heads, dim, dtype=dtype)
        window, pool = draw.normal(batch + 2, places, dim, dtype=dtype), draw.normal(300, dim, dtype=dtype)
        slots = torch.randperm(batch + 2, generator=draw.generator)[:batch]
        rows = draw.below(300, batch, picks).masked_fill(draw.below(4, batch, picks) == 0, -1)
        for at, none, sink in ((places + 5, False, 0.0), (0, True, 0.0), (places // 2, False, 40.0)):
            positions = torch.full((batch,), at) + torch.arange(batch)
            chosen = torch.full_like(rows, -1) if none else rows
            sinks = draw.normal(heads) + sink
            yield (
                f"attention {batch} x {heads} x {dim}, {places} + {picks} keys, position {at}, sink {sink:g}",
                kernels.attend_cached(q, window, slots, positions, pool, chosen, sinks),
                attention.attend_cached(q, window, slots, positions, pool, chosen, sinks),
                0.02 if sink == 0 else 0.05,
            )  # fmt: skip


def main(wanted: str = "") -> int:
    tiles = tiles_of(chip("Ascend910B1"))
    assert tiles is not None
    kernels, failed, done = Kernels(tiles), [], 0
    for part in (part for part in (streams, pooling, packed, attending) if wanted in part.__name__):
        begun, before = time.perf_counter(), done
        for name, ours, plain, tolerance in part(kernels, Numbers()):
            done += 1
            if problem := difference(ours, plain, tolerance):
                failed.append(name)
                print(f"{name}: {problem}", flush=True)
        print(f"{part.__name__}: {done - before} comparisons, {time.perf_counter() - begun:.1f} s", flush=True)
    print(f"{done - len(failed)} of {done} agree with the plain operations")
    return 1 if failed else 0


def difference(ours: Tensor | None, plain: Tensor, tolerance: float) -> str | None:
    if ours is None:
        return "not computed"
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        return f"{tuple(ours.shape)} {ours.dtype} for {tuple(plain.shape)} {plain.dtype}"
    furthest, most = float((ours.float() - plain.float()).abs().max()), float(plain.float().abs().max())
    return None if furthest <= tolerance * most else f"apart by {furthest:.3g} where the largest is {most:.3g}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
