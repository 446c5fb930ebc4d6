"""V4 shared by several ranks: each computes with its own part of the weights, and they add up what they have.

The modules are V4's own, with this rank's heads, inner width or experts; what is here are the exchanges. Every rank
makes the same calls with the same arguments: rank 0 tells the others (`lead`), which repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from upwell.config import ModelConfig, Numerics
from upwell.devices.collectives import Group
from upwell.errors import RankError
from upwell.model import compiled, compiled_parallel
from upwell.model.attention import Rope
from upwell.model.cache import KVCache, LayerCache, Step
from upwell.model.exchange import Places, compute_own, exchange
from upwell.model.hyper_connections import settled
from upwell.model.layers import Linear
from upwell.model.moe import Experts, Gate, SharedExpert
from upwell.model.offload import HostExperts
from upwell.model.sharding import Shard
from upwell.model.share import Share, share
from upwell.model.transformer import Block, MTPBlock, Transformer


class Leader(Protocol):
    """The line from rank 0 to the others."""

    def tell(self, name: str, values: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None: ...

    def fail(self, what: str) -> RankError:
        """Rank 0 can't go on: the others end, too."""

    def on_failure(self, listener: Callable[[RankError], None]) -> None: ...


class Ranks:
    """The groups of one rank: all of them, and those that split an attention's heads."""

    def __init__(self, shard: Shard, world: Group, heads: Group) -> None:
        self.shard, self.world, self.heads = shard, world, heads


class ParallelMoE(nn.Module):
    """This rank's part of a layer's experts: own tokens x [t, D], own ids [t] -> [t, D]."""

    def __init__(self, config: ModelConfig, is_hash: bool, layer: str, ranks: Ranks) -> None:
        super().__init__()
        shard = ranks.shard
        self.ranks = ranks
        self.gate = Gate(config, is_hash)
        self.experts = Experts(shard.local)
        self.shared_experts = SharedExpert(shard.local)
        if shard.exchanges:
            self.experts = Experts(_with_experts(shard.local, len(shard.experts(layer))))
        else:
            _resize(self.shared_experts, config.hidden_size, shard.shared)
        self.places = Places(shard.placed(layer), config.n_routed_experts, shard.rank) if shard.exchanges else None
        self.load: Tensor | None = None  # [E] INT64, counted on where given
        self.computed = 0  # pairs of token and expert that this rank computed
        self._kernels: HostExperts | None = None  # packed experts on a CPU, by the C++ kernels

    def forward(self, x: Tensor, input_ids: Tensor, share: Share) -> Tensor:
        if self.places is None:
            x, input_ids = share.gather(x), share.gather(input_ids)
            experts, weights = self.gate(x, input_ids)
            self._count(experts, self.ranks.world.rank == 0)
            return share.reduce(self.experts(x, experts, weights) + self.shared_experts(x))
        experts, weights = self.gate(x, input_ids)
        self._count(experts, share.is_split or self.ranks.world.rank == 0)
        if share.is_split:
            out, computed = exchange(self.ranks.world, self.places, self._pairs, x, experts, weights)
            self.computed += computed
            return (out + self.shared_experts(x).float()).to(x.dtype)
        places = self.places.own(experts)
        if self.load is not None:
            self.computed += int((places >= 0).sum())
        out = compute_own(self._pairs, x, places, weights) + self._shared_part(x).float()
        return share.reduce(out.to(x.dtype))

    def _pairs(self, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        dense = self.experts.packed is None and self.experts.w13_scale is None
        if dense or x.device.type != "cpu" or torch.is_grad_enabled():
            return self.experts(x, places, weights)
        if self._kernels is None or self._kernels.experts is not self.experts:
            self._kernels = HostExperts(self.experts)
        return self._kernels(x, places, weights)

    def _shared_part(self, x: Tensor) -> Tensor:
        """The shared expert of tokens that all ranks have: each rank computes it for its share of them."""
        mine = slice(self.ranks.world.rank, None, self.ranks.world.size)
        out = torch.zeros_like(x)
        if out[mine].shape[0]:
            out[mine] = self.shared_experts(x[mine])
        return out

    def _count(self, experts: Tensor, counts: bool) -> None:
        if self.load is not None and counts:
            self.load += torch.bincount(experts.flatten(), minlength=self.load.numel())


def _with_experts(config: ModelConfig, experts: int) -> ModelConfig:
    return replace(config, n_routed_experts=experts, num_experts_per_tok=min(config.num_experts_per_tok, experts))


def _resize(expert: SharedExpert, hidden: int, inner: tuple[int, int]) -> None:
    width = inner[1] - inner[0]
    expert.w1, expert.w3, expert.w2 = Linear(hidden, width), Linear(hidden, width), Linear(width, hidden)


class _ParallelLayer(Block):
    """A block on its own tokens' streams; `ranks` is set after construction."""

    ranks: Ranks

    def extend(
        self, streams: Tensor, input_ids: Tensor, own_ids: Tensor, rope: Rope, cache: LayerCache | None,
        step: Step | None, share: Share,
    ) -> Tensor:  # fmt: skip
        """streams [t, h, D] and own_ids [t] of the own tokens; input_ids [B, S] and rope of all."""
        x, streams, post, comb = self.hc_attn.enter(streams, self.attn_norm)
        x = share.gather(x).view(*input_ids.shape, -1)
        y = share.reduce(self.attn(x, rope, cache, step).flatten(0, 1), self.ranks.heads)
        x, streams, post, comb = self.hc_ffn.enter(self.hc_attn.leave(streams, y, post, comb), self.ffn_norm)
        return settled(self.hc_ffn.leave(streams, self.ffn(x, own_ids, share), post, comb))


class ParallelBlock(_ParallelLayer):
    def __init__(
        self, config: ModelConfig, ratio: int, is_hash: bool, numerics: Numerics, layer: str, ranks: Ranks
    ) -> None:
        super().__init__(ranks.shard.local, ratio, is_hash, numerics)
        self.ranks = ranks
        self.ffn = ParallelMoE(config, is_hash, layer, ranks)  # type: ignore[assignment]


class ParallelMTPBlock(MTPBlock, _ParallelLayer):
    def __init__(self, config: ModelConfig, numerics: Numerics, layer: str, ranks: Ranks) -> None:
        super().__init__(ranks.shard.local, numerics)
        self.ranks = ranks
        self.ffn = ParallelMoE(config, False, layer, ranks)  # type: ignore[assignment]


class ParallelTransformer(Transformer):
    """One rank's V4. On rank 0 `lead` tells the others of every call before it is made here."""

    def __init__(self, config: ModelConfig, ranks: Ranks, numerics: Numerics = "exact") -> None:
        shard = ranks.shard
        if numerics == "official":
            shard.check_official()
        super().__init__(_empty(config), numerics)
        self.config, self.ranks = config, ranks
        self.local = shard.local
        first, last = shard.vocab
        self.embed = nn.Embedding(last - first, config.hidden_size)
        self.head = Linear(config.hidden_size, last - first)
        self.layers = nn.ModuleList(
            ParallelBlock(config, ratio, config.is_hash_layer(i), numerics, f"layers.{i}", ranks)
            for i, ratio in enumerate(config.compress_ratios)
        )
        self.mtp = nn.ModuleList(
            ParallelMTPBlock(config, numerics, f"mtp.{i}", ranks) for i in range(config.num_nextn_predict_layers)
        )
        self.lead: Leader | None = None
        self._telling = False

    def on_failure(self, listener: Callable[[RankError], None]) -> None:
        if self.lead is not None:
            self.lead.on_failure(listener)

    def new_cache(self, blocks: int, slots: int) -> KVCache:
        with self._together("new_cache", {"blocks": blocks, "slots": slots}):
            cache = super().new_cache(blocks, slots)
            cache.tell = None if self.lead is None else self.lead.tell
            return cache

    def streams(
        self, input_ids: Tensor, cache: KVCache | None = None, step: Step | None = None, only_last: bool = False
    ) -> Tensor:
        with self._together("streams", _values(step), (input_ids,)):
            streams = self._all_layers(self._embedded, input_ids, cache, step, None)
        return streams[step.last_rows(input_ids)] if only_last and step is not None else streams

    def draft_streams(
        self, next_ids: Tensor, streams: Tensor, cache: KVCache | None = None, step: Step | None = None, depth: int = 0
    ) -> Tensor:
        with self._together("draft_streams", {**_values(step), "depth": depth}, (next_ids, streams)):
            block = self._mtp_block(depth)
            embedded = self._lookup(next_ids.flatten())
            embedded = self.ranks.world.all_reduce(embedded)
            joined = block.join(embedded, streams)
            return self._all_layers(lambda ids, rows, split: split.take(joined[rows]), next_ids, cache, step, depth)

    def logits(self, streams: Tensor) -> Tensor:
        with self._together("logits", {}, (streams,)):
            return self._gathered(super().logits(streams))

    def draft_logits(self, streams: Tensor, depth: int = 0) -> Tensor:
        with self._together("draft_logits", {"depth": depth}, (streams,)):
            return self._gathered(super().draft_logits(streams, depth))

    @contextmanager
    def _together(self, name: str, values: dict[str, Any], tensors: Sequence[Tensor] = ()) -> Iterator[None]:
        """Let the other ranks make this call too, unless it is part of one that they make already."""
        if self.lead is None or self._telling:
            yield
            return
        self.lead.tell(name, values, tensors)
        self._telling = True
        try:
            yield
        except RankError:
            raise
        except BaseException as error:  # the others are in the middle of it
            failure = self.lead.fail(f"rank 0 failed: {type(error).__name__}: {error}")
            if isinstance(error, Exception):
                raise failure from error
            raise
        finally:
            self._telling = False

    def _all_layers(
        self, begin: Callable[[Tensor, Any, Share], Tensor], input_ids: Tensor, cache: KVCache | None,
        step: Step | None, mtp: int | None,
    ) -> Tensor:  # fmt: skip
        """Streams [T, h, D] of all layers, or of MTP block `mtp`. begin(ids [n], rows, share) are the own tokens'
        streams [t, h, D] before them, of the tokens at `rows` of the flattened input."""
        if cache is not None and step is not None and (plan := compiled.plan(self, step)) is not None:
            out = compiled_parallel.run_layers(self, plan, begin, input_ids, cache, step, mtp)
            if out is not None:
                return out
        if step is not None and step.is_ragged(input_ids):
            parts, longest = input_ids[0].split(step.lengths), max(step.lengths)
            padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
            at = torch.cat([b * longest + torch.arange(n) for b, n in enumerate(step.lengths)]).to(input_ids.device)
            return self._all_layers(begin, padded, cache, step, mtp)[at]
        flat = input_ids.flatten()
        split = share(self.ranks.world, len(flat))
        streams = begin(flat, slice(None), split)
        own_ids = split.take(flat)
        ropes = self._ropes(input_ids, step)
        blocks: list[Any] = list(self.layers) if mtp is None else [self.mtp[mtp]]
        caches = None if cache is None else cache.layers if mtp is None else [cache.mtp[mtp]]
        for i, block in enumerate(blocks):
            rope = ropes[bool(block.attn.ratio)]
            streams = block.extend(streams, input_ids, own_ids, rope, caches[i] if caches else None, step, split)
        return split.gather(streams)

    def _embedded(self, ids: Tensor, rows: Any, split: Share) -> Tensor:
        own = split.reduce(self._lookup(ids))
        return own.unsqueeze(1).expand(-1, self.config.hc_mult, -1)

    def _lookup(self, ids: Tensor) -> Tensor:
        """Embeddings [T, D] of the ids that this rank has; zero for others."""
        first, last = self.ranks.shard.vocab
        here = (ids >= first) & (ids < last)
        return self.embed((ids - first).clamp(0, last - first - 1)) * here.unsqueeze(1)

    def _gathered(self, logits: Tensor) -> Tensor:
        """Each rank's logits [T, v] of its own words -> [T, V]."""
        world, vocab = self.ranks.world, self.config.vocab_size
        if world.size == 1:
            return logits
        widest = -(-vocab // world.size)
        padded = nn.functional.pad(logits, (0, widest - logits.shape[1]))
        parts = world.all_gather(padded.t().contiguous()).view(world.size, widest, -1)
        bounds = [vocab * r // world.size for r in range(world.size + 1)]
        own = [part[: b - a] for part, (a, b) in zip(parts, pairwise(bounds), strict=True)]
        return torch.cat(own).t().contiguous()


def _values(step: Step | None) -> dict[str, Any]:
    if step is None:
        return {"step": None}
    return {"step": [step.slots, step.starts, step.lengths, step.tables]}


def _empty(config: ModelConfig) -> ModelConfig:
    """A config for what ranks have whole (norms, hyper head): no layers, the smallest embedding."""
    return replace(config, num_hidden_layers=1, compress_ratios=(0,), num_nextn_predict_layers=0)
