"""From the engine's thread to the event loop: what a step gives to all requests crosses with one wake-up.

The wake-up comes when the engine's thread begins to compute: the loop then has Python's lock to itself, where right
after sampling the two would take it from each other. A request that is given more often than anyone can read waits for
a later step's wake-up: what it costs to hand on tokens is by the event, not by the token.
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
        self.due = 0.0  # by the loop's clock: what comes before waits, unless it is the last
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
        """Joined with the last one, if that waits still and is of the same completion; an error stands alone."""
        if self._items and self._items[-1].index == delta.index and delta.error is None:
            delta = self._items.pop().then(delta)
        self._items.append(delta)

    def close(self) -> None:
        self._closed = True
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class PostOffice:
    """Carries deltas from an engine's thread to the inboxes of one event loop, to each at most every `interval` seconds
    (but for its first and its last)."""

    def __init__(self, thread: EngineThread, loop: asyncio.AbstractEventLoop, interval: float = 0.0) -> None:
        self.loop, self.interval = loop, interval
        self._arrived: deque[tuple[Inbox, Delta]] = deque()
        self._held: dict[Inbox, None] = {}  # in order of arrival
        self._called = False
        thread.couriers.append(self._wake)

    def sink(self, inbox: Inbox) -> Sink:
        """A sink for the engine's thread."""

        def send(delta: Delta) -> None:
            self._arrived.append((inbox, delta))

        return send

    def _wake(self) -> None:
        if (self._arrived or self._held) and not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has closed: no one waits
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the last look: what comes from here on calls again
        now = self.loop.time()
        while self._arrived:
            inbox, delta = self._arrived.popleft()
            inbox.put(delta)
            self._held[inbox] = None
            if delta.finish_reason is not None:
                inbox.due = now
        # An engine with unfinished requests goes on stepping, so whoever is held here is looked at again.
        for inbox in [inbox for inbox in self._held if inbox.due <= now]:
            inbox.due = now + self.interval
            inbox.wake()
            del self._held[inbox]
