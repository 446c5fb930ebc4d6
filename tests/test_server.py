"""The server, by the real openai client over a socket: a tiny V4 behind `upwell serve`, and the embedded model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from tiny_v4 import build_llm, save

from upwell import SamplingParams
from upwell.chat import Content, Reasoning, ToolCall
from upwell.chat.embedded import NANO_NOTICE
from upwell.engine import Engine
from upwell.server.app import create_app
from upwell.server.responders import ModelResponder, Piece, Reply
from upwell.server.schemas import ChatRequest

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Served:
    """An app on a free port, in a thread."""

    engine: Engine

    def __init__(self, app: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    llm = build_llm(max_num_seqs=4, cache_tokens=4096)
    served = Served(create_app(ModelResponder(llm), "tiny"))
    served.engine = llm.engine
    yield served
    served.stop()


def spawn(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`upwell serve` as a user starts it; returns it and its URL once it says that it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "upwell.cli", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"serves (\S+) on (http://\S+) ", line)
    assert match, line + (process.stderr.read() if process.stderr else "")
    return process, match[2]


def test_upwell_serve_with_a_checkpoint(tmp_path: Path) -> None:
    process, url = spawn("--model", str(save(tmp_path / "tiny-v4")), "--device", "cpu", "--served-model-name", "v4")
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [m.id for m in client.models.list()] == ["v4"]
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        answer = client.chat.completions.create(model="v4", messages=HELLO, max_tokens=8, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 8
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode in (0, -15)


def test_upwell_serve_embedded_says_what_it_can() -> None:
    process, url = spawn()
    try:
        assert process.stdout is not None
        command = process.stdout.readline() + process.stdout.readline()
        tried = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert json.loads(tried.stdout)["choices"][0]["message"]["content"] == NANO_NOTICE
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        (model,) = client.models.list()
        answer = client.chat.completions.create(model=model.id, messages=HELLO)
        assert answer.choices[0].message.content == NANO_NOTICE
        assert answer.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(
            model=model.id, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == NANO_NOTICE
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 0
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_answer_is_the_engines(tiny: Served) -> None:
    llm = build_llm(max_num_seqs=4, cache_tokens=4096)
    params = SamplingParams(temperature=0.0, max_tokens=20, skip_special_tokens=False)
    expected = llm.chat(HELLO, params)
    answer = tiny.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)


@pytest.mark.parametrize("effort", [None, "high"])
def test_stream_adds_up_to_the_whole(tiny: Served, effort: Any) -> None:
    same: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 30, "n": 2}
    same |= {"logprobs": True, "top_logprobs": 2, "extra_body": {"ignore_eos": True, "top_k": 50}}
    if effort:
        same["reasoning_effort"] = effort
    whole = tiny.client.chat.completions.create(**same)
    stream = tiny.client.chat.completions.create(**same, stream=True, stream_options={"include_usage": True})
    text, reasoning, reasons, logprobs = ["", ""], ["", ""], {}, [[], []]  # type: ignore[var-annotated]
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            reasoning[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
            if choice.logprobs and choice.logprobs.content:
                logprobs[choice.index] += choice.logprobs.content
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert usage == whole.usage and usage is not None and usage.completion_tokens == 60
    for choice in whole.choices:
        k = choice.index
        assert text[k] == choice.message.content
        assert reasoning[k] == (getattr(choice.message, "reasoning_content", None) or "")
        assert bool(reasoning[k]) == bool(effort)
        assert reasons[k] == choice.finish_reason == "length"
        assert choice.logprobs is not None and logprobs[k] == choice.logprobs.content
        assert len(logprobs[k]) == 30 and all(len(entry.top_logprobs) == 2 for entry in logprobs[k])


def test_concurrent_streams_equal_lone_ones(tiny: Served) -> None:
    def ask(seed: int) -> str:
        stream = tiny.client.chat.completions.create(
            model="tiny", messages=HELLO, seed=seed, max_tokens=25, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    lone = [ask(seed) for seed in range(6)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=s: together.update({s: ask(s)})) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(6)] == lone


def test_a_client_that_leaves_frees_its_place(tiny: Served) -> None:
    stream = tiny.client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, max_tokens=3000, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    scheduler = tiny.engine.scheduler
    assert scheduler.blocks.free < scheduler.blocks.total
    stream.close()
    deadline = time.monotonic() + 30
    while scheduler.blocks.free < scheduler.blocks.total:
        assert time.monotonic() < deadline, "its blocks are still held"
        time.sleep(0.01)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_p": 0}, "top_p is 0"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 100000}, "100000 new ones are more than the context of 4096"),
    ({"n": 0}, "n is 0"),
    ({"stop": [""]}, "stop is"),
    ({"top_logprobs": 3}, "top_logprobs is given without logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs is 21"),
    ({"messages": []}, "messages is []"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
    ({"response_format": {"type": "json_object"}}, "response_format.type is 'json_object'"),
    ({"tool_choice": "required"}, "tool_choice is 'required'"),
    ({"reasoning_effort": "huge"}, "reasoning_effort is 'huge'"),
    ({"best_of": 3}, "unknown parameter best_of"),
    ({"logit_bias": {"100000": 1}}, "token id 100000"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_bad_parameters_are_named(tiny: Served, body: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        request = {"model": "tiny", "messages": HELLO, "stream": stream} | body
        answer = httpx.post(f"{tiny.url}/v1/chat/completions", json=request)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert message in error["message"] and error["type"] == "invalid_request_error"


def test_unknown_model_path_and_body(tiny: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9' here"):
        tiny.client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert httpx.get(f"{tiny.url}/v2/nothing").json()["error"]["message"] == "GET /v2/nothing: Not Found"
    broken = httpx.post(f"{tiny.url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and "isn't JSON" in broken.json()["error"]["message"]
    missing = httpx.post(f"{tiny.url}/v1/chat/completions", json={"model": "tiny"})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "messages"


class Scripted:
    """Answers with given events: what a model that reasons and calls tools would say."""

    is_healthy = True

    def close(self) -> None: ...

    def token_text(self, token_id: int) -> bytes:
        return b""

    def respond(self, request: ChatRequest) -> Reply:
        async def pieces() -> AsyncGenerator[Piece, None]:
            yield Piece(0, (Reasoning("hm"),), 2)
            await asyncio.sleep(0)
            call = ToolCall(0, "weather", '{"city": "Bern"}')
            yield Piece(0, (Content("Looking. "), call), 5)
            yield Piece(0, (), 1, finish_reason="stop")

        return Reply(4, pieces())


def test_reasoning_and_tool_calls_reach_the_client() -> None:
    served = Served(create_app(Scripted(), "scripted"))
    try:
        create = served.client.chat.completions.create
        tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
        choice = create(model="scripted", messages=HELLO, tools=tools).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Looking. "
        assert choice.message.reasoning_content == "hm"  # type: ignore[attr-defined]
        assert choice.message.tool_calls is not None
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Bern"}'  # type: ignore[union-attr]
        chunks = [c.choices[0] for c in create(model="scripted", messages=HELLO, tools=tools, stream=True)]
        calls = [call for c in chunks for call in c.delta.tool_calls or []]
        assert [(c.index, c.function.name) for c in calls if c.function] == [(0, "weather")]
        assert chunks[-1].finish_reason == "tool_calls"
    finally:
        served.stop()


def test_a_taken_port_is_said_before_anything_loads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-m", "upwell.cli", "serve", "--model", str(tmp_path), "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and f"can't listen on 127.0.0.1:{port}" in ended.stderr
