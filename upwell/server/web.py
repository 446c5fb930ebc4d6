"""The web page at /, its assets, and what it needs beside OpenAI's API: tables to ask about.

The page is plain files in web/, served as they are, under a policy by which a browser runs no script and loads
nothing but what this server sends.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from upwell.analyst.query import run_query
from upwell.analyst.schema import TABLE
from upwell.errors import InputError
from upwell.server.tables import KEEP, MAX_UPLOAD, QUERY_SECONDS, Tables, Uploaded, UploadTooLargeError

FILES = Path(__file__).with_name("web")
UPLOAD_TYPE = "application/octet-stream"
SAMPLE = 5  # rows shown of a new table
_EXACT = 1 << 53  # JavaScript reads integers beyond it as other ones

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked about each time: an upgrade shows at once
}
# A machine's own table of types may be wrong, and `nosniff` makes that fatal.
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".json": "application/json"}


class TableRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    table: str = Field(max_length=100, description="the id that POST /api/tables gave")


class AskRequest(TableRequest):
    question: str


class QueryRequest(TableRequest):
    sql: str = Field(max_length=10_000)


class Assets(StaticFiles):
    """Files of web/ with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        return _guarded(await super().get_response(path, scope), path)


def install(app: FastAPI, tables: Tables | None = None) -> None:
    """Add the page and its endpoints to the app."""
    app.include_router(_router(tables or Tables()))
    app.mount("/assets", Assets(directory=FILES), name="assets")


def _router(tables: Tables) -> APIRouter:
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return _guarded(FileResponse(FILES / "index.html"), "index.html")

    @router.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return _guarded(FileResponse(FILES / "icon.svg", media_type="image/svg+xml"), "icon.svg")

    body = {"content": {UPLOAD_TYPE: {"schema": {"type": "string", "format": "binary"}}}, "required": True}

    @router.post("/api/tables", openapi_extra={"requestBody": body})
    async def upload(request: Request, filename: str, table: str | None = None) -> dict[str, Any]:
        """Load a file (the raw body) as a table; `table` picks one of a database's tables or a workbook's sheets."""
        # Not a type that a foreign page could send unasked.
        if request.headers.get("content-type", "").split(";")[0].strip() != UPLOAD_TYPE:
            raise InputError("content-type is not " + UPLOAD_TYPE, "send the file's bytes as the body")
        with tempfile.TemporaryDirectory(prefix="upwell-") as folder:
            path = Path(folder, _safe_name(filename))
            await _receive(request, path)
            return _described(await run_in_threadpool(tables.add, path, table))

    @router.delete("/api/tables/{table}", status_code=204)
    def forget(table: str) -> None:
        """Forget a table before it expires."""
        tables.drop(table)

    @router.post("/api/ask")
    def ask(request: AskRequest) -> dict[str, Any]:
        """Answer a question from a table: the fields of `upwell ask --json`."""
        answer = tables.ask(request.table, request.question)
        names = ("question", "status", "reading", "sql", "columns", "confidence", "message")
        return {name: getattr(answer, name) for name in names} | {"rows": _browser_safe(answer.rows)}

    @router.post("/api/query")
    def query(request: QueryRequest) -> dict[str, Any]:
        result = tables.query(request.table, request.sql)
        return {"columns": result.columns, "rows": _browser_safe(result.rows), "truncated": result.truncated}

    query.__doc__ = f"Run one SELECT over the table `t`, for at most {QUERY_SECONDS:g} s."
    return router


async def _receive(request: Request, path: Path) -> None:
    """The body into the file; refused as soon as it is too long."""
    size = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_UPLOAD:
                raise UploadTooLargeError(f"the file has more than {MAX_UPLOAD >> 20} MB", "ask on the command line")
            file.write(chunk)


def _safe_name(filename: str) -> str:
    """The last part of the name the file came with, in plain letters: it shows in messages, its ending counts."""
    last = filename.replace("\\", "/").split("/")[-1]
    kept = "".join(c if c.isalnum() or c in " ._-()" else "_" for c in last).strip(" .")
    stem, dot, ending = kept.rpartition(".")
    return f"{stem[:40]}{dot}{ending[-12:]}" if stem else kept[:40] or "table"


def _described(uploaded: Uploaded) -> dict[str, Any]:
    profile = uploaded.opened.profile
    return {
        "id": uploaded.id,
        "name": uploaded.name,
        "table": uploaded.choice,
        "tables": uploaded.choices,
        "rows": profile.n_rows,
        "columns": [{"name": column.name, "type": column.storage} for column in profile.columns],
        "sample": _browser_safe(run_query(uploaded.opened.connection, f"SELECT * FROM {TABLE} LIMIT {SAMPLE}").rows),
        "notes": list(uploaded.opened.notes),
        "expires_in": KEEP,
    }


def _browser_safe(rows: list[list[Any]]) -> list[list[Any]]:
    return [[str(cell) if type(cell) is int and abs(cell) > _EXACT else cell for cell in row] for row in rows]


def _guarded(response: Response, path: str) -> Response:
    response.headers.update(_HEADERS)
    kind = _TYPES.get(Path(path).suffix)
    if kind is not None and response.status_code == 200:
        response.headers["content-type"] = f"{kind}; charset=utf-8"
    return response
