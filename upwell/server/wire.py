"""JSON on the wire, server-sent events, and knowing at once that a client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SEND_TIMEOUT = 60.0  # seconds that a client may read nothing of what waits for it


def dump(body: Any) -> bytes:
    """JSON as UTF-8. Half a surrogate pair, which a model's call may hold, is escaped: UTF-8 has no form for it."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
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

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with watching(receive, leave), contextlib.aclosing(self._events) as events:
                async for chunk in events:
                    async with asyncio.timeout(SEND_TIMEOUT):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            leave()
            scope.get("upwell.abort", _nothing)()  # closing would wait for the reader
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _nothing() -> None:
    """No connection to abort: the app isn't behind our own HTTP protocol."""
