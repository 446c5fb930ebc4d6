"""mHC in Triton: about 170 operators of ATen a sublayer become four kernels (ops/hyper_connections.py is the answer).

The mixed weights of a token lie in one row [PAD]: pre [h], post [h], comb [h * h], the sum of squares, zeros; PAD is
G groups of h, so that the groups 2 to h + 1 are comb's rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from upwell.ops.triton.tiles import Tiles, sized

_FEW_TOKENS = 64  # beyond, the cube's matrix product reads fn once for all tokens
_GROUPS = 8


def enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor] | None:
    """ops.hyper_connections.enter, for 2 or 4 streams."""
    tokens, h, dim = streams.shape
    if h not in (2, 4) or tokens == 0 or fn.dtype != torch.float32:
        return None
    streams = streams.contiguous()
    partial = _partial(streams, fn, tiles)
    pad, width = _GROUPS * h, h * dim
    mixed = partial.new_empty(tokens, pad)
    blocks = triton.cdiv(tokens, tiles.mix_tokens)
    mix_kernel[(min(blocks, tiles.cores),)](
        partial, base, scale, mixed, tokens, width, partial.shape[0], eps, norm_eps, iterations,
        H=h, G=_GROUPS, BT=tiles.mix_tokens,
    )  # fmt: skip
    out = streams.new_empty(tokens, dim)
    tile = sized(tiles.stream_dims, dim, tokens, tiles.cores)
    blocks = triton.cdiv(dim, tile)
    collapse_kernel[(min(tokens * blocks, tiles.cores),)](
        streams, mixed, out, tokens, dim, blocks, H=h, PAD=pad, BD=tile
    )
    return out, mixed[:, h : 2 * h], mixed[:, 2 * h : (2 + h) * h].unflatten(1, (h, h))


def expand(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor, tiles: Tiles) -> Tensor | None:
    """ops.hyper_connections.expand."""
    tokens, h, dim = streams.shape
    if h not in (2, 4) or tokens == 0 or post.stride(1) != 1 or comb.stride()[1:] != (h, 1):
        return None
    streams, out = streams.contiguous(), torch.empty_like(streams, memory_format=torch.contiguous_format)
    tile = sized(tiles.stream_dims, dim, tokens, tiles.cores)
    blocks = triton.cdiv(dim, tile)
    expand_kernel[(min(tokens * blocks, tiles.cores),)](
        streams, output.contiguous(), post, comb, out, tokens, dim, blocks, post.stride(0), comb.stride(0), H=h, BD=tile
    )
    return out


def _partial(streams: Tensor, fn: Tensor, tiles: Tiles) -> Tensor:
    """fn @ streams in parts to be added up, and the sums of squares behind: [parts, T, PAD] FP32."""
    tokens, h, dim = streams.shape
    rows, pad, width = (2 + h) * h, _GROUPS * h, h * dim
    if tokens > _FEW_TOKENS:
        flat = streams.flatten(1).float()
        partial = flat.new_zeros(1, tokens, pad)
        partial[0, :, :rows] = F.linear(flat, fn)
        partial[0, :, rows] = flat.square().sum(-1)
        return partial
    chunks = triton.cdiv(width, tiles.project)
    partial = fn.new_empty(chunks, tokens, pad)
    project_kernel[(min(chunks, tiles.cores),)](
        streams, fn.contiguous(), partial, tokens, width, chunks, ROWS=rows, PAD=pad, BK=tiles.project
    )
    return partial


@triton.jit
def project_kernel(streams, fn, partial, tokens, width, chunks, ROWS: tl.constexpr, PAD: tl.constexpr, BK: tl.constexpr):
    """streams [T, width], fn [ROWS, width] -> partial [chunks, T, PAD]: products over BK columns, then their squares."""
    row = tl.arange(0, PAD)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        k = chunk * BK + tl.arange(0, BK)
        inside = k < width
        weight = tl.load(fn + row[:, None] * width + k[None, :], mask=(row[:, None] < ROWS) & inside[None, :], other=0.0)
        for t in range(tokens):
            x = tl.load(streams + t * width + k, mask=inside, other=0.0).to(tl.float32)
            products = tl.sum(weight * x[None, :], axis=1)
            square = tl.sum(x * x, axis=0)
            tl.store(partial + (chunk * tokens + t) * PAD + row, tl.where(row == ROWS, square, products))


@triton.jit
def mix_kernel(
    partial, base, scale, mixed, tokens, width, chunks, eps, norm_eps, iterations,
    H: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial [chunks, T, PAD], base [ROWS], scale [3] -> mixed [T, PAD]. Tokens come last, as in the plain operation,
    so that each step of Sinkhorn's runs over contiguous values."""
    PAD: tl.constexpr = G * H
    ROWS: tl.constexpr = (2 + H) * H
    row = tl.arange(0, PAD)
    group = tl.arange(0, G)[:, None, None]
    bias = tl.load(base + row, mask=row < ROWS, other=0.0)
    factor = tl.where(row < H, tl.load(scale), tl.where(row < 2 * H, tl.load(scale + 1), tl.load(scale + 2)))
    for block in range(tl.program_id(0), tl.cdiv(tokens, BT), tl.num_programs(0)):
        t = block * BT + tl.arange(0, BT)
        at = t[:, None] * PAD + row[None, :]
        inside = (t < tokens)[:, None] & (row < PAD)[None, :]
        z = tl.zeros((BT, PAD), tl.float32)
        for chunk in range(chunks):
            z += tl.load(partial + chunk * tokens * PAD + at, mask=inside, other=0.0)
        square = tl.sum(tl.where(row[None, :] == ROWS, z, 0.0), axis=1)
        rms = 1.0 / tl.sqrt(square / width + norm_eps)
        z = tl.where(row[None, :] < ROWS, z * rms[:, None] * factor[None, :] + bias[None, :], 0.0)
        z = tl.reshape(tl.trans(z), (G, H, BT))
        gate = 1.0 / (1.0 + tl.exp(-z))
        power = tl.exp(z - tl.max(z, axis=1)[:, None, :])
        comb = power / tl.sum(power, axis=1)[:, None, :] + eps
        comb = tl.where((group >= 2) & (group < 2 + H), comb, 0.0)
        comb = comb / (tl.sum(comb, axis=0)[None, :, :] + eps)
        for _ in range(iterations - 1):
            comb = comb / (tl.sum(comb, axis=1)[:, None, :] + eps)
            comb = comb / (tl.sum(comb, axis=0)[None, :, :] + eps)
        out = tl.where(group == 0, gate + eps, tl.where(group == 1, 2 * gate, comb))
        tl.store(mixed + at, tl.trans(tl.reshape(out, (PAD, BT))), mask=inside)


@triton.jit
def collapse_kernel(streams, mixed, out, tokens, dim, blocks, H: tl.constexpr, PAD: tl.constexpr, BD: tl.constexpr):
    """streams [T, H, dim], pre in mixed [T, PAD] -> out [T, dim]."""
    i = tl.arange(0, H)
    for item in range(tl.program_id(0), tokens * blocks, tl.num_programs(0)):
        t = item // blocks
        d = (item % blocks) * BD + tl.arange(0, BD)
        at = streams + t * H * dim + i[:, None] * dim + d[None, :]
        x = tl.load(at, mask=(d < dim)[None, :], other=0.0).to(tl.float32)
        pre = tl.load(mixed + t * PAD + i)
        tl.store(out + t * dim + d, tl.sum(x * pre[:, None], axis=0).to(out.dtype.element_ty), mask=d < dim)


@triton.jit
def expand_kernel(
    streams, output, post, comb, out, tokens, dim, blocks, post_row, comb_row, H: tl.constexpr, BD: tl.constexpr
):
    """streams [T, H, dim], output [T, dim], post and comb in rows of post_row, comb_row -> out [T, H, dim]."""
    i = tl.arange(0, H)
    for item in range(tl.program_id(0), tokens * blocks, tl.num_programs(0)):
        t = item // blocks
        d = (item % blocks) * BD + tl.arange(0, BD)
        first = t * H * dim
        x = tl.load(streams + first + i[:, None] * dim + d[None, :], mask=(d < dim)[None, :], other=0.0).to(tl.float32)
        y = tl.load(output + t * dim + d, mask=d < dim, other=0.0).to(tl.float32)
        for j in range(H):
            share = tl.load(comb + t * comb_row + i * H + j)
            mixed = tl.load(post + t * post_row + j) * y + tl.sum(x * share[:, None], axis=0)
            tl.store(out + first + j * dim + d, mixed.to(out.dtype.element_ty), mask=d < dim)
