"""Priorities, deadlines, the bounded queue, drain, asyncio, and the budget that keeps prompts from stalling others."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
from typing import Any

import pytest
import torch
from tiny_v4 import VOCAB, build_llm, build_model

from upwell import LLM, SamplingParams
from upwell.engine import AsyncLLM, Delta, Engine, EngineThread
from upwell.engine.budget import LEAST, STRETCH, ChunkBudget
from upwell.engine.sequence import Request
from upwell.errors import DeadlineError, EngineError, InputError, QueueFullError, ShuttingDownError

LONG = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


def few(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def engine_of(**options: int) -> Engine:
    return Engine(build_model(), None, **{"max_num_seqs": 1, "cache_tokens": 1024, **options})


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


class Log:
    """Who ended in which order."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ended, self.deltas = engine, [], []  # type: ignore[var-annotated]

    def add(self, name: str, priority: int = 0, max_tokens: int = 3, length: int = 5) -> None:
        def sink(delta: Delta) -> None:
            self.deltas.append((name, delta))
            if delta.finish_reason is not None:
                self.ended.append(name)

        self.engine.add(self.engine.request(ids(length, len(name)), few(max_tokens), sink, priority=priority))


def test_lower_priority_numbers_go_first_and_equals_by_arrival() -> None:
    log = Log(engine_of())
    for name, priority in (("a", 0), ("b2", 2), ("c1", 1), ("d0", 0), ("e1", 1), ("f-1", -1)):
        log.add(name, priority)
    finish(log.engine)
    assert log.ended == ["f-1", "a", "d0", "c1", "e1", "b2"]


def test_an_urgent_request_takes_the_place_of_a_less_urgent_one_only() -> None:
    log = Log(engine_of(max_num_seqs=2))
    log.add("batch", 5, 40)
    log.add("normal", 0, 40)
    for _ in range(6):
        log.engine.step()
    log.add("equal", 0)
    log.add("urgent", -1)
    finish(log.engine)
    assert log.ended == ["urgent", "equal", "normal", "batch"]
    assert log.engine.stats().preemptions == 1
    tokens = [t for name, d in log.deltas if name == "batch" for t in d.token_ids]
    expected = build_llm().generate({"prompt_token_ids": ids(5, 5)}, few(40))[0].token_ids
    assert tokens == expected


def test_many_equal_requests_share_slots_fairly() -> None:
    log = Log(engine_of(max_num_seqs=2))
    for k in range(6):
        log.add("x" * (k + 1), max_tokens=4)
    finish(log.engine)
    assert log.ended == ["x" * (k + 1) for k in range(6)]


@pytest.mark.parametrize("waiting", [False, True])
def test_a_deadline_ends_a_request_and_names_itself(waiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("upwell.engine.engine.time.monotonic", lambda: now[0])
    engine = engine_of()
    other: list[Delta] = []
    deltas: list[Delta] = []
    if waiting:
        engine.add(engine.request(ids(9), few(30), other.append))
    engine.add(engine.request(ids(5), LONG, deltas.append, timeout=2.5))
    for _ in range(4):
        engine.step()
    now[0] += 2.4
    engine.step()
    assert engine.stats().running + engine.stats().waiting == 1 + waiting
    now[0] += 0.2
    engine.step()
    last = deltas[-1]
    assert last.finish_reason == "timeout" and isinstance(last.error, DeadlineError)
    expected = "before its first token" if waiting else "after 5 tokens"
    assert last.error.message == f"the deadline of 2.5 s passed {expected}"
    finish(engine)
    assert engine.stats().blocks_free == engine.stats().blocks_total and engine.stats().waiting == 0
    assert not waiting or other[-1].finish_reason == "length"


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "3"])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(InputError, match="timeout is"):
        engine_of().request([1], LONG, print, timeout=timeout)
    with pytest.raises(InputError, match=r"priority is 1\.5"):
        engine_of().request([1], LONG, print, priority=1.5)  # type: ignore[arg-type]


def test_a_full_queue_refuses_at_once() -> None:
    engine = engine_of(max_queue=1)
    thread = EngineThread(engine)
    ended = threading.Event()
    requests = [engine.request(ids(5, k), LONG, lambda d: None) for k in range(3)]
    tail = engine.request(ids(4), few(2), lambda d: ended.set() if d.finish_reason else None)
    thread.submit(requests[0])
    thread.submit(requests[1])
    with pytest.raises(QueueFullError, match="1 requests run and 1 wait"):
        thread.submit(requests[2])
    thread.cancel(requests[0])
    thread.cancel(requests[1])
    while engine.stats().running + engine.stats().waiting:
        pass
    thread.submit(tail)
    assert ended.wait(60)
    thread.stop()
    assert engine.stats().waiting == 0


def test_stop_drains_and_then_ends_what_is_left() -> None:
    engine = build_llm(max_num_seqs=1, cache_tokens=8192).engine
    thread = EngineThread(engine)
    short: list[Delta] = []
    endless: list[Delta] = []
    thread.submit(engine.request(ids(5), few(3), short.append))
    thread.submit(engine.request(ids(6), LONG, endless.append))
    while not endless:
        pass
    thread.stop(timeout=0.01)
    assert not thread.is_alive and short[-1].finish_reason == "length"
    assert endless[-1].finish_reason == "error" and isinstance(endless[-1].error, ShuttingDownError)
    assert engine.stats().blocks_free == engine.stats().blocks_total
    with pytest.raises(ShuttingDownError):
        thread.submit(engine.request(ids(5), few(3), short.append))


def test_a_cancel_frees_blocks_before_the_next_step() -> None:
    engine = engine_of()
    request = engine.request(ids(600), LONG, lambda delta: None)
    engine.add(request)
    engine.step()
    assert engine.stats().blocks_free == 1
    engine.cancel(request)
    assert engine.stats().blocks_free == 4 and not engine.has_work


def test_a_sink_that_cancels_its_own_request_is_counted_once() -> None:
    engine = engine_of(max_num_seqs=1, max_queue=0)
    requests: list[Request] = []
    for _ in range(3):
        requests.append(engine.request(ids(5), few(5), lambda delta: engine.cancel(requests[-1])))
        engine.add(requests[-1])
        engine.step()
        assert not engine.has_work
    engine.add(engine.request(ids(5), few(5), lambda delta: None))
    with pytest.raises(QueueFullError):
        engine.add(engine.request(ids(5), few(5), lambda delta: None))


def test_a_failing_sink_ends_its_own_request_only() -> None:
    engine = engine_of(max_num_seqs=2)

    def broken(delta: Delta) -> None:
        raise RuntimeError("a client went away")

    fine: list[Delta] = []
    engine.add(engine.request(ids(5), few(5), broken))
    engine.add(engine.request(ids(6), few(5), fine.append))
    finish(engine)
    assert fine[-1].finish_reason == "length" and len(fine) == 5
    assert engine.stats().blocks_free == 4


def test_stats_count_tokens() -> None:
    llm = build_llm(max_num_seqs=2, cache_tokens=2048)
    llm.generate([{"prompt_token_ids": ids(300)}, {"prompt_token_ids": ids(20)}], few(7))
    llm.generate({"prompt_token_ids": ids(300)}, few(2))
    stats = llm.engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (620, 16)
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (620, 300)
    assert (stats.running, stats.waiting, stats.blocks_total, stats.blocks_free) == (0, 0, 8, 8)


def test_asyncio() -> None:
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=12, ignore_eos=True, n=2)
    expected = build_llm().generate("hello", params)[0]

    async def use(llm: LLM) -> None:
        async with AsyncLLM(llm) as shared:
            outputs = await asyncio.gather(*(shared.generate("hello", params) for _ in range(3)))
            assert all(o.outputs == expected.outputs for o in outputs)
            text = ""
            async for delta in shared.stream("hello", params):
                text += delta.text if delta.index == 0 else ""
            assert text == expected.text
            chat = await shared.chat([{"role": "user", "content": "hi"}], few(3))
            assert chat.token_ids == build_llm().chat([{"role": "user", "content": "hi"}], few(3)).token_ids
            task = asyncio.create_task(shared.generate("x", LONG))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(DeadlineError):
                await shared.generate("x", LONG, timeout=0.05)
            with pytest.raises(InputError):
                await shared.generate({"prompt_token_ids": []})
        assert not shared.thread.is_alive and llm.engine.stats().running == 0
        with pytest.raises(ShuttingDownError):
            await shared.generate("hello")

    asyncio.run(use(build_llm(max_num_seqs=8, cache_tokens=16384)))


def test_the_prompt_budget_holds_the_stretch() -> None:
    """Against a machine whose steps take 2 ms, 1 ms more a decoded sequence and 0.1 ms more a prompt token."""
    budget, noise = ChunkBudget(512), random.Random(0)
    stretch, most_stretch = STRETCH

    def alone(decoding: int) -> float:
        return 0.002 + 0.001 * decoding

    def step(decoding: int, most: int = 512, slow: float = 1.0) -> float:
        """How many times as long as decoding alone it takes."""
        tokens = min(most, budget.tokens(decoding)) if decoding else most
        seconds = alone(decoding) + 0.0001 * tokens
        budget.measured(decoding, tokens, seconds * slow * noise.uniform(0.9, 1.1))
        return seconds / alone(decoding)

    assert budget.tokens(1) == LEAST, "nothing is known"
    step(0)  # prompts alone
    assert budget.tokens(1) == LEAST, "whether decoding takes any time isn't known"
    grown = [step(decoding) for decoding in range(1, 17) for _ in range(4)]
    assert max(grown) < stretch + 1 and min(grown[8:]) > stretch - 1, "it never stops for a step to measure"
    for _ in range(1000):
        step(16, most=0)
    assert budget.tokens(16) == pytest.approx((stretch - 1) * alone(16) / 0.0001, rel=0.15), "what prompts take is kept"
    before = budget.tokens(16)
    step(16, slow=100)
    assert budget.tokens(16) >= before / 2, "a hiccup"
    settled = [step(decoding) for decoding in (16, 9, 3) for _ in range(25)]
    assert sum(x > stretch + 1 for x in settled) <= 3 and min(settled[10:]) > 1.5
    assert statistics.median(settled) == pytest.approx(stretch, rel=0.15)
    assert budget.tokens(16, 16) == budget.tokens(16), "as many wait as read: half the time is theirs"
    share = (budget.tokens(3, 9) + 1) / (budget.tokens(3, 3) + 1)
    assert share == pytest.approx((3 * stretch - 1) / (stretch - 1), rel=0.1), "three times as many wait"
    assert budget.tokens(3, 500) == budget.tokens(3, round(3 * most_stretch / stretch)), "however many wait"
    for _ in range(100):  # prompts become slow
        budget.measured(16, budget.tokens(16), 0.4)
        budget.measured(16, 0, alone(16))
    assert budget.tokens(16) == LEAST, "a prompt must get on"
    assert ChunkBudget(4).tokens(1) == 4


@pytest.mark.parametrize("ragged", [True, False])
def test_a_prompt_is_cut_finer_while_others_decode(ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(max_num_seqs=2, cache_tokens=4096)
    engine.runner.computes_ragged = ragged
    decoding = engine.request(ids(5), few(60), lambda delta: None)
    engine.add(decoding)
    engine.step()
    runs: list[list[int]] = []
    extend = engine.runner._extend
    monkeypatch.setattr(engine.runner, "_extend", lambda who, tokens, only_last: (
        runs.append([len(t) for t in tokens]), extend(who, tokens, only_last))[1])  # fmt: skip
    engine.add(engine.request(ids(900, 1), few(1), lambda delta: None))
    engine.step()
    assert runs == ([[1, LEAST]] if ragged else [[1], [LEAST]])
    engine.cancel(decoding)
    engine.step()
    assert runs[-1] == [256 - LEAST], "nobody waits: to the next cut"


@pytest.mark.parametrize("where", ["fork", "logits"])
def test_an_error_of_the_model_reaches_forks_too(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(max_num_seqs=4)
    ends: list[Delta] = []
    for _ in range(2):  # forks of the same request, and one of another
        engine.add(engine.request(ids(5), SamplingParams(n=2), ends.append))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, where, lambda *given: 1 / 0)
        for _ in range(8):
            engine.step()
    finish(engine)
    reasons = [d.finish_reason for d in ends if d.finish_reason is not None]
    assert len(reasons) == 4 and reasons.count("error") == (4 if where == "logits" else 0), "no one needs a fork"
    assert all(isinstance(d.error, EngineError) for d in ends if d.finish_reason == "error")
    assert engine.stats().blocks_free == 4 and engine.stats().waiting == 0


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_that_breaks_the_model_ends_alone(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four share a step that fails by the fault of one, at its prompt or in the middle of its output."""
    params = few(12)
    for at in (0, 5):
        engine = engine_of(max_num_seqs=4, cache_tokens=4096, speculative_tokens=drafts)
        extend = engine.runner._extend
        outputs: list[list[int]] = [[] for _ in range(4)]
        ends: dict[int, Delta] = {}

        def sink(k: int, outputs: list[list[int]] = outputs, ends: dict[int, Delta] = ends) -> Any:
            def take(delta: Delta) -> None:
                outputs[k] += delta.token_ids
                if delta.finish_reason is not None:
                    assert k not in ends
                    ends[k] = delta

            return take

        requests = [engine.request(ids(20 + k, k), params, sink(k)) for k in range(4)]

        def breaking(
            who: Any, tokens: Any, only_last: bool, extend: Any = extend, bad: Any = requests[2], at: int = at
        ) -> torch.Tensor:
            if any(s.request is bad and len(s.output) >= at for s in who):
                raise RuntimeError("its fault")
            return extend(who, tokens, only_last)  # type: ignore[no-any-return]

        monkeypatch.setattr(engine.runner, "_extend", breaking)
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
        assert isinstance(ends[2].error, EngineError) and "its fault" in str(ends[2].error)
        for k in (0, 1, 3):
            assert ends[k].finish_reason == "length"
            assert outputs[k] == build_llm().generate({"prompt_token_ids": ids(20 + k, k)}, params)[0].token_ids
        assert engine.stats().blocks_free == engine.stats().blocks_total
