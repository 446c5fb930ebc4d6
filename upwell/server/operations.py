"""Operating: health, readiness, metrics, models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from upwell.server.errors import ModelNotFoundError
from upwell.server.metrics import Metrics
from upwell.server.service import Service
from upwell.server.wire import JSON


def router(service: Service, metrics: Metrics, app: FastAPI) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        """200 as long as the engine lives: restart the server otherwise."""
        healthy = service.responder.is_healthy
        return JSON({"status": "ok" if healthy else "engine stopped"}, 200 if healthy else 503)

    @routes.get("/ready")
    async def ready() -> Response:
        """200 while new requests are taken: send none otherwise."""
        if app.state.gate.draining:
            return JSON({"status": "shutting down"}, 503)
        return await health()

    @routes.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": service.created, "owned_by": "upwell",
            "max_model_len": service.responder.max_model_len,
        }  # fmt: skip

    @routes.get("/v1/models")
    async def models(request: Request) -> Response:
        data = [describe(name) for name in service.names]
        if "anthropic-version" in request.headers:  # Anthropic's clients ask at the same address
            data = [{"type": "model", "display_name": entry["id"], "created_at": "1970-01-01T00:00:00Z", **entry}
                    for entry in data]  # fmt: skip
            body = {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
            return JSON(body)
        return JSON({"object": "list", "data": data})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in service.names:
            raise ModelNotFoundError(f"no model {name!r} here", f"this server has {', '.join(service.names)}")
        return JSON(describe(name))

    return routes
