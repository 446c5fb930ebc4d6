"""Triton kernels for what plain ATen makes of many launches or copies: mHC, the compressor's pooling, products with
packed INT4, attention over a paged cache. Written for triton-ascend 3.2; nothing here imports triton until asked for.

Each is checked by `make npu-triton`: under Triton's interpreter against the plain operation, and lowered by
triton-ascend and bishengir-compile for 910B, 910C and 950 within their on-chip memory. None has run on a card.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from upwell.devices.npu import Chip
from upwell.ops.triton.tiles import Tiles, tiles_of

T = TypeVar("T")


def load(chip: Chip) -> Kernels | None:
    """The kernels for a chip; None where triton isn't installed or the chip isn't one they were lowered for."""
    tiles = tiles_of(chip)
    return Kernels(tiles) if tiles is not None and find_spec("triton") is not None else None


def split_columns(x: Tensor) -> Tensor:
    """[..., in] with the even columns first, then the odd ones. A nibble's place in its byte decides which half it is
    in, so weights are never interleaved; a product doesn't mind, if both sides are in this order."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class Kernels:
    """Each method is an operation of the plain path, or None for a call it doesn't cover. A kernel that Triton can't
    compile here is left alone from then on, with one warning."""

    def __init__(self, tiles: Tiles) -> None:
        from upwell.ops.triton import attention, compress, hyper_connections, int4

        self.tiles, self._off = tiles, set[str]()
        self._attention, self._compress, self._mhc, self._int4 = attention, compress, hyper_connections, int4

    def _try(self, name: str, call: Callable[[], T | None]) -> T | None:
        if name in self._off:
            return None
        try:
            return call()
        except Exception as error:  # Triton's compilers raise whatever they like
            self._off.add(name)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"Triton kernel {name} can't be used, plain operators take its place: {first}", stacklevel=2)
            return None

    def enter(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """ops.hyper_connections.enter."""
        return self._try(
            "mHC enter",
            lambda: self._mhc.enter(streams, fn, base, scale, iterations, eps, norm_eps, self.tiles),
        )

    def expand(self, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor | None:
        """ops.hyper_connections.expand."""
        return self._try("mHC expand", lambda: self._mhc.expand(streams, output, post, comb, self.tiles))

    def pool(
        self, kv: Tensor, gate: Tensor, prior_kv: Tensor | None, prior_gate: Tensor | None, ratio: int, dim: int
    ) -> Tensor | None:
        """ops.compress.pool."""
        return self._try(
            "pooling", lambda: self._compress.pool(kv, gate, prior_kv, prior_gate, ratio, dim, self.tiles)
        )

    def pool_ring(
        self, kv: Tensor, gate: Tensor, slots: Tensor, positions: Tensor, ratio: int, dim: int
    ) -> Tensor | None:
        """ops.compress.pool_ring."""
        return self._try(
            "pooling of rings", lambda: self._compress.pool_ring(kv, gate, slots, positions, ratio, dim, self.tiles)
        )

    def int4_products(
        self, rows: Tensor, packed: Tensor, scales: Tensor, picks: Tensor, row_scales: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """upwell.ops.triton.int4.products."""
        return self._try(
            "INT4 products", lambda: self._int4.products(rows, packed, scales, picks, row_scales, dtype, self.tiles)
        )

    def int4_decode(self, packed: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """upwell.ops.triton.int4.decode."""
        return self._try("INT4 decoding", lambda: self._int4.decode(packed, scale, dtype, self.tiles))

    def attend_cached(
        self, q: Tensor, window: Tensor, slots: Tensor, positions: Tensor, pool: Tensor, rows: Tensor, sink: Tensor
    ) -> Tensor | None:
        """ops.attention.attend_cached."""
        return self._try(
            "cached attention",
            lambda: self._attention.attend_cached(q, window, slots, positions, pool, rows, sink, self.tiles),
        )
