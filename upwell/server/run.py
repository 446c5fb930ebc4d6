"""From a command line's settings to a listening server."""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from upwell.engine import EngineThread
from upwell.errors import InputError
from upwell.server.logs import LogFormat, configure
from upwell.server.protocol import LimitedProtocol
from upwell.server.settings import ServerSettings

LOST_SECONDS = 5.0  # that a server without its other ranks answers 503 before it ends
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Listener:
    """Where a server listens, and how. Port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    log_level: str = "warning"
    log_format: LogFormat = "text"


class _Server(uvicorn.Server):
    """Says where it listens and what to try once it does; refuses new requests from the first signal on."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, greeting: str) -> None:
        super().__init__(config)
        self._app, self._greeting = app, greeting
        app.state.server = self

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._app.state.gate.draining = True
        super().handle_exit(sig, frame)


def open_listener(listener: Listener, settings: ServerSettings) -> socket.socket:
    """Bind, before a model is loaded: a taken port, a missing key or certificate is known at once."""
    local = _is_loopback(listener.host)
    has_keys = bool(settings.api_keys) or settings.api_keys_file is not None
    if not local and not has_keys and not listener.insecure:
        raise InputError(
            f"--host {listener.host} lets other machines ask, and there is no API key",
            "give --api-key or --api-keys-file, or --insecure if that is meant",
        )
    if (listener.tls_cert is None) != (listener.tls_key is None):
        raise InputError("--tls-cert and --tls-key go together")
    if listener.tls_cert is not None and listener.tls_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(listener.tls_cert, listener.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"can't use --tls-cert {listener.tls_cert} with its key: {error}") from None
    return _bind(listener.host, listener.port)


def with_allowed_hosts(listener: Listener, settings: ServerSettings) -> ServerSettings:
    """On localhost without a key, the names that the server may be called by."""
    has_keys = bool(settings.api_keys) or settings.api_keys_file is not None
    if has_keys or listener.insecure or not _is_loopback(listener.host):
        return settings
    return replace(settings, allowed_hosts=tuple(dict.fromkeys((*LOOPBACK_NAMES, listener.host))))


def serve(
    app: FastAPI, bound: socket.socket, listener: Listener, settings: ServerSettings, names: Sequence[str]
) -> None:
    """Serve until a signal; then finish what runs, for at most the drain timeout."""
    configure(listener.log_level, listener.log_format)
    with bound:
        config = uvicorn.Config(
            app, http=LimitedProtocol, ws="none", log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=int(settings.drain_timeout), timeout_keep_alive=30,
            ssl_certfile=listener.tls_cert, ssl_keyfile=listener.tls_key,
        )  # fmt: skip
        scheme = "http" if listener.tls_cert is None else "https"
        _Server(config, app, _greeting(names[0], scheme, *bound.getsockname()[:2])).run(sockets=[bound])


def stop_when_lost(app: FastAPI, thread: EngineThread) -> None:
    """End the server a little after a rank of its model has ended: until then it says so, with 503."""

    def stop() -> None:
        if (server := getattr(app.state, "server", None)) is not None:
            server.should_exit = True

    def lost(_: Exception) -> None:
        timer = threading.Timer(LOST_SECONDS, stop)
        timer.daemon = True
        timer.start()

    thread.engine.runner.model.on_failure(lost)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"can't listen on {host}:{port}: {error}", "choose another with --host or --port") from None
    return bound


def _greeting(name: str, scheme: str, host: str, port: int) -> str:
    where = f"[{host}]" if ":" in host else host
    body = {"model": name, "messages": [{"role": "user", "content": "What can you do?"}]}
    return (
        f"Upwell serves {name} on {scheme}://{where}:{port} (stop with Ctrl-C). Try:\n"
        f"  curl {scheme}://{where}:{port}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(body)}'"
    )
