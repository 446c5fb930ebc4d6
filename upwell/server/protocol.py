"""uvicorn's HTTP protocol with the limits it lacks: on the size of a head, and on the time it takes to come."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD = 32 * 1024  # bytes of request line and headers
HEAD_TIMEOUT = 10.0  # seconds


class LimitedProtocol(HttpToolsProtocol):
    """One connection. An app may call scope["upwell.abort"] to drop a client that doesn't read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0  # bytes of a head that isn't whole yet
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        in_head = self._late is not None
        super().data_received(data)
        if in_head and self._late is not None and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse(431, b"the request's head is too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._late is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_came()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD:
            self._refuse(431, b"the request's head is too large")
            return
        super().on_headers_complete()
        self.scope["upwell.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:  # a refused request has none
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is not None:
            super().on_message_complete()

    def _expect_head(self) -> None:
        self._head = 0
        self._late = self.loop.call_later(HEAD_TIMEOUT, self._refuse, 408, b"the request's head didn't come in time")

    def _head_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: int, message: bytes) -> None:
        self._head_came()
        if not self.transport.is_closing():
            head = b"content-type: text/plain\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(message)
            self.transport.write(STATUS_LINE[status] + head + message)
            self.transport.close()
