"""Who runs in the next step, and with which blocks.

By arrival: a waiting sequence is admitted when a slot and the blocks for all its tokens are free. Every step decodes
one token of each running sequence and computes one chunk of prompt tokens beside it. A running sequence takes blocks
as it grows; when none is free, the latest arrival gives its own up and is computed again later. The oldest is never
robbed and fits the pool alone, so every step gets something done.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

from upwell.engine.blocks import Pool, blocks_for
from upwell.engine.outputs import FinishReason
from upwell.engine.sequence import Sequence, Status


@dataclass
class Batch:
    """One step: sequences that decode, and (sequence, number of tokens) that prefill."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)


class Scheduler:
    """Owns slots, blocks and both queues, each in order of arrival."""

    def __init__(self, blocks: int, slots: int, chunk: int) -> None:
        self.blocks, self.slots, self.chunk = Pool(blocks), Pool(slots), chunk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.arrival)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence in any state; its blocks and slot are free at once."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self._evict(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def schedule(self) -> Batch:
        self._grow()
        self._admit()
        decode = [s for s in self.running if s.status is Status.DECODE]
        return Batch(decode, self._prefill(s for s in self.running if s.status is Status.PREFILL))

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """`tokens` more of the sequence are in the cache."""
        sequence.computed += tokens
        if sequence.computed == len(sequence):
            sequence.status = Status.DECODE

    def _admit(self) -> None:
        while self.waiting and self.slots.free:
            first = self.waiting[0]
            need = blocks_for(len(first))
            if need > self.blocks.free:
                return  # no overtaking: a long prompt would never get its turn
            self.waiting.pop(0)
            (first.slot,) = self.slots.take(1)
            first.table = self.blocks.take(need)
            first.status = Status.PREFILL
            bisect.insort(self.running, first, key=lambda s: s.arrival)

    def _grow(self) -> None:
        """Give every decoding sequence room for its next token, oldest first."""
        for sequence in list(self.running):
            if sequence.status is not Status.DECODE or blocks_for(len(sequence)) <= len(sequence.table):
                continue
            while not self.blocks.free:
                victim = self.running[-1]
                self._evict(victim)
                victim.status = Status.WAITING
                self.add(victim)
                if victim is sequence:
                    break
            if sequence.status is Status.DECODE:
                sequence.table += self.blocks.take(1)

    def _evict(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.give_back(sequence.table)
        self.slots.give_back([sequence.slot])
        sequence.table, sequence.slot, sequence.computed = [], -1, 0

    def _prefill(self, sequences: Iterable[Sequence]) -> list[tuple[Sequence, int]]:
        """As many sequences as fit a chunk when padded to the longest of them."""
        batch: list[tuple[Sequence, int]] = []
        longest = 0
        for sequence in sequences:
            tokens = min(len(sequence) - sequence.computed, self.chunk)
            longest = max(longest, tokens)
            if batch and (len(batch) + 1) * longest > self.chunk:
                break
            batch.append((sequence, tokens))
        return batch
