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
from upwell.server.wire import JSON, event

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

    async def whole(self) -> dict[str, Any]:
        """The finished answer. Raises what generation raised."""
        choices = {index: self._empty_choice(index) for index in range(self.body.n or 1)}
        async for piece in self.record.count(self.reply):
            choice = choices[piece.index]
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
        return self._frame("chat.completion", list(choices.values())) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, the last one [DONE]. An error on the way is an event of its own."""
        started: set[int] = set()
        called: set[int] = set()
        options = self.body.stream_options
        try:
            async for piece in self.record.count(self.reply):
                for choice in self._chunk_choices(piece, started, called):
                    usage = self._usage() if options is not None and options.continuous_usage_stats else None
                    yield self._event([choice], usage)
            if options is not None and options.include_usage:
                yield self._event([], self._usage())
        except UpwellError as error:
            self.record.finish_reasons.append("error")
            yield event(error_object(error))
        yield DONE

    def _chunk_choices(self, piece: Piece, started: set[int], called: set[int]) -> list[dict[str, Any]]:
        deltas = [_delta(part) for part in piece.events]
        if piece.index not in started:
            started.add(piece.index)
            deltas.insert(0, {"role": "assistant", "content": ""})
        if any(isinstance(part, ToolCall) for part in piece.events):
            called.add(piece.index)

        def choice(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": reason}

        choices = [choice(delta) for delta in deltas]
        if piece.finish_reason is not None:
            last = choice({}, finish_reason(piece.finish_reason, piece.index in called))
            choices.append(last | {"stop_reason": piece.stop})
        if piece.logprobs:
            # They may come before their text does: it may be held back.
            if not choices:
                choices.append(choice({}))
            choices[-1]["logprobs"] = {"content": logprob_entries(piece.logprobs, self.service)}
        return choices

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body = self._frame("chat.completion.chunk", choices)
        if usage is not None:
            body["usage"] = usage
        return event(body)

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


def _delta(part: Event) -> dict[str, Any]:
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, Content):
        return {"content": part.text}
    return {"tool_calls": [{"index": part.index, **_tool_call(part)}]}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
