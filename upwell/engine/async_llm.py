"""AsyncLLM: an LLM for asyncio. Its engine runs in a thread of its own; any number of tasks share it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypedDict, Unpack

from upwell.chat.encoding import Thinking
from upwell.engine.llm import LLM, Prompt
from upwell.engine.loop import EngineThread
from upwell.engine.mailbox import Inbox, PostOffice
from upwell.engine.outputs import Delta, RequestOutput
from upwell.engine.params import SamplingParams, TokenMask


class Limits(TypedDict, total=False):
    """`priority`: the lowest goes first. `timeout`: seconds; DeadlineError when they are over."""

    priority: int
    timeout: float | None


class AsyncLLM:
    """Takes an LLM over: `async with AsyncLLM(LLM(path)) as llm`. Leaving it finishes what runs.

    All methods take Limits too. A task that is cancelled, or closes its stream, cancels its request.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.thread = EngineThread(llm.engine)
        self._office: PostOffice | None = None

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, timeout: float = 30.0) -> None:
        """Take nothing more and finish what runs; after `timeout` seconds the rest ends with ShuttingDownError."""
        await asyncio.to_thread(self.thread.stop, timeout)

    def _post_office(self) -> PostOffice:
        loop = asyncio.get_running_loop()
        if self._office is None or self._office.loop is not loop:
            self._office = PostOffice(self.thread, loop)
        return self._office

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        token_mask: TokenMask | None = None,
        **limits: Unpack[Limits],
    ) -> AsyncGenerator[Delta, None]:
        """Complete one prompt, piece by piece. Raises what generate() raises, and QueueFullError."""
        params = params or SamplingParams()
        text, ids = self.llm.tokens(prompt)
        inbox = Inbox()
        sink = self._post_office().sink(inbox)
        request = self.thread.engine.request(ids, params, sink, text, token_mask, **limits)
        self.thread.submit(request)
        left = params.n
        try:
            while left:
                for delta in await inbox.take():
                    if delta.error is not None:
                        raise delta.error
                    left -= delta.finish_reason is not None
                    yield delta
        finally:
            self.thread.cancel(request)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        token_mask: TokenMask | None = None,
        **limits: Unpack[Limits],
    ) -> RequestOutput:
        """Complete one prompt. To complete many at once, gather."""
        params = params or SamplingParams()
        text, ids = self.llm.tokens(prompt)
        output = RequestOutput.empty(text, ids, params)
        stream = self.stream({"prompt": text, "prompt_token_ids": ids}, params, token_mask, **limits)
        async with contextlib.aclosing(stream):
            async for delta in stream:
                output.outputs[delta.index].add(delta)
        return output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        thinking: Thinking = "off",
        tools: Sequence[Mapping[str, Any]] = (),
        **limits: Unpack[Limits],
    ) -> RequestOutput:
        """Answer a conversation of OpenAI-style messages. The text is the raw reply: chat.parsing takes it apart."""
        return await self.generate(self.llm.chat_prompt(messages, thinking, tools), params, **limits)
