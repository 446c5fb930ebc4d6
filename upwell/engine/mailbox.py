"""From the engine's thread to the event loop: what a step gives to all requests crosses with one wake-up.

The wake-up comes when the engine's thread begins to compute: the loop then has Python's lock to itself, where right
after sampling the two would take it from each other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from upwell.engine.loop import EngineThread
from upwell.engine.outputs import Delta
from upwell.engine.sequence import Sink


class Inbox:
    """One request's deltas, taken by the event loop. close() ends the wait of whoever takes."""

    def __init__(self) -> None:
        self._items: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    async def take(self) -> list[Delta]:
        """All that has come since the last call, at least one; nothing once closed."""
        while not self._items and not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return [] if self._closed else items

    def put(self, delta: Delta) -> None:
        self._items.append(delta)
        self._wake()

    def close(self) -> None:
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class PostOffice:
    """Carries deltas from an engine's thread to the inboxes of one event loop."""

    def __init__(self, thread: EngineThread, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._arrived: deque[tuple[Inbox, Delta]] = deque()
        self._called = False
        thread.couriers.append(self._wake)

    def sink(self, inbox: Inbox) -> Sink:
        """A sink for the engine's thread."""

        def send(delta: Delta) -> None:
            self._arrived.append((inbox, delta))

        return send

    def _wake(self) -> None:
        if self._arrived and not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has closed: no one waits
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the last look: what comes from here on calls again
        while self._arrived:
            inbox, delta = self._arrived.popleft()
            inbox.put(delta)
