"""Logs on stderr, as lines for people or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from upwell.server.record import RequestRecord

LogFormat = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")
_FIELDS = ("request_id", "key", "client", "method", "path", "status", "latency_s", "prompt_tokens", "completion_tokens")

logger = logging.getLogger("upwell.requests")


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure(level: str, form: LogFormat = "text") -> None:
    """Set up the root logger and uvicorn's."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JSONFormatter() if form == "json" else plain)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # requests are logged here, once


def log_request(record: RequestRecord) -> None:
    """A RecordSink: one line a request."""
    if not logger.isEnabledFor(logging.INFO):
        return
    fields = {
        "request_id": record.id, "key": record.key.name if record.key else None, "client": record.client,
        "method": record.method, "path": record.path, "status": record.status, "latency_s": round(record.latency, 4),
        "prompt_tokens": record.prompt_tokens, "completion_tokens": record.completion_tokens,
    }  # fmt: skip
    logger.info(
        "%s %s %d %.3fs %d+%d tokens", record.method, record.path, record.status, record.latency,
        record.prompt_tokens, record.completion_tokens, extra=fields,
    )  # fmt: skip
