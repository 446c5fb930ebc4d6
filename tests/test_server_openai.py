"""OpenAI's API by the real openai client, each feature whole and streamed. The model is scripted (tests/served.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from served import Served, scripted_llm
from test_chat import CALLS
from tiny_v4 import build_llm

from upwell.server.responders import ModelResponder

TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}
    for name, parameters in (
        ("weather", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}}),
        ("now", {"type": "object", "properties": {}}),
    )
]
WEATHER = '{"city": "Bern \\"x\\"\\n", "days": [1, 2]}'


def script(prompt: str) -> str:
    """The reply is decided by the last word of the prompt's last question."""
    asked = prompt.rsplit("<｜User｜>", 1)[-1]
    reasons = "think first</think>" if prompt.endswith("<think>") else ""
    if "CALL" in asked:
        return f"{reasons}Looking.\n\n{CALLS}"
    if "BROKEN" in asked:
        return f"{reasons}\n\n{CALLS[:-20]}"
    if "FORGOT" in asked:  # calls without ending its reasoning
        return f"think{CALLS}"
    if "JSON" in asked:
        return reasons + '{"name": "Ana", "age": 30}'
    if "sun" in asked:
        return f"{reasons}It is sunny."
    return f"{reasons}Hello, 世界! 👋"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(ModelResponder(scripted_llm(script)), "scripted")
    yield server
    server.stop()


def ask(served: Served, text: str, stream: bool, **more: Any) -> dict[str, Any]:
    """Content, reasoning, calls, finish reason and usage of one answer, whole or streamed."""
    request: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": text}], **more}
    create = served.openai.chat.completions.create
    if not stream:
        answer = create(**request)
        message = answer.choices[0].message
        calls = [(c.function.name, c.function.arguments, c.id) for c in message.tool_calls or []]  # type: ignore[union-attr]
        return {"content": message.content, "reasoning": getattr(message, "reasoning_content", None), "calls": calls,
                "reason": answer.choices[0].finish_reason, "usage": answer.usage}  # fmt: skip
    got: dict[str, Any] = {"content": None, "reasoning": None, "calls": [], "reason": None, "usage": None}
    for chunk in create(**request, stream=True, stream_options={"include_usage": True}):
        got["usage"] = chunk.usage or got["usage"]
        for choice in chunk.choices:
            assert "DSML" not in (choice.delta.content or ""), "markup leaks"
            if choice.delta.content:
                got["content"] = (got["content"] or "") + choice.delta.content
            if piece := getattr(choice.delta, "reasoning_content", None):
                got["reasoning"] = (got["reasoning"] or "") + piece
            for call in choice.delta.tool_calls or []:
                assert call.function is not None and call.index == len(got["calls"])
                got["calls"].append((call.function.name, call.function.arguments, call.id))
            got["reason"] = choice.finish_reason or got["reason"]
    return got


both = pytest.mark.parametrize("stream", [False, True])


@both
@pytest.mark.parametrize("effort", [None, "low", "max"])
def test_text_and_reasoning(served: Served, stream: bool, effort: Any) -> None:
    more = {} if effort is None else {"reasoning_effort": effort}
    got = ask(served, "hi", stream, **more)
    assert got["content"] == "Hello, 世界! 👋" and got["reason"] == "stop" and not got["calls"]
    assert got["reasoning"] == (None if effort is None else "think first")
    said = len("Hello, 世界! 👋".encode()) + 1 + (0 if effort is None else len("think first") + 1)
    assert got["usage"].completion_tokens == said  # a token a byte, </think> one, and the end of sentence


@both
@pytest.mark.parametrize("effort", [None, "high"])
def test_parallel_calls(served: Served, stream: bool, effort: Any) -> None:
    more = {} if effort is None else {"reasoning_effort": effort}
    got = ask(served, "CALL", stream, tools=TOOLS, **more)
    assert got["content"] == "Looking." and got["reason"] == "tool_calls"
    assert [(name, json.loads(arguments)) for name, arguments, _ in got["calls"]] == [
        ("weather", json.loads(WEATHER)), ("now", {})
    ]  # fmt: skip
    assert len({call for _, _, call in got["calls"]}) == 2
    assert got["reasoning"] == (None if effort is None else "think first")
    alone = ask(served, "CALL", stream, tools=TOOLS, parallel_tool_calls=False)
    assert [name for name, _, _ in alone["calls"]] == ["weather"]


@both
def test_malformed_calls_are_text(served: Served, stream: bool) -> None:
    request = {"model": "scripted", "messages": [{"role": "user", "content": "BROKEN"}], "tools": TOOLS}
    if stream:
        chunks = list(served.openai.chat.completions.create(**request, stream=True))  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        choice = served.openai.chat.completions.create(**request).choices[0]  # type: ignore[call-overload]
        text, tools = choice.message.content, choice.message.tool_calls
        assert not tools and choice.finish_reason == "stop"
    assert text == "\n\n" + CALLS[:-20]


@both
def test_calls_before_the_reasoning_ends(served: Served, stream: bool) -> None:
    got = ask(served, "FORGOT", stream, tools=TOOLS, reasoning_effort="high")
    assert got["reasoning"] == "think" and [name for name, _, _ in got["calls"]] == ["weather", "now"]
    assert got["reason"] == "tool_calls"


@both
def test_tool_choice_none_offers_nothing(served: Served, stream: bool) -> None:
    got = ask(served, "hi", stream, tools=TOOLS, tool_choice="none")
    assert got["content"] == "Hello, 世界! 👋"
    shown = served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()["count"]
    assert got["usage"].prompt_tokens == shown


def test_a_conversation_with_results(served: Served) -> None:
    """What the API gave goes back as it is, and the next answer comes."""
    first = served.openai.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "CALL"}], tools=TOOLS, reasoning_effort="high"
    )
    message: Any = first.choices[0].message
    messages: Any = [{"role": "user", "content": "CALL"}, message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in message.tool_calls]
    answer = served.openai.chat.completions.create(model="scripted", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "It is sunny."


class Person(BaseModel):
    name: str
    age: int


@pytest.mark.parametrize("effort", ["none", "high"])
def test_json_by_the_clients_own_parser(served: Served, effort: Any) -> None:
    """Thinking doesn't break JSON mode: the reasoning is free, the answer is in the schema."""
    messages: Any = [{"role": "user", "content": "JSON"}]
    parsed = served.openai.chat.completions.parse(
        model="scripted", messages=messages, response_format=Person, reasoning_effort=effort
    )
    assert parsed.choices[0].message.parsed == Person(name="Ana", age=30)
    with served.openai.chat.completions.stream(
        model="scripted", messages=messages, response_format=Person, reasoning_effort=effort
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Ana", age=30)
    loose = ask(served, "JSON", False, response_format={"type": "json_object"}, reasoning_effort=effort)
    assert json.loads(loose["content"]) == {"name": "Ana", "age": 30}


@both
def test_stop_strings(served: Served, stream: bool) -> None:
    got = ask(served, "hi", stream, stop=["界", "👋"])
    assert got["content"] == "Hello, 世" and got["reason"] == "stop"
    raw = served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stop": ["界", "👋"]})
    assert raw.json()["choices"][0]["stop_reason"] == "界"


def test_completions(served: Served) -> None:
    create = served.openai.completions.create
    whole = create(model="scripted", prompt=["hi", "sun"], max_tokens=40, n=2, logprobs=1)
    assert [choice.text for choice in whole.choices] == ["Hello, 世界! 👋"] * 2 + ["It is sunny."] * 2
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    logprobs = whole.choices[2].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert "".join(logprobs.tokens[:-1]) == "It is sunny." and logprobs.text_offset[:3] == [0, 1, 2]
    text = [""] * 4
    for chunk in create(model="scripted", prompt=["hi", "sun"], max_tokens=40, n=2, stream=True):
        for choice in chunk.choices:
            text[choice.index] += choice.text
    assert text == [choice.text for choice in whole.choices]
    ids = served.post("/tokenize", {"prompt": "sun"}).json()["tokens"]
    echoed = create(model="scripted", prompt=ids, max_tokens=40, echo=True)
    assert echoed.choices[0].text == "sunIt is sunny."
    assert served.post("/detokenize", {"tokens": ids}).json() == {"prompt": "sun"}


def test_responses(served: Served) -> None:
    create = served.openai.responses.create
    whole: Any = create(model="scripted", input="CALL", tools=RESPONSE_TOOLS, reasoning={"effort": "high"})
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output_text == "Looking." and whole.status == "completed" and not whole.store
    assert whole.output[0].content[0].text == "think first"
    assert json.loads(whole.output[2].arguments) == json.loads(WEATHER)
    with served.openai.responses.stream(
        model="scripted", input="CALL", tools=RESPONSE_TOOLS, reasoning={"effort": "high"}
    ) as stream:
        events = list(stream)
        final: Any = stream.get_final_response()
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    assert final.output_text == "Looking."
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    # The items go back as they came, with the calls' results.
    items = [item.model_dump(exclude_none=True) for item in whole.output]
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "sun"}
               for item in items if item["type"] == "function_call"]  # fmt: skip
    again: Any = create(
        model="scripted", input=[{"role": "user", "content": "CALL"}, *items, *results], tools=RESPONSE_TOOLS
    )
    assert again.output_text == "It is sunny."
    parsed = served.openai.responses.parse(model="scripted", input="JSON", text_format=Person)
    assert parsed.output_parsed == Person(name="Ana", age=30)
    cut: Any = create(model="scripted", input="hi", max_output_tokens=3, instructions="Be brief.")
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage.output_tokens == 3 and cut.output_text == "Hel"
    logprobs: Any = create(model="scripted", input="hi", include=["message.output_text.logprobs"], top_logprobs=2)
    assert len(logprobs.output[0].content[0].logprobs[0].top_logprobs) == 2
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        create(model="scripted", input="hi", previous_response_id="resp_1")


RESPONSE_TOOLS: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]


FORMS: Any = {
    "type": "object",
    "properties": {"unit": {"type": "string", "enum": ["c", "f"]}, "exact": {"type": "boolean"}},
    "required": ["unit", "exact"],
    "additionalProperties": False,
}


@both
@pytest.mark.parametrize("effort", ["none", "high"])
def test_random_weights_keep_to_the_form(stream: bool, effort: Any) -> None:
    """Not scripted: a tiny V4 of random weights, which says gibberish, but must call a tool or write JSON."""
    server = Served(ModelResponder(build_llm(max_num_seqs=2, cache_tokens=8192)), "scripted")
    # A random model never ends its reasoning by itself: the bias makes </think> likely.
    end = server.engine.tokenizer and server.engine.tokenizer.id_of("</think>")
    more = {"reasoning_effort": effort, "seed": 4, "logit_bias": {str(end): 12}, "max_completion_tokens": 2000}
    tools = [{"type": "function", "function": {"name": name, "parameters": FORMS}} for name in ("heat", "cool")]
    try:
        named = {"type": "function", "function": {"name": "cool"}}
        for choice in ("required", named):
            got = ask(server, "x", stream, tools=tools, tool_choice=choice, parallel_tool_calls=False, **more)
            ((name, arguments, _),) = got["calls"]
            assert got["reason"] == "tool_calls" and not got["content"] and name in ("heat", "cool")
            assert choice == "required" or name == "cool"
            called = json.loads(arguments)
            assert called["unit"] in ("c", "f") and isinstance(called["exact"], bool) and len(called) == 2
        form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": FORMS}}
        got = ask(server, "x", stream, response_format=form, **more)
        assert json.loads(got["content"]).keys() == {"unit", "exact"} and got["reason"] == "stop"
    finally:
        server.stop()


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"choice": ["north", "south"]}}, "north|south"),
    ({"structured_outputs": {"regex": "[a-f]{2}-[0-9]{3}"}}, "[a-f]{2}-[0-9]{3}"),
    ({"structured_outputs": {"grammar": 'start: ("ab" | "cd") "!"'}}, "(ab|cd)!"),
    ({"structured_outputs": {"json": {"type": "integer", "minimum": 10, "maximum": 99}}}, "[1-9][0-9]"),
    ({"guided_choice": ["up", "down"]}, "up|down"),
    ({"guided_regex": "x{3}"}, "xxx"),
    ({"guided_json": {"enum": ["a", "b"]}}, '"[ab]"'),
    ({"guided_grammar": 'start: "yes" | "no"'}, "yes|no"),
]


@both
def test_vllms_structured_outputs(stream: bool) -> None:
    """A tiny V4 of random weights keeps to each form; by /v1/completions as by chat."""
    server = Served(ModelResponder(build_llm(max_num_seqs=2, cache_tokens=8192)), "scripted")
    try:
        for fields, pattern in FIELDS:
            got = ask(server, "x", stream, extra_body=fields, max_completion_tokens=50, seed=1)
            assert re.fullmatch(pattern, got["content"]) and got["reason"] == "stop", fields
            whole = server.openai.completions.create(
                model="scripted", prompt="x", max_tokens=50, seed=1, extra_body=fields
            )
            assert re.fullmatch(pattern, whole.choices[0].text), fields
    finally:
        server.stop()


def test_half_a_surrogate_pair_is_no_crash(served: Served) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    kind = {"content-type": "application/json"}
    refused = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=kind)
    assert refused.status_code == 400 and "surrogate" in refused.json()["error"]["message"]
