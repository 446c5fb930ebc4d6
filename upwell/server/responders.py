"""Who answers a chat: a model through the engine's thread, or, for the embedded model, one fixed line."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from upwell.chat import ReplyParser, encode_messages
from upwell.chat.embedded import NANO_NOTICE
from upwell.chat.parsing import Content, Event
from upwell.engine import LLM, Delta, EngineThread, TokenLogprob
from upwell.engine.outputs import FinishReason
from upwell.server.schemas import ChatRequest


@dataclass(frozen=True)
class Piece:
    """Part of choice `index` of a reply."""

    index: int
    events: tuple[Event, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass
class Reply:
    """A reply under way. Leaving `pieces` early (aclose) cancels what still runs."""

    prompt_tokens: int
    pieces: AsyncGenerator[Piece, None]


class Responder(Protocol):
    def respond(self, request: ChatRequest) -> Reply:
        """Check the request (InputError) and start answering it."""

    def token_text(self, token_id: int) -> bytes:
        """The bytes of a token, for logprobs."""

    @property
    def is_healthy(self) -> bool: ...

    def close(self) -> None:
        """Finish what runs and take nothing new."""


class ModelResponder:
    """Any V4 checkpoint."""

    def __init__(self, llm: LLM) -> None:
        self._tokenizer = llm.tokenizer
        self._thread = EngineThread(llm.engine)

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive

    def close(self) -> None:
        self._thread.stop()

    def token_text(self, token_id: int) -> bytes:
        return self._tokenizer.bytes_of(token_id)

    def respond(self, request: ChatRequest) -> Reply:
        tools = request.offered_tools
        prompt = encode_messages(request.messages, thinking=request.thinking, tools=tools)
        ids = self._tokenizer.encode(prompt)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Delta] = asyncio.Queue()

        def sink(delta: Delta) -> None:
            # The engine's thread hands over to the event loop's; a loop that has closed has no one waiting.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.put_nowait, delta)

        params = request.sampling()
        running = self._thread.engine.request(ids, params, sink, prompt=prompt)
        self._thread.submit(running)

        async def pieces() -> AsyncGenerator[Piece, None]:
            parsers = [ReplyParser(request.thinking != "off", bool(tools)) for _ in range(params.n)]
            left = params.n
            try:
                while left:
                    delta = await arrived.get()
                    if delta.error is not None:
                        raise delta.error
                    parser = parsers[delta.index]
                    events = parser.push(delta.text)
                    if delta.finish_reason is not None:
                        events += parser.finish()
                        left -= 1
                    yield Piece(
                        delta.index, tuple(events), len(delta.token_ids), delta.logprobs, delta.finish_reason
                    )
            finally:
                self._thread.cancel(running)

        return Reply(len(ids), pieces())


class NanoResponder:
    """upwell-nano doesn't chat: it says so, in as many tokens as nothing was generated."""

    is_healthy = True

    def close(self) -> None:
        """Nothing runs."""

    def token_text(self, token_id: int) -> bytes:
        return b""

    def respond(self, request: ChatRequest) -> Reply:
        params = request.sampling()
        encode_messages(request.messages, tools=request.offered_tools)  # refuse what a model would refuse

        async def pieces() -> AsyncGenerator[Piece, None]:
            for index in range(params.n):
                yield Piece(index, (Content(NANO_NOTICE),), finish_reason="stop")

        return Reply(0, pieces())
