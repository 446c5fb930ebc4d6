"""POST /v1/responses: an answer as a list of items (reasoning, message, function calls), whole or as typed events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from upwell.chat.parsing import Content, Event, Reasoning, ToolCall
from upwell.errors import UpwellError
from upwell.server.errors import error_object
from upwell.server.openai_chat import logprob_entries
from upwell.server.record import RequestRecord, each
from upwell.server.responders import Piece, Reply
from upwell.server.responses_schemas import ResponsesRequest
from upwell.server.service import Service, stream, whole
from upwell.server.wire import JSON, event

Item = dict[str, Any]
Step = tuple[str, dict[str, Any]]
"""An event's type and fields."""


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        record = service.begin(request, body.model, body.stream, body.input)
        reply = service.responder.chat(body.conversation(), body.params())
        answer = _Answer(body, reply, service, record)
        if body.stream:
            return stream([reply], answer.events())
        return JSON(await whole(request, [reply], answer.whole))

    return routes


class _Answer:
    """One response. Both forms are made of the same steps."""

    def __init__(self, body: ResponsesRequest, reply: Reply, service: Service, record: RequestRecord) -> None:
        self.body, self.reply, self.service, self.record = body, reply, service, record
        self.id = f"resp_{record.id}"
        self.created = int(time.time())
        self.output: list[Item] = []
        self.status, self.reason = "in_progress", None  # type: str, str | None

    async def whole(self) -> dict[str, Any]:
        async for _ in self._steps():
            pass
        return self._response()

    async def events(self) -> AsyncGenerator[bytes, None]:
        number = 0

        def numbered(kind: str, fields: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

        yield numbered("response.created", {"response": self._response()})
        yield numbered("response.in_progress", {"response": self._response()})
        try:
            async for kind, fields in self._steps():
                yield numbered(kind, fields)
        except UpwellError as error:
            self.record.finish_reasons.append("error")
            self.status = "failed"
            told = error_object(error)["error"]
            failure = {"code": told["code"] or told["type"], "message": told["message"]}
            yield numbered("response.failed", {"response": self._response() | {"error": failure}})
            return
        yield numbered(f"response.{self.status}", {"response": self._response()})

    async def _steps(self) -> AsyncGenerator[Step, None]:
        """Builds `output` and says each step of it."""
        ended: Piece | None = None
        async for piece in each(self.record.count(self.reply)):
            logprobs = logprob_entries(piece.logprobs, self.service) if self.body.wants_logprobs else []
            for part in piece.events:
                for step in self._part(part, logprobs):
                    yield step
                if isinstance(part, Content):
                    logprobs = []
            if piece.finish_reason is not None:
                ended = piece
        for step in self._close():
            yield step
        cut = ended is not None and ended.finish_reason != "stop"
        self.status, self.reason = ("incomplete", "max_output_tokens") if cut else ("completed", None)

    def _part(self, part: Event, logprobs: list[dict[str, Any]]) -> Iterator[Step]:
        if isinstance(part, ToolCall):
            yield from self._close()
            call: Item = {"type": "function_call", "id": _id("fc"), "call_id": _id("call"), "name": part.name,
                    "arguments": "", "status": "in_progress"}  # fmt: skip
            yield from self._open(call)
            call["arguments"] = part.arguments
            yield "response.function_call_arguments.delta", self._at(delta=part.arguments)
            yield "response.function_call_arguments.done", self._at(name=part.name, arguments=part.arguments)
            yield from self._close()
            return
        kind = "reasoning" if isinstance(part, Reasoning) else "message"
        if not self.output or self.output[-1]["type"] != kind or self.output[-1]["status"] != "in_progress":
            yield from self._close()
            item: Item = {"type": kind, "id": _id("rs" if kind == "reasoning" else "msg"), "status": "in_progress",
                          "content": []}  # fmt: skip
            if kind == "reasoning":
                item["summary"] = []
            else:
                item["role"] = "assistant"
            yield from self._open(item)
            empty: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(empty)
            yield "response.content_part.added", self._at(content_index=0, part=dict(empty))
        text = self.output[-1]["content"][0]
        text["text"] += part.text
        if kind == "reasoning":
            yield "response.reasoning_text.delta", self._at(content_index=0, delta=part.text)
        else:
            text["logprobs"] += logprobs
            yield "response.output_text.delta", self._at(content_index=0, delta=part.text, logprobs=logprobs)

    def _open(self, item: Item) -> Iterator[Step]:
        self.output.append(item)
        shown = item | ({"content": []} if "content" in item else {})
        yield "response.output_item.added", {"output_index": len(self.output) - 1, "item": shown}

    def _close(self) -> Iterator[Step]:
        """End the item under way."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return
        item = self.output[-1]
        item["status"] = "completed"
        if item["type"] != "function_call":
            text = item["content"][0]
            if item["type"] == "reasoning":
                yield "response.reasoning_text.done", self._at(content_index=0, text=text["text"])
            else:
                done = self._at(content_index=0, text=text["text"], logprobs=text["logprobs"])
                yield "response.output_text.done", done
            yield "response.content_part.done", self._at(content_index=0, part=text)
        yield "response.output_item.done", {"output_index": len(self.output) - 1, "item": item}

    def _at(self, **fields: Any) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, **fields}

    def _response(self) -> dict[str, Any]:
        body = self.body
        usage = None
        if self.status != "in_progress":
            prompt, made = self.record.prompt_tokens, self.record.completion_tokens
            usage = {
                "input_tokens": prompt, "output_tokens": made, "total_tokens": prompt + made,
                "input_tokens_details": {"cached_tokens": 0},  # the engine counts them over all requests only
                "output_tokens_details": {"reasoning_tokens": self.record.reasoning_tokens},
            }  # fmt: skip
        choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": self.status, "error": None,
            "incomplete_details": None if self.reason is None else {"reason": self.reason},
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {}, "model": self.service.name, "output": self.output,
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False, "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": _plain(body.text.format if body.text else None)},
            "tool_choice": choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": 1.0 if body.top_p is None else body.top_p, "truncation": "disabled", "usage": usage,
            "user": body.user,
        }  # fmt: skip


def _plain(form: Any) -> dict[str, Any]:
    return {"type": "text"} if form is None else dict(form.model_dump(by_alias=True, exclude_none=True))


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:24]}"
