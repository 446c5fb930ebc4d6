"""A rank's layers through the C++ kernels: a call for each part of a layer, and the exchanges between them."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, addressof, cast, pointer, sizeof
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.model import compiled
from upwell.model.cache import KVCache, Step
from upwell.model.share import Share, share
from upwell.ops import native
from upwell.ops.native import Parts

if TYPE_CHECKING:
    from upwell.model.parallel import ParallelTransformer


def run_layers(
    model: ParallelTransformer, plan: compiled.Plan, begin: Callable[[Tensor, Any, Share], Tensor], input_ids: Tensor,
    cache: KVCache, step: Step, mtp: int | None,
) -> Tensor | None:  # fmt: skip
    """Streams [T, h, D] after all layers (or MTP block `mtp`); None where the kernels don't take this cache."""
    if not compiled.takes(model, cache):
        return None
    hidden, h = model.config.hidden_size, model.config.hc_mult
    ids = input_ids.contiguous().view(-1)
    out = torch.zeros(ids.numel(), h, hidden)
    blocks: list[Any] = list(model.layers) if mtp is None else [model.mtp[mtp]]
    with plan.lock:
        caches = compiled.caches_of(plan, cache, mtp)
        for piece in compiled.pieces(input_ids, step):
            _, layers = plan.of(piece.tokens, torch.get_num_threads(), mtp)
            split = share(model.ranks.world, piece.tokens)
            part_ids = ids[piece.rows]
            streams = begin(part_ids, piece.rows, split).contiguous()
            tokens = _Tokens(plan, piece, split, part_ids, streams)
            for i, block in enumerate(blocks):
                tokens.layer(block, _at(layers, i, native.Layer), _at(caches, i, native.LayerCache))
            out[piece.rows] = split.gather(streams)
    return out


def _at(array: Any, i: int, kind: Any) -> Any:
    return cast(addressof(array) + i * sizeof(kind), POINTER(kind))


class _Tokens:
    """The tokens of a call: those of this rank in `streams` [t, h, D], and all of them where heads or experts meet."""

    def __init__(
        self, plan: compiled.Plan, piece: compiled.Piece, split: Share, ids: Tensor, streams: Tensor
    ) -> None:
        self.plan, self.piece, self.split, self.ids, self.streams = plan, piece, split, ids, streams
        self.own_ids = split.take(ids)
        n, h, hidden = streams.shape
        self.post, self.comb = torch.empty(n, h), torch.empty(n, h, h)
        self.x, self.y = torch.empty(n, hidden), torch.empty(n, hidden)

    def layer(self, block: Any, layer: Any, cache: Any) -> None:
        moe = block.ffn
        self._own(Parts.ENTER_ATTENTION, layer, cache)
        partial = self._all(Parts.ATTENTION, layer, cache, None)
        self.y = self.split.reduce(partial, moe.ranks.heads).contiguous()
        self._own(Parts.LEAVE_ATTENTION | Parts.ENTER_EXPERTS, layer, cache)
        if moe.places is not None:
            self.y = moe(self.x, self.own_ids, self.split).contiguous()
        else:
            counts = moe.load if moe.ranks.world.rank == 0 else None
            self.y = self.split.reduce(self._all(Parts.EXPERTS, layer, cache, counts)).contiguous()
        self._own(Parts.LEAVE_EXPERTS, layer, cache)

    def _own(self, parts: Parts, layer: Any, cache: Any) -> None:
        """streams, post, comb, x and y of this rank's tokens."""
        if self.streams.shape[0]:
            self._run(parts, layer, cache, self.streams.shape[0], self.x, self.y)

    def _all(self, parts: Parts, layer: Any, cache: Any, load: Tensor | None) -> Tensor:
        """y [T, D] of all tokens' x, by what is here of heads or experts."""
        x = self.split.gather(self.x).contiguous()
        y = torch.empty_like(x)
        self._run(parts, layer, cache, x.shape[0], x, y, load)
        return y

    def _run(
        self, parts: Parts, layer: Any, cache: Any, tokens: int, x: Tensor, y: Tensor, load: Tensor | None = None
    ) -> None:
        at, count = (self.piece.address, self.piece.count) if parts == Parts.ATTENTION else (None, 0)
        call = native.Call(
            pointer(self.plan.model), layer, cache, 1, at, count, tokens, BLOCK_TOKENS,
            self.ids.data_ptr(), None, 0, self.streams.data_ptr(), parts=int(parts), x=x.data_ptr(), y=y.data_ptr(),
            post=self.post.data_ptr(), comb=self.comb.data_ptr(), load=None if load is None else load.data_ptr(),
        )  # fmt: skip
        compiled.run(self.plan, call)
