"""Errors as the APIs word them, OpenAI's {"error": {...}} or Anthropic's {"type": "error", ...}, with their status."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from upwell.errors import InputError, QueueFullError, ShuttingDownError, UpwellError
from upwell.server.wire import JSON, ClientGone

RETRY_SECONDS = 1  # after a full queue


class ModelNotFoundError(UpwellError):
    """A request for a model that isn't served here."""

    http_status = 404


class ContextLengthError(InputError):
    """A prompt and its reply that are longer than the context."""

    def __init__(self, prompt: int, wanted: int, limit: int) -> None:
        super().__init__(
            f"the prompt's {prompt} tokens and {wanted} new ones are more than the context of {limit}",
            "shorten the prompt or max_tokens",
        )


class UnknownKeyError(UpwellError):
    """No API key, or one that isn't known here."""

    http_status = 401


class RateLimitError(UpwellError):
    """A key's requests or tokens a minute are used up. `seconds`: when there is room again."""

    http_status = 429

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message, f"try again in {seconds} s")
        self.seconds = seconds


class TooLargeError(UpwellError):
    """A body over the limit."""

    http_status = 413


class SlowRequestError(UpwellError):
    """A body that takes too long to come."""

    http_status = 408


_OPENAI = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
           503: "service_unavailable_error"}  # fmt: skip
_ANTHROPIC = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
              429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
_CODES: dict[type[UpwellError], str] = {
    ModelNotFoundError: "model_not_found", ContextLengthError: "context_length_exceeded",
    UnknownKeyError: "invalid_api_key", RateLimitError: "rate_limit_exceeded", QueueFullError: "queue_full",
}  # fmt: skip
# "temperature is -1, must be ..." and "messages[0].role is 'robot'" name the parameter first.
_NAMED = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*) (?:is|isn't|has|are) ")


def is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def error_object(error: UpwellError, path: str = "") -> dict[str, Any]:
    """The body for an error of ours, in the API's words that `path` belongs to."""
    named = _NAMED.match(str(error)) if error.http_status == 400 else None
    return _body(path, str(error), error.http_status, named[1] if named else None, _CODES.get(type(error)))


def _body(path: str, message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    plain = "invalid_request_error" if status < 500 else None
    if is_anthropic(path):
        return {"type": "error", "error": {"type": _ANTHROPIC.get(status, plain or "api_error"), "message": message}}
    kind = _OPENAI.get(status, plain or "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: UpwellError, path: str) -> JSON:
    headers = {}
    if isinstance(error, RateLimitError):
        headers["Retry-After"] = str(error.seconds)
    elif isinstance(error, (QueueFullError, ShuttingDownError)):
        headers["Retry-After"] = str(RETRY_SECONDS)
    elif isinstance(error, UnknownKeyError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSON(error_object(error, path), error.http_status, headers)


def install(app: FastAPI) -> None:
    """Every failure leaves the app in these shapes."""

    @app.exception_handler(UpwellError)
    async def upwell_error(request: Request, error: UpwellError) -> JSON:
        return error_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSON:
        message, param = _explain(error)
        return JSON(_body(request.url.path, message, 400, param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSON:
        path = request.url.path
        message = f"{request.method} {path}: {error.detail}"
        return JSON(_body(path, message, error.status_code), error.status_code, dict(error.headers or {}))

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nginx's status for it; no one reads this

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> JSON:
        return JSON(_body(request.url.path, "the body is nested too deep", 400), 400)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSON:
        return JSON(_body(request.url.path, f"internal error: {type(error).__name__}", 500), 500)


def _explain(error: RequestValidationError) -> tuple[str, str | None]:
    """One line for the first problem, and the parameter it is about."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return f"the body isn't JSON: {first['ctx']['error']}", None
    if first["type"] == "extra_forbidden":
        return f"unknown parameter {param}", param
    if first["type"] == "missing":
        return f"{param or 'the body'} is missing", param
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{param or 'the body'} is {shown}: {message}", param
