"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from upwell.errors import InputError
from upwell.server.openai_schemas import Token, Tool
from upwell.server.responders import Conversation
from upwell.server.sampling import Effort, Strict, thinking_for
from upwell.server.service import Service
from upwell.server.wire import JSON


class TokenizeRequest(Strict):
    """A text, or a conversation as V4 reads it: one of both."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    reasoning_effort: Effort | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[Token]


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    responder = service.responder

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        service.begin(request, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InputError("prompt is given with messages, or neither is", "give one of both")
        if body.messages is not None:
            tools = [tool.as_dict() for tool in body.tools or []]
            ids = responder.prompt_tokens(Conversation(body.messages, thinking_for(body.reasoning_effort), tools))
        else:
            ids = responder.encode(body.prompt or "")
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": responder.max_model_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [responder.token_text(i).decode("utf-8", errors="replace") for i in ids]
        return JSON(answer)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        service.begin(request, body.model)
        return JSON({"prompt": responder.decode(body.tokens)})

    return routes
