"""Who runs in the next step, and with which blocks.

By priority, then by arrival: a waiting sequence is admitted when a slot and the blocks for all its tokens are free, or
can be had from running ones of lower priority. Every step decodes one token of each running sequence and computes some
prompt tokens beside it. A running sequence takes blocks as it grows; when none is free, the last in order gives its own
up and is computed again later. The first is never robbed and fits the pool alone, so every step gets something done.

A prompt whose beginning another one is computing waits for that: it goes on from the prefix cache, or, where all of
the prompt is the same (n > 1), as a fork that shares the full blocks.
"""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass, field

from upwell.config import BLOCK_TOKENS
from upwell.engine.blocks import Pool, blocks_for
from upwell.engine.budget import ChunkBudget
from upwell.engine.outputs import FinishReason
from upwell.engine.prefix import PrefixCache, next_cut
from upwell.engine.sequence import Sequence, Status


@dataclass
class Batch:
    """One step: sequences that decode, (sequence, number of tokens) that prefill, and those whose prompt is restored
    whole: nothing to compute before their first token."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    restored: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns slots, blocks and both queues, each in order. `chunk`: prompt tokens a step when nothing decodes.

    `ragged`: the model computes prompts of different lengths together without padding them.
    """

    def __init__(
        self, blocks: int, slots: int, chunk: int, prefix: PrefixCache | None = None, ragged: bool = False
    ) -> None:
        self.blocks, self.slots, self.chunk, self.prefix = Pool(blocks), Pool(slots), chunk, prefix
        self.ragged = ragged
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queried = self.prefix_hits = 0  # prompt tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence in any state; its blocks and slot are free at once."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self._evict(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def schedule(self, budget: ChunkBudget) -> Batch:
        """The next step."""
        self._grow()
        self._admit()
        decode = [s for s in self.running if s.status is Status.DECODE]
        prompts = [s for s in self.running if s.status is Status.PREFILL]
        tokens = min(self.chunk, budget.tokens(len(decode), len(prompts))) if decode and prompts else self.chunk
        fresh = [s for s in prompts if s.restored is None]
        return Batch(decode, self._prefill(fresh, tokens), [s for s in prompts if s.restored is not None])

    def computed(self, sequence: Sequence, tokens: int) -> bool:
        """`tokens` more of the sequence are in the cache. Returns whether all of them are now."""
        sequence.computed += tokens
        through = sequence.computed == len(sequence)
        if through:
            sequence.status = Status.DECODE
        return through

    def fork(self, leader: Sequence) -> list[Sequence]:
        """Admit those that wait for exactly the prompt that `leader` has just computed: they share its full blocks.

        Their state and last partial block are for the caller to copy. Whoever finds no room is left to wait, and no
        one overtakes.
        """
        forks: list[Sequence] = []
        full = len(leader) // BLOCK_TOKENS
        own = blocks_for(len(leader)) - full
        for sequence in list(self.waiting):
            if not _same_prompt(sequence, leader):
                if self._pays_to_wait(sequence):
                    continue
                break
            if not self.slots.free or own > self.blocks.free:
                break
            table = self.blocks.share(leader.table[:full]) + self.blocks.take(own)
            self._start(sequence, table)
            sequence.computed, sequence.status = leader.computed, Status.DECODE
            self._count_prefix(sequence)
            forks.append(sequence)
        return forks

    def _admit(self) -> None:
        for first in list(self.waiting):
            if first.status is not Status.WAITING or self._pays_to_wait(first):
                continue
            need = blocks_for(len(first))
            if not self._make_room(first, need):
                return  # no overtaking: a long prompt would never get its turn
            self._start(first, self.blocks.take(need))
            if self.prefix is not None:
                first.computed, first.restored = self.prefix.restore(first.keys, first.slot, first.table)
                self._count_prefix(first)

    def _start(self, sequence: Sequence, table: list[int]) -> None:
        self.waiting.remove(sequence)
        if sequence.request.scheduled_at is None:
            sequence.request.scheduled_at = time.monotonic()
        (sequence.slot,) = self.slots.take(1)
        sequence.table, sequence.status = table, Status.PREFILL
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def _count_prefix(self, sequence: Sequence) -> None:
        if not sequence.output:  # a preempted one was counted when it came
            self.prefix_queried += len(sequence)
            self.prefix_hits += sequence.computed

    def _pays_to_wait(self, sequence: Sequence) -> bool:
        """Someone is computing a longer beginning of this sequence than the prefix cache has."""
        for other in self.running:
            if other.status is not Status.PREFILL or other.order > sequence.order:
                continue  # one that comes later may be kept from getting on
            if _same_prompt(sequence, other):
                return True
            if self.prefix is not None:
                shared = sequence.keys.shared(other.keys)
                if shared > other.computed and shared > self.prefix.match(sequence.keys):
                    return True
        return False

    def _make_room(self, first: Sequence, need: int) -> bool:
        """See that a slot and `need` blocks are free, at the cost of running sequences of lower priority."""
        lower = [s for s in self.running if s.request.priority > first.request.priority]
        if need > self.blocks.free + sum(len(s.table) for s in lower) or not (self.slots.free or lower):
            return False
        while (need > self.blocks.free or not self.slots.free) and lower:
            self.preempt(lower.pop())
        return need <= self.blocks.free and self.slots.free > 0

    def _grow(self) -> None:
        """Give every decoding sequence room for its next token, first in order first."""
        for sequence in list(self.running):
            if sequence.status is not Status.DECODE or sequence.computed < len(sequence.table) * BLOCK_TOKENS:
                continue
            while not self.blocks.free and sequence.status is Status.DECODE:
                self.preempt(self.running[-1])
            if sequence.status is Status.DECODE:
                sequence.table += self.blocks.take(1)

    def preempt(self, sequence: Sequence) -> None:
        """Give a running sequence's blocks up; it is computed again later."""
        self._evict(sequence)
        sequence.status = Status.WAITING
        self.add(sequence)
        self.preemptions += 1

    def _evict(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.give_back(sequence.table)
        self.slots.give_back([sequence.slot])
        sequence.table, sequence.slot, sequence.computed, sequence.restored = [], -1, 0, None

    def _prefill(self, prompts: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """As many as fit the budget (padded to the longest of them, unless ragged); each stops at its next cut."""
        batch: list[tuple[Sequence, int]] = []
        used = longest = 0
        for sequence in prompts:
            tokens = min(len(sequence) - sequence.computed, budget - used if self.ragged else budget)
            if self.prefix is not None:
                tokens = min(tokens, next_cut(sequence.computed) - sequence.computed)
            used, longest = used + tokens, max(longest, tokens)
            if tokens <= 0 or (batch and not self.ragged and (len(batch) + 1) * longest > budget):
                break
            batch.append((sequence, tokens))
        return batch


def _same_prompt(a: Sequence, b: Sequence) -> bool:
    """Neither has output, and the prompts are equal."""
    return len(a) == len(b) and not a.output and not b.output and a.keys.whole == b.keys.whole
