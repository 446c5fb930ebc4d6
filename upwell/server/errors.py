"""Errors as OpenAI's API words them: {"error": {message, type, param, code}} with the right status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from upwell.errors import UpwellError


class ModelNotFoundError(UpwellError):
    """A request for a model that isn't served here."""

    http_status = 404


_TYPES = {404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def error_object(error: UpwellError) -> dict[str, Any]:
    code = "model_not_found" if isinstance(error, ModelNotFoundError) else None
    return _body(str(error), error.http_status, None, code)


def _body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Every failure leaves the app in this shape."""

    @app.exception_handler(UpwellError)
    async def upwell_error(request: Request, error: UpwellError) -> JSONResponse:
        return JSONResponse(error_object(error), error.http_status)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(place) or None
        if first["type"] == "json_invalid":
            return JSONResponse(_body(f"the body isn't JSON: {first['ctx']['error']}", 400), 400)
        if first["type"] == "extra_forbidden":
            return JSONResponse(_body(f"unknown parameter {param}", 400, param), 400)
        if first["type"] == "missing":
            return JSONResponse(_body(f"{param or 'the body'} is missing", 400, param), 400)
        shown = repr(first.get("input"))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        message = first["msg"][:1].lower() + first["msg"][1:]
        return JSONResponse(_body(f"{param or 'the body'} is {shown}: {message}", 400, param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(_body(message, error.status_code), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_body(f"internal error: {type(error).__name__}", 500), 500)
