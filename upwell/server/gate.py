"""The first to see a request and the last to see its answer: limits, keys, and the record that logs are made of."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upwell.errors import InputError, ShuttingDownError, UpwellError
from upwell.server.errors import SlowRequestError, TooLargeError, error_response
from upwell.server.keys import KeyRing
from upwell.server.metrics import Metrics
from upwell.server.record import RecordSink, RequestRecord
from upwell.server.settings import ServerSettings

logger = logging.getLogger(__name__)


class Gate:
    """`around(app)` is an app behind this gate. `draining` refuses what is new; what runs goes on."""

    def __init__(
        self,
        settings: ServerSettings,
        keys: KeyRing | None = None,
        metrics: Metrics | None = None,
        sinks: Sequence[RecordSink] = (),
    ) -> None:
        self.settings, self.keys, self.metrics, self.sinks = settings, keys, metrics, sinks
        self.draining = False

    def around(self, app: ASGIApp) -> ASGIApp:
        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._pass(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return gated

    async def _pass(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        client = scope.get("client")
        record = RequestRecord(scope["method"], scope["path"], client[0] if client else "")
        record.traceparent = headers.get("traceparent")
        if self.metrics is not None:
            self.metrics.watch(record)
        scope.setdefault("state", {})["record"] = record

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            try:
                receive = await self._let_in(scope, headers, receive, record)
            except UpwellError as error:
                await error_response(error, scope["path"])(scope, receive, answer)
                return
            await app(scope, receive, answer)
        except Exception:
            if not record.status:
                record.status = 500  # outside of us it is answered so, and logged
                raise
            logger.exception("%s %s ended early", record.method, record.path)
        finally:
            self._finish(record)

    async def _let_in(self, scope: Scope, headers: Headers, receive: Receive, record: RequestRecord) -> Receive:
        """Check a request before it costs anything. Returns a receive() that has the whole body."""
        self._check_host(headers)
        if not self.settings.is_open(scope["path"]) and scope["method"] != "OPTIONS":
            if self.draining:
                raise ShuttingDownError("the server is shutting down and takes no new requests")
            if self.keys is not None:
                record.key = self.keys.find(_presented_key(headers))
                if scope["method"] == "POST":
                    record.key.admit()
        if scope["path"] in self.settings.streamed_paths:
            return receive
        body = await self._read_body(headers, receive)
        given = False

        async def whole() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return whole

    def _check_host(self, headers: Headers) -> None:
        allowed = self.settings.allowed_hosts
        name = headers.get("host", "").rpartition("]")[0].lstrip("[") or headers.get("host", "").partition(":")[0]
        if allowed is not None and name.lower() not in allowed:
            known = ", ".join(allowed)
            raise InputError(f"host is {name!r}, this server is called {known}", "start it with --insecure")

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        most = self.settings.max_body
        said = headers.get("content-length", "")
        if said.isdigit() and int(said) > most:
            raise TooLargeError(f"the body has {said} bytes, more than the {most} this server takes")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return b""  # gone before its body was whole: the app will see that, too
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise TooLargeError(f"the body has more than the {most} bytes this server takes")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            limit = self.settings.body_timeout
            raise SlowRequestError(f"the body didn't come within {limit:g} s") from None

    def _finish(self, record: RequestRecord) -> None:
        record.latency = time.monotonic() - record.started
        if record.gone:
            record.status = 499  # as nginx logs a client that left
        if record.key is not None:
            record.key.spend(record.prompt_tokens + record.completion_tokens)
        for sink in (*([] if self.metrics is None else [self.metrics]), *self.sinks):
            try:
                sink(record)
            except Exception:
                logger.exception("a request's record was lost")


def _presented_key(headers: Headers) -> str | None:
    """OpenAI's clients send a bearer token, Anthropic's x-api-key."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")
