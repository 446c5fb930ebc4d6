"""Runs the model over a batch of sequences against the cache, and gives the streams and logits that sampling needs.

Its caller, the engine's step, is in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.engine.graphs import DecodeGraphs
from upwell.engine.sequence import Sequence, Status
from upwell.model import Step, Transformer
from upwell.model.snapshot import copy_block, copy_slot


class Runner:
    """Owns model and cache. Each call extends the cache by the tokens it is given. `graphs`: decode by graphs."""

    def __init__(self, model: Transformer, blocks: int, slots: int, graphs: bool = False) -> None:
        self.model, self.device = model, model.device
        self.cache = model.new_cache(blocks, slots)
        self.graphs = DecodeGraphs(model, self.cache) if graphs else None
        self.computes_ragged = model.computes_ragged
        self.reader: Callable[[Sequence, int, Tensor], None] | None = None  # is shown prompts' streams

    def streams(self, batch: list[tuple[Sequence, int]]) -> Tensor:
        """The next n tokens of each (sequence, n) -> streams [B, h, D] after the last of them."""
        sequences, lengths = [s for s, _ in batch], [n for _, n in batch]
        tokens = [
            s.output[-1:] if s.status is Status.DECODE else s.tokens(s.computed, s.computed + n) for s, n in batch
        ]
        # Where MTP has fallen behind, what follows the prompt isn't for it.
        reads = self.reader is not None and any(s.unread is not None or s.status is Status.PREFILL for s in sequences)
        streams = self._extend(sequences, tokens, only_last=not reads)
        if reads:
            assert self.reader is not None
            parts = streams.split(lengths)
            for sequence, rows in zip(sequences, parts, strict=True):
                self.reader(sequence, sequence.computed, rows)
            streams = torch.cat([rows[-1:] for rows in parts])
        return streams

    def verify(self, sequences: list[Sequence], drafts: list[list[int]]) -> Tensor:
        """Each sequence's last token and its drafted ones -> streams [T, h, D], one sequence after another."""
        return self._extend(sequences, [[s.output[-1], *tokens] for s, tokens in zip(sequences, drafts, strict=True)])

    def _extend(self, sequences: list[Sequence], tokens: list[list[int]], only_last: bool = False) -> Tensor:
        """Compute these tokens of each sequence -> streams [T, h, D], one sequence after another, or those after its
        last token [B, h, D]."""
        device = self.device
        # By way of numpy: for a few numbers torch.tensor takes as long as one of nano's layers.
        ids = torch.from_numpy(np.array([[token for row in tokens for token in row]], dtype=np.int64)).to(device)
        slots, starts = [s.slot for s in sequences], [s.computed for s in sequences]
        step = Step(slots, starts, [len(row) for row in tokens], [s.table for s in sequences], device)
        if self.graphs is not None and step.is_decode:
            return self.graphs.streams([row[0] for row in tokens], step)
        return self.model.streams(ids, self.cache, step, only_last)

    def logits(self, streams: Tensor) -> Tensor:
        """streams [T, h, D] -> logits [T, V], FP32."""
        return self.model.logits(streams)

    def fork(self, source: Sequence, target: Sequence) -> None:
        """Give a fork what it doesn't share with its source: the state, and the last block where it isn't full."""
        copy_slot(self.cache, source.slot, target.slot)
        target.unread = source.unread
        if source.computed % BLOCK_TOKENS:
            copy_block(self.cache, source.table[source.computed // BLOCK_TOKENS], target.table[-1])
