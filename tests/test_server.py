"""The server, by the real openai client over a socket: a tiny V4 behind `upwell serve`, and the embedded model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import Served, spawn
from tiny_v4 import build_llm, save

from upwell import SamplingParams
from upwell.chat.embedded import NANO_NOTICE
from upwell.server.responders import ModelResponder

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    served = Served(ModelResponder(build_llm(max_num_seqs=4, cache_tokens=4096)))
    yield served
    served.stop()


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
    answer = tiny.openai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, temperature=0)
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
    whole = tiny.openai.chat.completions.create(**same)
    stream = tiny.openai.chat.completions.create(**same, stream=True, stream_options={"include_usage": True})
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
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [entry.bytes for entry in logprobs[k]] == [entry.bytes for entry in choice.logprobs.content]
        # How many tokens a step verifies depends on the clock, and the last bits of a product on how many they are.
        values = [entry.logprob for entry in choice.logprobs.content]
        assert [entry.logprob for entry in logprobs[k]] == pytest.approx(values, abs=1e-4)
        assert len(logprobs[k]) == 30 and all(len(entry.top_logprobs) == 2 for entry in logprobs[k])


def test_concurrent_streams_equal_lone_ones(tiny: Served) -> None:
    def ask(seed: int) -> str:
        stream = tiny.openai.chat.completions.create(
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
    stream = tiny.openai.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, max_tokens=3000, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert tiny.engine.stats().running == 1
    stream.close()
    tiny.wait_until_free()


def test_a_client_that_leaves_a_whole_answer_frees_its_place(tiny: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True}
    for path in ("/v1/chat/completions", "/v1/completions"):
        request = body if "chat" in path else {"prompt": ["a", "b"], "max_tokens": 3000, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{tiny.url}{path}", json=request, timeout=0.3)
        tiny.wait_until_free()


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
    ({"response_format": {"type": "yaml"}}, "response_format.type is 'yaml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing its schema"),
    ({"tool_choice": "required"}, "tool_choice is 'required'"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice is 'f'"),
    ({"store": True}, "store is True"),
    ({"reasoning_effort": "huge"}, "reasoning_effort is 'huge'"),
    ({"best_of": 3}, "unknown parameter best_of"),
    ({"logit_bias": {"100000": 1}}, "token id 100000"),
    ({"structured_outputs": {}}, "structured_outputs has nothing"),
    ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs has ["),
    ({"structured_outputs": {"regex": "("}}, "regex"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "unknown parameter structured_outputs.whitespace_pattern"),
    ({"guided_choice": ["a"], "structured_outputs": {"choice": ["a"]}}, "guided_choice is given beside"),
    ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "beside a response format"),
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
        tiny.openai.chat.completions.create(model="gpt-9", messages=HELLO)
    assert httpx.get(f"{tiny.url}/v2/nothing").json()["error"]["message"] == "GET /v2/nothing: Not Found"
    broken = httpx.post(f"{tiny.url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and "isn't JSON" in broken.json()["error"]["message"]
    missing = httpx.post(f"{tiny.url}/v1/chat/completions", json={"model": "tiny"})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "messages"


def test_a_taken_port_is_said_before_anything_loads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-m", "upwell.cli", "serve", "--model", str(tmp_path), "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and f"can't listen on 127.0.0.1:{port}" in ended.stderr
