"""The app: one served model, three endpoints."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

import upwell
from upwell.server import errors, web
from upwell.server.chat_completions import Completion
from upwell.server.responders import Responder
from upwell.server.schemas import ChatRequest


def create_app(responder: Responder, model_name: str) -> FastAPI:
    """An app that serves `responder` as `model_name`; closes it at shutdown."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        responder.close()

    app = FastAPI(title="Upwell", version=upwell.__version__, lifespan=lifespan)
    errors.install(app)
    web.install(app)
    started = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = responder.is_healthy
        return JSONResponse({"status": "ok" if healthy else "engine stopped"}, 200 if healthy else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": model_name, "object": "model", "created": started, "owned_by": "upwell"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest) -> JSONResponse | StreamingResponse:
        if request.model != model_name:
            raise errors.ModelNotFoundError(f"no model {request.model!r} here", f"this server has {model_name!r}")
        completion = Completion(request, responder.respond(request), responder)
        if not request.stream:
            return JSONResponse(await completion.whole())
        return StreamingResponse(completion.chunks(), media_type="text/event-stream")

    return app
