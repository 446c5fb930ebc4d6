"""A reply in the shapes of OpenAI's chat completions: one object, or server-sent chunks."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from upwell.chat.parsing import Content, Event, Reasoning, ToolCall
from upwell.engine import TokenLogprob
from upwell.errors import UpwellError
from upwell.server.errors import error_object
from upwell.server.responders import Piece, Reply, Responder
from upwell.server.schemas import ChatRequest


class Completion:
    """What all parts of one answer share, and how a piece becomes JSON."""

    def __init__(self, request: ChatRequest, reply: Reply, responder: Responder) -> None:
        self.request, self.reply, self.responder = request, reply, responder
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.completion_tokens = 0

    async def whole(self) -> dict[str, Any]:
        """The finished answer. Raises what generation raised."""
        choices: dict[int, dict[str, Any]] = {}
        async for piece in self._pieces():
            choice = choices.setdefault(piece.index, self._empty_choice(piece.index))
            message = choice["message"]
            for event in piece.events:
                if isinstance(event, Reasoning):
                    message["reasoning_content"] = message.get("reasoning_content", "") + event.text
                elif isinstance(event, Content):
                    message["content"] += event.text
                else:
                    message.setdefault("tool_calls", []).append(_tool_call(event))
            if choice["logprobs"] is not None:
                choice["logprobs"]["content"] += self._logprobs(piece.logprobs)
            if piece.finish_reason is not None:
                called = "tool_calls" in message
                choice["finish_reason"] = _finish_reason(piece.finish_reason, called)
                if called and not message["content"]:
                    message["content"] = None
        ordered = [choices[index] for index in sorted(choices)]
        return self._frame("chat.completion", ordered) | {"usage": self._usage()}

    async def chunks(self) -> AsyncIterator[str]:
        """Server-sent events, the last one [DONE]. An error on the way is an event of its own."""
        started: set[int] = set()
        called: set[int] = set()
        try:
            async for piece in self._pieces():
                for choice in self._chunk_choices(piece, started, called):
                    yield self._event([choice])
            if self.request.stream_options is not None and self.request.stream_options.include_usage:
                yield self._event([], self._usage())
        except UpwellError as error:
            yield f"data: {json.dumps(error_object(error))}\n\n"
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[Piece]:
        """The reply's pieces, counted; leaving early ends the reply at once."""
        async with contextlib.aclosing(self.reply.pieces) as pieces:
            async for piece in pieces:
                self.completion_tokens += piece.tokens
                yield piece

    def _chunk_choices(self, piece: Piece, started: set[int], called: set[int]) -> list[dict[str, Any]]:
        deltas = [_delta(event) for event in piece.events]
        if piece.index not in started:
            started.add(piece.index)
            deltas.insert(0, {"role": "assistant", "content": ""})
        if any(isinstance(event, ToolCall) for event in piece.events):
            called.add(piece.index)

        def choice(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": reason}

        choices = [choice(delta) for delta in deltas]
        if piece.finish_reason is not None:
            choices.append(choice({}, _finish_reason(piece.finish_reason, piece.index in called)))
        if piece.logprobs:
            # They may come before their text does: it may be held back.
            if not choices:
                choices.append(choice({}))
            choices[-1]["logprobs"] = {"content": self._logprobs(piece.logprobs)}
        return choices

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        body = self._frame("chat.completion.chunk", choices)
        if usage is not None:
            body["usage"] = usage
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }

    def _empty_choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": ""},
            "logprobs": {"content": []} if self.request.logprobs else None,
            "finish_reason": None,
        }

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.reply.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
        return [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in entry.top]}
            for entry in logprobs
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.responder.token_text(token_id)
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(raw)}


def _delta(event: Event) -> dict[str, Any]:
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text}
    if isinstance(event, Content):
        return {"content": event.text}
    return {"tool_calls": [{"index": event.index, **_tool_call(event)}]}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _finish_reason(reason: str, called: bool) -> str:
    if reason == "stop":
        return "tool_calls" if called else "stop"
    return reason
