"""Anthropic's API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from upwell.chat.parsing import Content, Event, Reasoning, ToolCall
from upwell.errors import UpwellError
from upwell.server.anthropic_schemas import CountRequest, MessagesRequest
from upwell.server.errors import error_object
from upwell.server.record import RequestRecord, each
from upwell.server.responders import Piece, Reply
from upwell.server.service import Service, stream, whole
from upwell.server.wire import JSON, event

PATH = "/v1/messages"


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post(PATH)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        asked = [message.model_dump(exclude_none=True) for message in body.messages] if service.keep_prompts else None
        record = service.begin(request, body.model, body.stream, asked)
        reply = service.responder.chat(body.conversation(), body.params())
        message = _Message(service.name, reply, record)
        if body.stream:
            return stream([reply], message.events())
        return JSON(await whole(request, [reply], message.whole))

    @routes.post(f"{PATH}/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        service.begin(request, body.model)
        return JSON({"input_tokens": len(service.responder.prompt_tokens(body.conversation()))})

    return routes


class _Message:
    """One answer: a list of blocks, each of one kind."""

    def __init__(self, model: str, reply: Reply, record: RequestRecord) -> None:
        self.model, self.reply, self.record = model, reply, record
        self.called = False

    async def whole(self) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        ended: Piece | None = None
        async for piece in each(self.record.count(self.reply)):
            for part in piece.events:
                if isinstance(part, ToolCall):
                    blocks.append(self._start(part) | {"input": json.loads(part.arguments)})
                    continue
                field = "thinking" if isinstance(part, Reasoning) else "text"
                if not blocks or field not in blocks[-1]:
                    blocks.append(self._start(part))
                blocks[-1][field] += part.text
            if piece.finish_reason is not None:
                ended = piece
        reason, sequence = self._stop(ended)
        return self._frame(self.reply.prompt_tokens, self.record.completion_tokens) | {
            "content": blocks, "stop_reason": reason, "stop_sequence": sequence
        }  # fmt: skip

    async def events(self) -> AsyncGenerator[bytes, None]:
        """message_start, each block's start, deltas and stop, message_delta, message_stop."""
        start = self._frame(self.reply.prompt_tokens, 0)
        yield event({"type": "message_start", "message": start}, "message_start")
        index, open_kind = -1, None  # of the block under way
        ended: Piece | None = None
        try:
            async for piece in each(self.record.count(self.reply)):
                for part in piece.events:
                    if type(part) is not open_kind or isinstance(part, ToolCall):
                        if open_kind is not None:
                            yield _block_end(index)
                        index, open_kind = index + 1, type(part)
                        begun = {"type": "content_block_start", "index": index, "content_block": self._start(part)}
                        yield event(begun, "content_block_start")
                    delta = {"type": "content_block_delta", "index": index, "delta": _delta(part)}
                    yield event(delta, "content_block_delta")
                if piece.finish_reason is not None:
                    ended = piece
        except UpwellError as error:
            self.record.finish_reasons.append("error")
            yield event(error_object(error, PATH), "error")
            return
        if open_kind is not None:
            yield _block_end(index)
        reason, sequence = self._stop(ended)
        usage = {"input_tokens": self.reply.prompt_tokens, "output_tokens": self.record.completion_tokens}
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _frame(self, prompt: int, completion: int) -> dict[str, Any]:
        return {
            "id": f"msg_{self.record.id}", "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": prompt, "output_tokens": completion},
        }  # fmt: skip

    def _start(self, part: Event) -> dict[str, Any]:
        if isinstance(part, Reasoning):
            return {"type": "thinking", "thinking": "", "signature": ""}
        if isinstance(part, Content):
            return {"type": "text", "text": ""}
        self.called = True
        return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": part.name, "input": {}}

    def _stop(self, ended: Piece | None) -> tuple[str | None, str | None]:
        if ended is None:
            return None, None
        if ended.finish_reason == "stop":
            if ended.stop is not None:
                return "stop_sequence", ended.stop
            return ("tool_use" if self.called else "end_turn"), None
        return "max_tokens", None


def _block_end(index: int) -> bytes:
    return event({"type": "content_block_stop", "index": index}, "content_block_stop")


def _delta(part: Event) -> dict[str, Any]:
    if isinstance(part, Reasoning):
        return {"type": "thinking_delta", "thinking": part.text}
    if isinstance(part, Content):
        return {"type": "text_delta", "text": part.text}
    return {"type": "input_json_delta", "partial_json": part.arguments}
