"""What is known of one request, from its first byte to its last: the audit log, metrics and traces are made of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from upwell.chat.parsing import Reasoning
from upwell.server.keys import Key
from upwell.server.responders import Piece, Reply


@dataclass
class RequestRecord:
    """Times are seconds; `at` of the calendar (Unix), the others of the monotonic clock."""

    method: str
    path: str
    client: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)
    key: Key | None = None
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's
    scheduled: float | None = None  # when it left the engine's queue
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    status: int = 0
    latency: float = 0.0
    gone: bool = False  # the client left before the end
    prompt: Any = None  # kept only where it is asked for
    traceparent: str | None = None
    on_interval: Callable[[float], None] | None = None  # mean seconds between a piece's tokens

    async def count(self, reply: Reply) -> AsyncGenerator[list[Piece], None]:
        """The reply's pieces as they come, counted; leaving early ends the reply."""
        self.prompt_tokens += reply.prompt_tokens
        last: dict[int, float] = {}
        async with aclosing(reply.pieces) as arrivals:
            async for pieces in arrivals:
                now = time.monotonic()
                if self.scheduled is None:
                    self.scheduled = reply.scheduled()
                for piece in pieces:
                    if piece.tokens:
                        self._count(piece, now, last.get(piece.index))
                        last[piece.index] = piece.at
                    if piece.finish_reason is not None:
                        self.finish_reasons.append(piece.finish_reason)
                yield pieces

    def _count(self, piece: Piece, now: float, before: float | None) -> None:
        if self.first_token is None:
            self.first_token = now
        since, intervals = (piece.since, piece.tokens - 1) if before is None else (before, piece.tokens)
        if self.on_interval is not None and intervals and piece.at > since:  # what is made at once has none
            self.on_interval((piece.at - since) / intervals)
        self.completion_tokens += piece.tokens
        # A piece with the last of the reasoning and the first of the answer counts for the answer.
        if piece.events and all(isinstance(part, Reasoning) for part in piece.events):
            self.reasoning_tokens += piece.tokens


async def each(arrivals: AsyncGenerator[list[Piece], None]) -> AsyncGenerator[Piece, None]:
    """The pieces one by one."""
    async with aclosing(arrivals):
        async for pieces in arrivals:
            for piece in pieces:
                yield piece


class RecordSink(Protocol):
    """Where finished records go."""

    def __call__(self, record: RequestRecord) -> None: ...
