"""Runs the model over a batch of sequences against the cache, and gives the streams and logits that sampling needs."""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.engine.graphs import DecodeGraphs
from upwell.engine.sequence import Sequence
from upwell.model import KVCache, Step, Transformer
from upwell.model.snapshot import copy_block, copy_slot


class Runner:
    """Owns model and cache. Each call extends the cache by the tokens it is given. `graphs`: decode by graphs."""

    def __init__(self, model: Transformer, blocks: int, slots: int, graphs: bool = False) -> None:
        self.model = model
        self.cache = KVCache(model.config, blocks, slots, model.dtype, model.device)
        self.graphs = DecodeGraphs(model, self.cache) if graphs else None

    @torch.inference_mode()
    def streams(self, batch: list[tuple[Sequence, int]]) -> Tensor:
        """The next n tokens of each (sequence, n) -> streams [B, h, D] after the last of them."""
        device = self.model.device
        lengths = [n for _, n in batch]
        longest = max(lengths)
        rows = [s.tokens(s.computed, s.computed + n) + [0] * (longest - n) for s, n in batch]
        step = Step(
            [s.slot for s, _ in batch], [s.computed for s, _ in batch], lengths, [s.table for s, _ in batch], device
        )
        if self.graphs is not None and step.is_decode:
            return self.graphs.streams([row[0] for row in rows], step)
        streams = self.model.streams(torch.tensor(rows, device=device), self.cache, step)
        if longest > 1:
            last = torch.tensor([b * longest + n - 1 for b, n in enumerate(lengths)], device=device)
            streams = streams[last]
        return streams

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """streams [T, h, D] -> logits [T, V], FP32."""
        return self.model.logits(streams)

    @torch.inference_mode()
    def fork(self, source: Sequence, target: Sequence) -> None:
        """Give a fork what it doesn't share with its source: the state, and the last block where it isn't full."""
        copy_slot(self.cache, source.slot, target.slot)
        if source.computed % BLOCK_TOKENS:
            copy_block(self.cache, source.table[source.computed // BLOCK_TOKENS], target.table[-1])
