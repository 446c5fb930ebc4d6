"""Anthropic's API by the real anthropic client, each feature whole and streamed. The model is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from served import Served, scripted_llm
from test_server_openai import WEATHER, script

from upwell.server.responders import ModelResponder

TOOLS: Any = [
    {
        "name": "weather",
        "description": "d",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}},
    },
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(ModelResponder(scripted_llm(script)), "scripted")
    yield server
    server.stop()


def ask(served: Served, text: Any, stream: bool, **more: Any) -> Any:
    """The client's Message, whole or put together by the client from the stream."""
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    request: Any = {"model": "scripted", "max_tokens": 1000, "messages": messages, **more}
    if not stream:
        return served.anthropic.messages.create(**request)
    with served.anthropic.messages.stream(**request) as events:
        for event in events:
            assert event.type != "text" or "DSML" not in event.text, "markup leaks"
        return events.get_final_message()


both = pytest.mark.parametrize("stream", [False, True])
THINK: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


@both
def test_text(served: Served, stream: bool) -> None:
    message = ask(served, "hi", stream, system="Be kind.")
    assert [block.text for block in message.content] == ["Hello, 世界! 👋"]
    assert message.stop_reason == "end_turn" and message.role == "assistant"
    counted = served.anthropic.messages.count_tokens(
        model="scripted", system="Be kind.", messages=[{"role": "user", "content": "hi"}]
    )
    assert message.usage.input_tokens == counted.input_tokens
    assert message.usage.output_tokens == len("Hello, 世界! 👋".encode()) + 1


@both
def test_thinking_and_parallel_tools(served: Served, stream: bool) -> None:
    message = ask(served, "CALL", stream, tools=TOOLS, **THINK)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].thinking == "think first" and message.content[1].text == "Looking."
    assert (message.content[2].name, message.content[2].input) == ("weather", json.loads(WEATHER))
    assert (message.content[3].name, message.content[3].input) == ("now", {})
    assert message.stop_reason == "tool_use"
    # The blocks go back as they came, with the results.
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sun"}]}
               for block in message.content if block.type == "tool_use"]  # fmt: skip
    turns = [
        {"role": "user", "content": "CALL"},
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {"role": "user", "content": results},
    ]
    assert ask(served, turns, stream, tools=TOOLS).content[0].text == "It is sunny."


@both
def test_ends(served: Served, stream: bool) -> None:
    stopped = ask(served, "hi", stream, stop_sequences=["界"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "界")
    assert stopped.content[0].text == "Hello, 世"
    cut = ask(served, "hi", stream, max_tokens=3)
    assert cut.stop_reason == "max_tokens" and cut.content[0].text == "Hel"


def test_a_beginning_is_continued(served: Served) -> None:
    """An assistant's turn at the end is the beginning of the answer: nothing stands between them in the prompt."""
    turns: Any = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Say: "}]
    body = {"model": "scripted", "messages": turns}
    ends = served.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    whole = served.post("/v1/messages/count_tokens", body | {"messages": turns[:1]}).json()["input_tokens"]
    assert ends == whole + len("Say: ")


def test_errors_are_anthropics(served: Served) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no model 'claude' here"):
        served.anthropic.messages.create(model="claude", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(served, "hi", False, max_tokens=0)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert "max_tokens is 0" in body["error"]["message"]
    with pytest.raises(anthropic.BadRequestError, match="more than the context of 8192"):
        ask(served, "hi", True, max_tokens=9000)
    missing = served.post("/v1/messages", {"model": "scripted", "messages": [{"role": "user", "content": "x"}]})
    assert missing.status_code == 400 and missing.json()["error"]["message"] == "max_tokens is missing"
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    refused = served.post("/v1/messages", {"model": "scripted", "max_tokens": 5, "messages": image})
    assert refused.status_code == 400 and "image" in refused.json()["error"]["message"]


def test_claude_codes_kind_of_request(served: Served) -> None:
    """Cache hints, metadata, results with errors, empty thinking: what an agent sends is taken."""
    cached = {"cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "CALL", **cached}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "now", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True, **cached},
            {"type": "text", "text": "and sun?"}]},
    ]  # fmt: skip
    message = ask(
        served, turns, True, tools=[{**TOOLS[1], **cached}], metadata={"user_id": "u"},
        system=[{"type": "text", "text": "s", **cached}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )  # fmt: skip
    assert message.content[0].text == "It is sunny."
