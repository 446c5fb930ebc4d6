"""What the APIs share: the served model, the check of its name, and the way a reply goes out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request

from upwell.server.errors import ModelNotFoundError
from upwell.server.record import RequestRecord
from upwell.server.responders import Reply, Responder
from upwell.server.wire import ClientGone, EventStream, watching

T = TypeVar("T")


class Service:
    """A responder under its names."""

    def __init__(self, responder: Responder, names: tuple[str, ...], keep_prompts: bool = False) -> None:
        self.responder, self.names, self.keep_prompts = responder, names, keep_prompts
        self.created = int(time.time())

    @property
    def name(self) -> str:
        return self.names[0]

    def begin(self, request: Request, model: str | None, stream: bool = False, prompt: Any = None) -> RequestRecord:
        """The request's record, filled in. Raises ModelNotFoundError. No model named means the one there is."""
        record: RequestRecord = request.scope["state"]["record"]
        record.model, record.stream = model or self.name, stream
        if self.keep_prompts:
            record.prompt = prompt
        if model is not None and model not in self.names:
            raise ModelNotFoundError(f"no model {model!r} here", f"this server has {', '.join(map(repr, self.names))}")
        return record


async def whole(request: Request, replies: list[Reply], make: Callable[[], Awaitable[T]]) -> T:
    """The finished answer of `make`. When the client goes, the replies end at once. Raises ClientGone."""
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        for reply in replies:
            reply.abandon()

    async with watching(request.receive, leave):
        answer = await make()
    if gone:
        request.scope["state"]["record"].gone = True
        raise ClientGone
    return answer


def stream(replies: list[Reply], events: AsyncGenerator[bytes, None]) -> EventStream:
    """The answer as server-sent events."""

    def leave() -> None:
        for reply in replies:
            reply.abandon()

    return EventStream(events, leave)
