"""Runs the model over a batch of sequences against the cache, and gives the streams and logits that sampling needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.engine.sequence import Sequence
from upwell.model import KVCache, Step, Transformer
from upwell.model.snapshot import copy_block, copy_slot


class Runner:
    """Owns model and cache. Each call extends the cache by the tokens it is given."""

    def __init__(self, model: Transformer, blocks: int, slots: int) -> None:
        self.model = model
        self.cache = KVCache(model.config, blocks, slots, model.dtype, model.device)
        self.reader: Callable[[Sequence, int, Tensor], None] | None = None  # is shown prompts' streams

    @torch.inference_mode()
    def streams(self, batch: list[tuple[Sequence, int]]) -> Tensor:
        """The next n tokens of each (sequence, n) -> streams [B, h, D] after the last of them."""
        device, lengths = self.model.device, [n for _, n in batch]
        longest = max(lengths)
        streams = self._extend([s for s, _ in batch], [s.tokens(s.computed, s.computed + n) for s, n in batch])
        if self.reader is not None:
            for (sequence, n), rows in zip(batch, streams.split(longest), strict=True):
                self.reader(sequence, sequence.computed, rows[:n])
        if longest > 1:
            last = torch.tensor([b * longest + n - 1 for b, n in enumerate(lengths)], device=device)
            streams = streams[last]
        return streams

    @torch.inference_mode()
    def verify(self, sequences: list[Sequence], drafts: list[list[int]]) -> list[Tensor]:
        """Each sequence's last token and its drafted ones -> streams [1 + drafted, h, D] of each sequence."""
        rows = [[s.output[-1], *tokens] for s, tokens in zip(sequences, drafts, strict=True)]
        streams = self._extend(sequences, rows)
        return [part[: len(row)] for part, row in zip(streams.split(max(map(len, rows))), rows, strict=True)]

    def _extend(self, sequences: list[Sequence], tokens: list[list[int]]) -> Tensor:
        """Compute these tokens of each sequence, padded to the longest -> streams [B * longest, h, D]."""
        device, lengths = self.model.device, [len(row) for row in tokens]
        longest = max(lengths)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)
        slots, starts = [s.slot for s in sequences], [s.computed for s in sequences]
        return self.model.streams(ids, self.cache, Step(slots, starts, lengths, [s.table for s in sequences], device))

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """streams [T, h, D] -> logits [T, V], FP32."""
        return self.model.logits(streams)

    @torch.inference_mode()
    def fork(self, source: Sequence, target: Sequence) -> None:
        """Give a fork what it doesn't share with its source: the state, and the last block where it isn't full."""
        copy_slot(self.cache, source.slot, target.slot)
        target.unread = source.unread
        if source.computed % BLOCK_TOKENS:
            copy_block(self.cache, source.table[source.computed // BLOCK_TOKENS], target.table[-1])
