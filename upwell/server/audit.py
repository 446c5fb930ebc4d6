"""The audit log: one JSON line a request. Who, when, which model, how many tokens, how long, with what result."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from upwell.errors import InputError
from upwell.server.record import RequestRecord


class AuditLog:
    """Appends to a file; a line is written whole before the request's connection is free for the next one."""

    def __init__(self, path: Path, with_prompts: bool = False) -> None:
        self.with_prompts = with_prompts
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InputError(f"can't write the audit log {path}: {error}") from None

    def __call__(self, record: RequestRecord) -> None:
        entry = {
            "time": datetime.fromtimestamp(record.at, UTC).isoformat(timespec="milliseconds"),
            "request_id": record.id,
            "key": record.key.name if record.key else None,
            "client": record.client,
            "method": record.method,
            "path": record.path,
            "model": record.model,
            "stream": record.stream,
            "status": record.status,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "latency_s": round(record.latency, 4),
        }
        if self.with_prompts:
            entry["prompt"] = record.prompt
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.close()
