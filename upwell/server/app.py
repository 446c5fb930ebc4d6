"""The app: one responder behind the APIs of OpenAI and Anthropic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import upwell
from upwell.server import anthropic, errors, openai_chat, openai_completions, operations, responses, tokenize, web
from upwell.server.audit import AuditLog
from upwell.server.gate import Gate
from upwell.server.keys import KeyRing
from upwell.server.logs import log_request
from upwell.server.metrics import Metrics
from upwell.server.record import RecordSink
from upwell.server.responders import Responder
from upwell.server.service import Service
from upwell.server.settings import ServerSettings
from upwell.server.tracing import Tracing, otlp_provider


def create_app(
    responder: Responder,
    names: str | Sequence[str],
    settings: ServerSettings | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """An app that serves `responder` under `names`, the first its own, others also accepted; closes it at shutdown.

    Raises InputError for keys that can't be read and logs that can't be written.
    """
    settings = settings or ServerSettings()
    names = (names,) if isinstance(names, str) else tuple(names)
    audit = None if settings.audit_log is None else AuditLog(settings.audit_log, settings.audit_prompts)
    if tracing is None and settings.otlp_endpoint is not None:
        tracing = Tracing(otlp_provider(settings.otlp_endpoint))
    metrics = Metrics(names[0], responder.stats)
    sinks: list[RecordSink] = [log_request, *(sink for sink in (audit, tracing) if sink is not None)]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        responder.close(settings.drain_timeout)
        for sink in (audit, tracing):
            if sink is not None:
                sink.close()

    app = FastAPI(title="Upwell", version=upwell.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    web.install(app)
    service = Service(responder, names, keep_prompts=settings.audit_prompts and audit is not None)
    for api in (openai_chat, openai_completions, responses, anthropic, tokenize):
        app.include_router(api.router(service))
    app.include_router(operations.router(service, metrics, app))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    gate = Gate(settings, KeyRing.of(settings.api_keys, settings.api_keys_file), metrics, sinks)
    app.add_middleware(gate.around)
    app.state.gate = gate
    return app
