"""The engine under load: many requests at once against the same one after another, and what a long prompt that joins
does to those who read along; as vLLM's bench does."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from upwell.bench.record import quantile
from upwell.engine import Delta, Engine, SamplingParams
from upwell.engine.budget import LEAST
from upwell.model import Transformer


@dataclass(frozen=True)
class Load:
    """Requests of mixed lengths: prompts and completions, drawn evenly on a logarithmic scale between two bounds.

    The default is the shape of a chat: on average 143 tokens in and 108 out.
    """

    requests: int = 64
    prompt: tuple[int, int] = (16, 512)
    output: tuple[int, int] = (32, 256)
    joining: int = 4096  # tokens of the prompt that joins; 0 leaves that part out
    readers: int = 8  # who decode when it does
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter  # or time.thread_time, where others use the machine too


@dataclass
class Reader:
    """When one request's tokens came, by `clock`."""

    clock: Callable[[], float]
    submitted: float = 0.0
    times: list[float] = field(default_factory=list)
    finished: bool = False

    def sink(self, delta: Delta) -> None:
        if delta.error is not None:
            raise delta.error
        now = self.clock()
        self.times += [now] * len(delta.token_ids)
        self.finished = delta.finish_reason is not None

    @property
    def gaps(self) -> list[float]:
        """Seconds between what arrived one after another; tokens that came together are one arrival."""
        arrivals = list(dict.fromkeys(self.times))
        return [b - a for a, b in pairwise(arrivals)]


def serve(model: Transformer, load: Load, rounds: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows: throughput, one after another and together, then times to first and between tokens."""
    rng = random.Random(load.seed)

    def length(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(2, model.config.vocab_size) for _ in range(tokens)]

    work = [(prompt(length(*load.prompt)), length(*load.output)) for _ in range(load.requests)]
    tokens = sum(output for _, output in work)
    space = max(len(p) + o for p, o in work) * min(load.requests, 64) + 4 * (load.joining + 1024)
    speeds: dict[str, list[float]] = {"one after another": [], "together": []}
    together: list[Reader] = []
    _all_at_once(_engine(model, space, load), work[:2])  # warms up
    for round_ in range(rounds):
        report(f"round {round_ + 1} of {rounds}")
        for name in speeds:
            engine = _engine(model, space, load)
            began = load.clock()
            together = [
                reader for part in ([work] if name == "together" else [[item] for item in work])
                for reader in _all_at_once(engine, part)
            ]  # fmt: skip
            speeds[name].append(tokens / (load.clock() - began))
    rows: list[dict[str, Any]] = [
        {"name": name, "requests": load.requests, "tokens": tokens, "samples": samples,
         "tokens_per_second": statistics.median(samples)}
        for name, samples in speeds.items()
    ]  # fmt: skip
    rows[1]["ratios"] = [b / a for a, b in zip(*speeds.values(), strict=True)]
    rows[1]["ratio"] = statistics.median(rows[1]["ratios"])
    rows.append(_times("time to first token", [r.times[0] - r.submitted for r in together]))
    rows.append(_times("between tokens", [gap for r in together for gap in r.gaps]))
    if load.joining:
        report(f"a prompt of {load.joining} joins {load.readers} readers")
        rows += _joining(model, space, load, prompt)
    return rows


def _engine(model: Transformer, tokens: int, load: Load) -> Engine:
    # Random prompts share no prefix; speculation has a benchmark of its own.
    engine = Engine(model, max_num_seqs=64, cache_tokens=tokens, enable_prefix_caching=False, speculative_tokens=0)
    engine.clock = load.clock
    return engine


def _submit(engine: Engine, prompt: list[int], output: int) -> Reader:
    reader = Reader(engine.clock)
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    request = engine.request(prompt, params, reader.sink)
    reader.submitted = engine.clock()
    engine.add(request)
    return reader


def _all_at_once(engine: Engine, work: list[tuple[list[int], int]]) -> list[Reader]:
    readers = [_submit(engine, prompt, output) for prompt, output in work]
    while engine.has_work:
        engine.step()
    return readers


def _joining(
    model: Transformer, space: int, load: Load, prompt: Callable[[int], list[int]]
) -> list[dict[str, Any]]:  # fmt: skip
    """Gaps of those who decode, before a long prompt is there and until its first token."""
    engine = _engine(model, space, load)
    steps = 64 + load.joining // LEAST + 64  # before, the slowest way through the long prompt, and some more
    readers = [_submit(engine, prompt(load.prompt[0]), steps) for _ in range(load.readers)]
    while min(len(r.times) for r in readers) < 64:
        engine.step()
    known = [len(r.gaps) for r in readers]
    before = [gap for r in readers for gap in r.gaps[16:]]
    joined = _submit(engine, prompt(load.joining), 1)
    while not joined.times:
        engine.step()
    during = [gap for r, n in zip(readers, known, strict=True) for gap in r.gaps[n:]]
    while engine.has_work:
        engine.step()
    rows = [_times("between tokens, before", before), _times("between tokens, while it joins", during)]
    rows[1]["p99_over_median_before"] = rows[1]["p99"] / rows[0]["p50"]
    rows[1]["p99_over_median"] = rows[1]["p99"] / rows[1]["p50"]
    rows[1]["first_token_of_joining"] = joined.times[0] - joined.submitted
    return rows


def _times(name: str, seconds: list[float]) -> dict[str, Any]:
    return {"name": name, "count": len(seconds), "p50": quantile(seconds, 0.5), "p99": quantile(seconds, 0.99),
            "most": max(seconds)}  # fmt: skip
