"""From a command line's settings to a listening server."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch
import uvicorn

from upwell.engine import LLM, EngineOptions
from upwell.errors import InputError
from upwell.server.app import create_app
from upwell.server.responders import ModelResponder, NanoResponder, Responder

NANO_NAME = "upwell-nano"


class _Server(uvicorn.Server):
    """Says where it listens and what to try once it does."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)


def serve(
    path: Path | None, host: str, port: int, device: str, dtype: torch.dtype | None, served_name: str | None,
    options: EngineOptions,
) -> None:  # fmt: skip
    """Serve the checkpoint at `path` (None: the embedded model) until interrupted. Port 0 takes a free one."""
    listener = _bind(host, port)  # before the model loads: a taken port is known at once
    with listener:
        responder: Responder
        if path is None:
            name, responder = served_name or NANO_NAME, NanoResponder()
        else:
            name = served_name or path.resolve().name
            responder = ModelResponder(LLM(path, device=device, dtype=dtype, **options))
        app = create_app(responder, name)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
        _Server(config, _greeting(name, *listener.getsockname()[:2])).run(sockets=[listener])


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"can't listen on {host}:{port}: {error}", "choose another with --host or --port") from None
    return listener


def _greeting(name: str, host: str, port: int) -> str:
    where = f"[{host}]" if ":" in host else host
    body = {"model": name, "messages": [{"role": "user", "content": "What can you do?"}]}
    return (
        f"Upwell serves {name} on http://{where}:{port} (stop with Ctrl-C). Try:\n"
        f"  curl http://{where}:{port}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(body)}'"
    )
