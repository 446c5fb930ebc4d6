"""POST /v1/completions: text or tokens, continued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from upwell.chat.parsing import Content
from upwell.engine import TokenLogprob
from upwell.errors import InputError, UpwellError
from upwell.server.errors import error_object
from upwell.server.openai_chat import DONE, finish_reason, usage_of
from upwell.server.openai_schemas import CompletionRequest
from upwell.server.record import RequestRecord
from upwell.server.responders import Piece, Reply
from upwell.server.service import Service, stream, whole
from upwell.server.wire import JSON, TextEvents, event

MAX_PROMPTS = 64


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        record = service.begin(request, body.model, body.stream, body.prompt)
        prompts = body.prompts()
        if len(prompts) > MAX_PROMPTS:
            raise InputError(f"prompt has {len(prompts)} entries, at most {MAX_PROMPTS} are taken")
        params = body.params()
        replies: list[Reply] = []
        try:
            for prompt in prompts:
                replies.append(service.responder.complete(prompt, params))
        except UpwellError:
            for reply in replies:
                reply.abandon()
            raise
        completion = _Completion(body, replies, prompts, service, record)
        if body.stream:
            return stream(replies, completion.chunks())
        return JSON(await whole(request, replies, completion.whole))

    return routes


class _Completion:
    """Several prompts' replies; choice k * n + i is the i-th of prompt k."""

    def __init__(
        self, body: CompletionRequest, replies: list[Reply], prompts: list[str | list[int]], service: Service,
        record: RequestRecord,
    ) -> None:  # fmt: skip
        self.body, self.replies, self.service, self.record = body, replies, service, record
        self.id = f"cmpl-{record.id}"
        self.created = int(time.time())
        self.n = body.n or 1
        decode = service.responder.decode
        self.echoes = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts if body.echo]
        self.offsets = [0] * (self.n * len(replies))  # where a choice's next token begins in its text
        self._texts: dict[int, TextEvents] = {}

    async def whole(self) -> dict[str, Any]:
        choices = [self._choice(k) for k in range(len(self.offsets))]
        for k in range(len(self.offsets)):
            choices[k]["text"] = self.echoes[k // self.n] if self.body.echo else ""
        async for first, pieces in self._pieces():
            for piece in pieces:
                self._add(first + piece.index, piece, choices[first + piece.index])
        return self._frame(choices) | {"usage": usage_of(self.record)}

    def _add(self, index: int, piece: Piece, choice: dict[str, Any]) -> None:
        choice["text"] += _text(piece)
        if choice["logprobs"] is not None:
            for name, values in self._logprobs(index, piece.logprobs).items():
                choice["logprobs"][name] += values
        if piece.finish_reason is not None:
            choice["finish_reason"] = finish_reason(piece.finish_reason, False)
            choice["stop_reason"] = piece.stop

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options
        try:
            if self.body.echo:
                for k in range(len(self.offsets)):
                    yield event(self._frame([self._choice(k, self.echoes[k // self.n])]))
            async for first, pieces in self._pieces():
                yield b"".join(self._event(first + piece.index, piece) for piece in pieces)
            if options is not None and options.include_usage:
                yield event(self._frame([]) | {"usage": usage_of(self.record)})
        except UpwellError as error:
            self.record.finish_reasons.append("error")
            yield event(error_object(error))
        yield DONE

    def _event(self, index: int, piece: Piece) -> bytes:
        running = self.body.stream_options is not None and self.body.stream_options.continuous_usage_stats
        if piece.finish_reason is None and self.body.logprobs is None and not running:  # most of them
            if index not in self._texts:
                self._texts[index] = TextEvents(lambda text: self._frame([self._choice(index, text)]))
            return self._texts[index](_text(piece))
        frame = self._frame([self._choice(index, _text(piece), piece)])
        return event(frame | ({"usage": usage_of(self.record)} if running else {}))

    async def _pieces(self) -> AsyncGenerator[tuple[int, list[Piece]], None]:
        """The pieces of all replies as they come, with the index of their prompt's first choice."""
        if len(self.replies) == 1:
            async for pieces in self.record.count(self.replies[0]):
                yield 0, pieces
            return
        arrived: asyncio.Queue[tuple[int, list[Piece]] | UpwellError | None] = asyncio.Queue()

        async def forward(k: int, reply: Reply) -> None:
            try:
                async for pieces in self.record.count(reply):
                    arrived.put_nowait((k * self.n, pieces))
                arrived.put_nowait(None)
            except UpwellError as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(forward(k, reply)) for k, reply in enumerate(self.replies)]
        try:
            left = len(tasks)
            while left:
                item = await arrived.get()
                if isinstance(item, UpwellError):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.service.name,
                "choices": choices}  # fmt: skip

    def _choice(self, index: int, text: str = "", piece: Piece | None = None) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs(index, piece.logprobs if piece is not None else ())
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if piece is not None and piece.finish_reason is not None:
            choice |= {"finish_reason": finish_reason(piece.finish_reason, False), "stop_reason": piece.stop}
        return choice

    def _logprobs(self, index: int, logprobs: tuple[TokenLogprob, ...]) -> dict[str, list[Any]]:
        """OpenAI's older shape: parallel lists, and offsets into the text."""
        shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def text(token_id: int) -> str:
            return self.service.responder.token_text(token_id).decode("utf-8", errors="replace")

        for entry in logprobs:
            token = text(entry.token_id)
            shape["tokens"].append(token)
            shape["token_logprobs"].append(max(entry.logprob, -9999.0))
            shape["top_logprobs"].append({text(i): max(value, -9999.0) for i, value in entry.top})
            shape["text_offset"].append(self.offsets[index])
            self.offsets[index] += len(token)
        return shape


def _text(piece: Piece) -> str:
    return "".join(part.text for part in piece.events if isinstance(part, Content))
