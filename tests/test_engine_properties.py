"""Truth under load: random arrivals, cancels, deadlines and priorities against a tiny pool, and a simple model of it.

The model knows each prompt's greedy continuation from a lone run, and which requests are open. After every step each
block is held by exactly as many sequences as hold it in the pool's count; at the end nothing is held, every request has
ended exactly once, and what it said is what the lone run said, however often it was preempted or forked.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_v4 import VOCAB, build_llm, build_model

from upwell import SamplingParams
from upwell.engine import Delta, Engine
from upwell.engine.blocks import blocks_for
from upwell.engine.sequence import Request, Status
from upwell.errors import DeadlineError, QueueFullError
from upwell.model import Transformer

SLOTS, BLOCKS, MOST = 3, 4, 9


@cache
def model() -> Transformer:
    return build_model()


def prompt(which: int) -> list[int]:
    """Some that grow over a block's end at once, some that begin alike, some short."""
    stem = torch.randint(2, VOCAB, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    alike = [stem[:252], stem[:256], [*stem[:256], 9, 8, 7], [*stem[:260], 5], stem[:520]]
    return [*alike, stem[5:20], [4], stem[3:512]][which]


@cache
def alone(which: int) -> list[int]:
    llm = build_llm(max_num_seqs=1, cache_tokens=1024, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=MOST, ignore_eos=True)
    return llm.generate({"prompt_token_ids": prompt(which)}, params)[0].token_ids


class Watched:
    """A request and what its sink saw, by completion."""

    def __init__(self, which: int, n: int, max_tokens: int) -> None:
        self.which, self.n, self.max_tokens = which, n, max_tokens
        self.tokens: dict[int, list[int]] = {i: [] for i in range(n)}
        self.ends: dict[int, list[str]] = {i: [] for i in range(n)}
        self.request: Request | None = None
        self.cancelled = self.late = False

    def sink(self, delta: Delta) -> None:
        assert not self.ends[delta.index], "something came after the end"
        self.tokens[delta.index] += delta.token_ids
        if delta.finish_reason is not None:
            self.ends[delta.index].append(delta.finish_reason)
        assert (delta.finish_reason == "timeout") == isinstance(delta.error, DeadlineError)

    @property
    def open(self) -> int:
        return sum(not ends for ends in self.ends.values())

    def check(self) -> None:
        for index, tokens in self.tokens.items():
            assert tokens == alone(self.which)[: len(tokens)], f"prompt {self.which}"
            (reason,) = self.ends[index]
            if reason == "length":
                assert len(tokens) == self.max_tokens
            else:
                assert {"abort": self.cancelled, "timeout": self.late}[reason]


class Load(RuleBasedStateMachine):
    @initialize(
        caching=st.sampled_from(["off", "memory", "tiny", "disk"]),
        max_queue=st.sampled_from([None, 2, 5]),
        chunk=st.sampled_from([100, 512]),
    )
    def start(self, caching: str, max_queue: int | None, chunk: int) -> None:
        self.folder = TemporaryDirectory()
        self.engine = Engine(
            model(), None, SLOTS, BLOCKS * 256, chunk, max_queue, enable_prefix_caching=caching != "off",
            prefix_cache_bytes=300_000 if caching == "tiny" else 1 << 30,
            prefix_cache_dir=Path(self.folder.name) if caching == "disk" else None,
        )  # fmt: skip
        self.all: list[Watched] = []

    @rule(
        which=st.integers(0, 7), n=st.sampled_from([1, 1, 1, 3]), max_tokens=st.integers(1, MOST),
        priority=st.sampled_from([0, 0, 0, 1, -1]), timeout=st.sampled_from([None, None, 1000.0]),
    )  # fmt: skip
    def submit(self, which: int, n: int, max_tokens: int, priority: int, timeout: float | None) -> None:
        engine, watched = self.engine, Watched(which, n, max_tokens)
        params = SamplingParams(temperature=0.0, n=n, max_tokens=max_tokens, ignore_eos=True)
        watched.request = engine.request(prompt(which), params, watched.sink, priority=priority, timeout=timeout)
        full = engine.max_queue is not None and sum(w.open for w in self.all) >= SLOTS + engine.max_queue
        try:
            engine.add(watched.request)
            assert not full
            self.all.append(watched)
        except QueueFullError:
            assert full

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.blocks_are_counted()

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        watched = data.draw(st.sampled_from(self.all))
        watched.cancelled = watched.cancelled or watched.open > 0
        self.engine.cancel(watched.request)
        assert watched.open == 0

    @precondition(lambda self: any(w.request.deadline for w in self.all))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        watched = data.draw(st.sampled_from([w for w in self.all if w.request.deadline]))
        watched.late = watched.late or watched.open > 0
        watched.request.deadline = 0.0
        self.engine.step()
        assert watched.open == 0

    @invariant()
    def blocks_are_counted(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        held = Counter(b for s in scheduler.running for b in s.table)
        assert scheduler.blocks.holders == [held[b] for b in range(BLOCKS)]
        assert scheduler.blocks.free == sum(not held[b] for b in range(BLOCKS))
        slots = [s.slot for s in scheduler.running]
        assert len(slots) == len(set(slots)) == SLOTS - scheduler.slots.free
        for sequence in scheduler.running:
            assert len(set(sequence.table)) == len(sequence.table) >= blocks_for(sequence.computed)
            # Only blocks that no one writes any more may be shared.
            assert all(held[b] == 1 for b in sequence.table[sequence.computed // 256 :])
        assert all(not s.table and s.status is Status.WAITING for s in scheduler.waiting)
        for queue in (scheduler.running, scheduler.waiting):
            assert [s.order for s in queue] == sorted(s.order for s in queue)
        stats = self.engine.stats()
        assert stats.running + stats.waiting == sum(w.open for w in self.all)
        assert stats.generated_tokens == sum(len(t) for w in self.all for t in w.tokens.values())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.engine.step()
            self.blocks_are_counted()
        assert not self.engine.has_work and not self.engine._requests, "it doesn't come to an end"
        assert self.engine.scheduler.blocks.free == BLOCKS and self.engine.scheduler.slots.free == SLOTS
        for watched in self.all:
            watched.check()
        self.engine.close()
        self.folder.cleanup()


TestLoad = Load.TestCase
TestLoad.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
