"""Deltas on their way to an event loop: at once, or a stretch together, and never lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from upwell.engine import Delta
from upwell.engine.mailbox import Inbox, PostOffice
from upwell.errors import EngineError


class Steps:
    """An engine's thread as far as a post office knows it: couriers to call when a step begins to compute."""

    def __init__(self) -> None:
        self.couriers: list[Callable[[], None]] = []

    async def step(self) -> None:
        for courier in self.couriers:
            courier()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def office(steps: Steps, interval: float) -> tuple[PostOffice, SimpleNamespace]:
    """With a clock that the test sets."""
    made: Any = PostOffice(steps, asyncio.get_running_loop(), interval)  # type: ignore[arg-type]
    clock = SimpleNamespace(now=100.0)
    real = made.loop
    made.loop = SimpleNamespace(time=lambda: clock.now, call_soon_threadsafe=real.call_soon_threadsafe)
    return made, clock


def token(k: int, index: int = 0, **rest: Any) -> Delta:
    return Delta(index, f"{k} ", (k,), **rest)


def test_a_stretch_of_tokens_comes_together_after_the_first() -> None:
    async def run() -> None:
        steps, inbox = Steps(), Inbox()
        post, clock = office(steps, 0.05)
        send = post.sink(inbox)
        send(token(1))
        await steps.step()
        assert await inbox.take() == [token(1)]
        waiting = asyncio.create_task(inbox.take())
        for k in (2, 3):
            clock.now += 0.02
            send(token(k))
            await steps.step()
        assert not waiting.done()
        clock.now += 0.02
        await steps.step()  # a step that gave this request nothing
        assert waiting.done() and waiting.result() == [Delta(0, "2 3 ", (2, 3))]
        send(token(4))
        send(token(5, 1))
        send(token(6, finish_reason="stop"))
        await steps.step()  # the last doesn't wait; completions stay apart
        assert await inbox.take() == [token(4), token(5, 1), token(6, finish_reason="stop")]

    asyncio.run(run())


def test_without_an_interval_every_step_is_handed_on_and_an_error_stands_alone() -> None:
    async def run() -> None:
        steps, inbox = Steps(), Inbox()
        post, _ = office(steps, 0.0)
        send = post.sink(inbox)
        for k in range(3):
            send(token(k))
            await steps.step()
            assert await inbox.take() == [token(k)]
        failed = Delta(0, finish_reason="error", error=EngineError("it broke"))
        send(token(3))
        send(failed)
        await steps.step()
        assert await inbox.take() == [token(3), failed]

    asyncio.run(run())
