"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from upwell.chat.parsing import Content, Event, Reasoning, ToolCall
from upwell.engine import TokenLogprob
from upwell.errors import UpwellError
from upwell.server.errors import error_object
from upwell.server.openai_schemas import ChatRequest
from upwell.server.record import RequestRecord
from upwell.server.responders import Piece, Reply
from upwell.server.service import Service, stream, whole
from upwell.server.wire import JSON, TextEvents, event

DONE = b"data: [DONE]\n\n"


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        record = service.begin(request, body.model, body.stream, body.messages)
        reply = service.responder.chat(body.conversation(), body.params())
        completion = _Completion(body, reply, service, record)
        if body.stream:
            return stream([reply], completion.chunks())
        return JSON(await whole(request, [reply], completion.whole))

    return routes


class _Completion:
    """What all parts of one answer share, and how a piece becomes JSON."""

    def __init__(self, body: ChatRequest, reply: Reply, service: Service, record: RequestRecord) -> None:
        self.body, self.reply, self.service, self.record = body, reply, service, record
        self.id = f"chatcmpl-{record.id}"
        self.created = int(time.time())
        self._texts: dict[int, TextEvents] = {}

    async def whole(self) -> dict[str, Any]:
        """The finished answer. Raises what generation raised."""
        choices = {index: self._empty_choice(index) for index in range(self.body.n or 1)}
        async for pieces in self.record.count(self.reply):
            for piece in pieces:
                self._add(piece, choices[piece.index])
        return self._frame("chat.completion", list(choices.values())) | {"usage": self._usage()}

    def _add(self, piece: Piece, choice: dict[str, Any]) -> None:
        message = choice["message"]
        for part in piece.events:
            if isinstance(part, Reasoning):
                message["reasoning_content"] = message.get("reasoning_content", "") + part.text
            elif isinstance(part, Content):
                message["content"] += part.text
            else:
                message.setdefault("tool_calls", []).append(_tool_call(part))
        if choice["logprobs"] is not None:
            choice["logprobs"]["content"] += logprob_entries(piece.logprobs, self.service)
        if piece.finish_reason is not None:
            called = "tool_calls" in message
            choice["finish_reason"] = finish_reason(piece.finish_reason, called)
            choice["stop_reason"] = piece.stop
            if called and not message["content"]:
                message["content"] = None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, the last one [DONE]. An error on the way is an event of its own."""
        started: set[int] = set()
        called: set[int] = set()
        options = self.body.stream_options
        try:
            async for pieces in self.record.count(self.reply):
                yield b"".join(part for piece in pieces for part in self._piece_events(piece, started, called))
            if options is not None and options.include_usage:
                yield self._event([], self._usage())
        except UpwellError as error:
            self.record.finish_reasons.append("error")
            yield event(error_object(error))
        yield DONE

    def _piece_events(self, piece: Piece, started: set[int], called: set[int]) -> list[bytes]:
        running = self.body.stream_options is not None and self.body.stream_options.continuous_usage_stats
        plain = piece.index in started and piece.finish_reason is None and not piece.logprobs and not running
        if plain and all(isinstance(part, Content) for part in piece.events):  # most of them
            return [self._text_event(piece.index)(part.text) for part in piece.events if isinstance(part, Content)]
        usage = self._usage() if running else None
        return [self._event([choice], usage) for choice in self._chunk_choices(piece, started, called)]

    def _text_event(self, index: int) -> TextEvents:
        if index not in self._texts:
            self._texts[index] = TextEvents(lambda text: self._chunk([_choice(index, {"content": text})]))
        return self._texts[index]

    def _chunk_choices(self, piece: Piece, started: set[int], called: set[int]) -> list[dict[str, Any]]:
        deltas = [_delta(part) for part in piece.events]
        if piece.index not in started:
            started.add(piece.index)
            deltas.insert(0, {"role": "assistant", "content": ""})
        if any(isinstance(part, ToolCall) for part in piece.events):
            called.add(piece.index)

        choices = [_choice(piece.index, delta) for delta in deltas]
        if piece.finish_reason is not None:
            last = _choice(piece.index, {}, finish_reason(piece.finish_reason, piece.index in called))
            choices.append(last | {"stop_reason": piece.stop})
        if piece.logprobs:
            # They may come before their text does: it may be held back.
            if not choices:
                choices.append(_choice(piece.index, {}))
            choices[-1]["logprobs"] = {"content": logprob_entries(piece.logprobs, self.service)}
        return choices

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        return event(self._chunk(choices) | ({} if usage is None else {"usage": usage}))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._frame("chat.completion.chunk", choices)

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name,
                "choices": choices}  # fmt: skip

    def _empty_choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": {"content": [], "refusal": None} if self.body.logprobs else None,
            "finish_reason": None,
        }

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.record)


def usage_of(record: RequestRecord) -> dict[str, Any]:
    prompt, completion = record.prompt_tokens, record.completion_tokens
    usage: dict[str, Any] = {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion
    }  # fmt: skip
    if record.reasoning_tokens:
        usage["completion_tokens_details"] = {"reasoning_tokens": record.reasoning_tokens}
    return usage


def logprob_entries(logprobs: tuple[TokenLogprob, ...], service: Service) -> list[dict[str, Any]]:
    """OpenAI's shape: the token, its logprob, its bytes, and the most likely ones."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        raw = service.responder.token_text(token_id)
        # JSON has no infinity: what a mask forbids is as unlikely as OpenAI's API says a token can be.
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return [
        token(entry.token_id, entry.logprob) | {"top_logprobs": [token(*pair) for pair in entry.top]}
        for entry in logprobs
    ]


def finish_reason(reason: str, called: bool) -> str:
    if reason == "stop":
        return "tool_calls" if called else "stop"
    return "length" if reason == "timeout" else reason


def _choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _delta(part: Event) -> dict[str, Any]:
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, Content):
        return {"content": part.text}
    return {"tool_calls": [{"index": part.index, **_tool_call(part)}]}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
