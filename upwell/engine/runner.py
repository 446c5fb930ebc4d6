"""Runs the model over a batch of sequences against the cache, and gives the logits that sampling needs."""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.engine.graphs import DecodeGraphs
from upwell.engine.sequence import Sequence
from upwell.model import KVCache, Step, Transformer


class Runner:
    """Owns model and cache. Each call extends the cache by the tokens it is given. `graphs`: decode by graphs."""

    def __init__(self, model: Transformer, blocks: int, slots: int, graphs: bool = False) -> None:
        self.model = model
        self.cache = KVCache(model.config, blocks, slots, model.dtype, model.device)
        self.graphs = DecodeGraphs(model, self.cache) if graphs else None

    @torch.inference_mode()
    def run(self, batch: list[tuple[Sequence, int]]) -> Tensor:
        """The next n tokens of each (sequence, n) -> logits [B, V] after the last of them, FP32."""
        device = self.model.device
        lengths = [n for _, n in batch]
        longest = max(lengths)
        rows = [s.tokens(s.computed, s.computed + n) + [0] * (longest - n) for s, n in batch]
        step = Step(
            [s.slot for s, _ in batch], [s.computed for s, _ in batch], lengths, [s.table for s, _ in batch], device
        )
        if self.graphs is not None and step.is_decode:
            return self.model.logits(self.graphs.streams([row[0] for row in rows], step))
        streams = self.model.streams(torch.tensor(rows, device=device), self.cache, step)
        if longest > 1:
            last = torch.tensor([b * longest + n - 1 for b, n in enumerate(lengths)], device=device)
            streams = streams[last]
        return self.model.logits(streams)
