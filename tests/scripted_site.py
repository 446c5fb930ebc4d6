"""A stand-in for a served model: OpenAI's streamed chat completions from a script, and metrics, around the real page.

It shows what no small model says reliably: reasoning, tool calls, errors, replies that don't end.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from upwell.server import errors, web

EVIL = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">

[a](javascript:window.pwned=1) ![b](http://elsewhere.invalid/b.png) <a href="javascript:window.pwned=1">c</a>

```html
<svg onload="window.pwned = 1">
```

| <b>d</b> |
|---|
| <iframe srcdoc="<script>parent.pwned=1</script>"></iframe> |"""


class Site:
    """The page on a free port, in a thread. What a reply is, the last message decides."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []  # of the chat requests that came
        self.key: str | None = None
        self.go_on = threading.Event()  # lets a "think" reply past its middle
        self.left = threading.Event()  # the reader of an "endless" reply is gone
        self.metrics: str | None = ""
        self.scrapes = 0
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()

    def stop(self) -> None:
        self.go_on.set()
        self._server.should_exit = True
        self._thread.join()

    def _app(self) -> FastAPI:
        app = FastAPI()
        errors.install(app)
        web.install(app)

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/metrics")
        async def metrics() -> Response:
            self.scrapes += 1
            if self.metrics is None:
                return refusal(404, "not found")
            return PlainTextResponse(self.metrics.replace("{N}", str(100 * self.scrapes)))

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": name, "object": "model"} for name in ("v4-tiny", "v4-other")]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "wrong API key")
            body = await request.json()
            self.bodies.append(body)
            last = body["messages"][-1]
            if last["content"] == "busy":
                return refusal(429, "the queue is full (try again in a moment)")
            return StreamingResponse(self._reply(last), media_type="text/event-stream")

        return app

    async def _reply(self, last: dict[str, str]) -> AsyncIterator[str]:
        wanted = "tool answered" if last["role"] == "tool" else last["content"]
        yield event({"role": "assistant", "content": ""})
        if wanted == "think":
            for text in ("Six times ", "seven is forty-two."):
                yield event({"reasoning_content": text})
            yield event({"content": "The **answer"})
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            yield event({"content": "** is `42`.\n\n1. one\n2. two\n\n```python\nprint(42)\n```"})
        elif wanted == "tool":
            yield event({"tool_calls": [call(0, "weather", "")]})
            for part in ('{"city":', ' "Bern"}'):
                yield event({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        elif wanted == "tool answered":
            yield event({"content": f"The tool says: {last['content']}"})
        elif wanted == "endless":
            try:
                while True:
                    yield event({"content": "more and "})
                    await asyncio.sleep(0.02)
            finally:
                self.left.set()
        elif wanted == "break":
            yield event({"content": "Half of "})
            yield "data: " + json.dumps({"error": {"message": "the model failed", "type": "server_error"}}) + "\n\n"
        elif wanted == "evil":
            yield event({"reasoning_content": EVIL})
            yield event({"content": EVIL})
            yield event({"tool_calls": [call(0, EVIL, EVIL)]})
        else:
            yield event({"content": f"You said: {wanted}"})
        yield event({}, "tool_calls" if wanted in ("tool", "evil") else "stop")
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        yield "data: " + json.dumps({"choices": [], "usage": usage}) + "\n\n"
        yield "data: [DONE]\n\n"


def event(delta: dict[str, Any], reason: str | None = None) -> str:
    body = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return f"data: {json.dumps(body)}\n\n"


def call(index: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{index}", "type": "function", "function": function}


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "some_error", "param": None, "code": None}}, status)
