"""JSON on the wire, server-sent events, and knowing at once that a client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SEND_TIMEOUT = 60.0  # seconds that a client may read nothing of what waits for it


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_HOLE = "\ue000text\ue000"


def dump(body: Any) -> bytes:
    """JSON as UTF-8. Half a surrogate pair, which a model's call may hold, is escaped: UTF-8 has no form for it."""
    try:
        return _encode(body).encode()
    except UnicodeEncodeError:
        return json.dumps(body, separators=(",", ":")).encode()


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump(content)


def event(body: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dump(body) + b"\n\n"


class TextEvents:
    """Events that differ in one text alone. `make(text)` gives the event's body; it is called once."""

    def __init__(self, make: Callable[[str], Any], name: str | None = None) -> None:
        self._before, _, self._after = event(make(_HOLE), name).partition(dump(_HOLE))

    def __call__(self, text: str) -> bytes:
        return self._before + dump(text) + self._after


class ClientGone(Exception):
    """The client closed its connection before its answer was whole."""


@contextlib.asynccontextmanager
async def watching(receive: Receive, on_gone: Callable[[], None]) -> AsyncIterator[None]:
    """Calls `on_gone` as soon as the client of a request, whose body was read, closes the connection."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    watcher = asyncio.create_task(wait())
    try:
        yield
    finally:
        watcher.cancel()


class EventStream(Response):
    """A streamed answer. When the client goes, or stops reading, `abandon` ends what makes the events."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], abandon: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._abandon = events, abandon

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope["state"]["record"]

        def leave() -> None:
            record.gone = True
            self._abandon()

        loop = asyncio.get_running_loop()
        since = math.inf  # when the send under way began

        def look() -> None:
            """A timer for each event would cost more than the event."""
            if loop.time() - since > SEND_TIMEOUT:
                late.reschedule(loop.time())
            else:
                timers.append(loop.call_later(SEND_TIMEOUT / 4, look))

        timers = deque([loop.call_later(SEND_TIMEOUT / 4, look)], maxlen=1)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with (
                asyncio.timeout(None) as late,
                watching(receive, leave),
                contextlib.aclosing(self._events) as events,
            ):
                async for chunk in events:
                    since = loop.time()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    since = math.inf
        except TimeoutError:
            leave()
            scope.get("upwell.abort", _nothing)()  # closing would wait for the reader
        finally:
            timers[0].cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _nothing() -> None:
    """No connection to abort: the app isn't behind our own HTTP protocol."""
