"""How a server is run: what the command line decides, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_BODY = 32 * 2**20  # bytes
BODY_TIMEOUT = 30.0  # seconds for a request's body to come


@dataclass(frozen=True)
class ServerSettings:
    """`open_paths` need no key; one that ends in / stands for all below it. `allowed_hosts`: names the server may be
    called by, None for any: on localhost it keeps other sites' scripts out that point a name of theirs at it."""

    api_keys: tuple[str, ...] = ()
    api_keys_file: Path | None = None
    open_paths: tuple[str, ...] = ("/", "/health", "/ready", "/metrics", "/favicon.ico", "/assets/")
    streamed_paths: tuple[str, ...] = ("/api/tables",)  # uploads: their bodies aren't read, nor limited, before the app
    allowed_origins: tuple[str, ...] = ()  # of web pages on other hosts
    allowed_hosts: tuple[str, ...] | None = None
    audit_log: Path | None = None
    audit_prompts: bool = False
    max_body: int = MAX_BODY
    body_timeout: float = BODY_TIMEOUT
    drain_timeout: float = 30.0
    otlp_endpoint: str | None = None

    def is_open(self, path: str) -> bool:
        return any(path == known or (len(known) > 1 and known[-1] == "/" and path.startswith(known))
                   for known in self.open_paths)  # fmt: skip
