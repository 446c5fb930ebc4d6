"""V4's prompt encoding and the parser of replies.

Expected prompts: the examples of the published encoding (deepseek-ai/DeepSeek-V4-Flash, encoding/README.md).
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upwell.chat import Content, Reasoning, ReplyParser, ToolCall, encode_messages
from upwell.chat.parsing import Event
from upwell.errors import InputError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CALLS = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Bern "x"\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def test_plain_chat() -> None:
    messages = [{"role": "system", "content": "You are a helpful assistant."}, user("What is 2+2?")]
    start = f"{BOS}You are a helpful assistant.<｜User｜>What is 2+2?<｜Assistant｜>"
    assert encode_messages(messages) == start + "</think>"
    assert encode_messages(messages, thinking="high") == start + "<think>"
    longest = encode_messages(messages, thinking="max")
    assert longest.startswith(BOS + "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n")
    assert longest.endswith("unchecked.\n\n" + start.removeprefix(BOS) + "<think>")


def test_earlier_reasoning_is_dropped_unless_there_are_tools() -> None:
    messages = [user("a"), assistant("b", reasoning_content="r"), user("c")]
    assert encode_messages(messages, thinking="high") == (
        f"{BOS}<｜User｜>a<｜Assistant｜></think>b{EOS}<｜User｜>c<｜Assistant｜><think>"
    )
    kept = f"<｜User｜>a<｜Assistant｜><think>r</think>b{EOS}<｜User｜>c<｜Assistant｜><think>"
    assert encode_messages(messages, thinking="high", drop_thinking=False) == BOS + kept
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with_tools = encode_messages(messages, thinking="high", tools=tools)
    assert with_tools.startswith(BOS + "\n\n## Tools\n\n") and with_tools.endswith(kept)
    assert '### Available Tool Schemas\n\n{"name": "f", "parameters": {"type": "object"}}\n\nYou MUST' in with_tools
    assert encode_messages(messages).count("</think>") == 2  # off: never reasoning


def test_tool_calls_and_results_in_the_calls_order() -> None:
    calls = [
        {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Bern \\"x\\"\\n", "days": [1, 2]}'}},
        {"id": "2", "function": {"name": "now", "arguments": ""}},
    ]
    messages = [
        user("q"),
        assistant(None, tool_calls=calls),
        {"role": "tool", "tool_call_id": "2", "content": "noon"},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        user("and?"),
    ]
    assert encode_messages(messages) == (
        f"{BOS}<｜User｜>q<｜Assistant｜></think>\n\n{CALLS}{EOS}"
        "<｜User｜><tool_result>sun</tool_result>\n\n<tool_result>noon</tool_result>\n\nand?<｜Assistant｜></think>"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role is 'robot'"),
        (["hi"], r"messages\[0\] is 'hi'"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is a int"),
        ([user("x"), {"role": "user", "content": [{"type": "image_url"}]}], r"messages\[1\].content\[0\].*'image_url'"),
        ([assistant("", tool_calls=[{}])], r"messages\[0\].tool_calls\[0\] has no function"),
        ([assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])], "arguments isn't JSON"),
        ([assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[]"}}])], "must be a JSON object"),
    ],
)
def test_refused_messages(messages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_messages(messages)


def parse(text: str, cuts: list[int] = [], thinking: bool = False, tools: bool = True) -> list[Event]:  # noqa: B006
    """Events of `text` fed in pieces, neighbours of a kind joined."""
    parser = ReplyParser(thinking, tools)
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    events = [e for a, b in pairwise(bounds) for e in parser.push(text[a:b])] + parser.finish()
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, (Reasoning, Content)) and isinstance(last, type(event)):
            joined[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            joined.append(event)
    return joined


def test_reasoning_then_content() -> None:
    reply = "Simple arithmetic.</think>2 + 2 = 4."
    assert parse(reply, thinking=True) == [Reasoning("Simple arithmetic."), Content("2 + 2 = 4.")]
    assert parse(reply) == [Content(reply)]  # not asked to think: a stray tag is text
    assert parse("never ends", thinking=True) == [Reasoning("never ends")]
    assert parse("ends in half a tag</thi", thinking=True) == [Reasoning("ends in half a tag</thi")]


@given(st.lists(st.integers(0, 500), max_size=12))
def test_calls_at_any_cut(cuts: list[int]) -> None:
    text = "why</think>I'll look.\n\n" + CALLS
    arguments = json.dumps({"city": 'Bern "x"\n', "days": [1, 2]})
    expected = [Reasoning("why"), Content("I'll look."), ToolCall(0, "weather", arguments), ToolCall(1, "now", "{}")]
    assert parse(text, cuts, thinking=True) == expected
    assert parse(CALLS + "\n\n" + CALLS, cuts)[2:] == [ToolCall(2, "weather", arguments), ToolCall(3, "now", "{}")]
    assert parse(text, cuts, tools=False) == [Content(text)]


@pytest.mark.parametrize(
    "text",
    [
        "\n\n<｜DSML｜tool_calls>\nnot a call</｜DSML｜tool_calls> more",
        "a\n\n" + CALLS[:-5],
        CALLS.replace("[1, 2]", "[1, 2"),
        CALLS.replace("[1, 2]", "NaN"),
        CALLS.replace('string="true"', 'string="maybe"'),
        CALLS.replace('name="city"', 'name="days"'),
        "\n\n<｜DSML｜tool_c", "a\n\n", "\n", "<｜DSML｜tool_calls></｜DSML｜tool_calls>",
    ],
)  # fmt: skip
def test_what_is_no_call_comes_back_as_text(text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert parse(text, cuts) == [Content(text)]


PIECES = ["</think>", "<think>", "\n", "x", "<｜DSML｜", "｜DSML｜tool_calls>", "<｜DSML｜tool_calls>",
          "</｜DSML｜tool_calls>", '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", CALLS, "<"]  # fmt: skip


CUTS = st.lists(st.integers(0, 900), max_size=10)


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), CUTS, st.booleans())
def test_no_text_is_lost_and_cuts_do_not_matter(text: str, cuts: list[int], thinking: bool) -> None:
    events = parse(text, cuts, thinking)
    assert events == parse(text, [], thinking)
    if not any(isinstance(event, ToolCall) for event in events):
        whole = "".join(event.text for event in events if not isinstance(event, ToolCall))
        split = any(isinstance(event, Reasoning) for event in events) or (thinking and text.startswith("</think>"))
        ended = text.replace("</think>", "", 1) if split and "</think>" in text else text
        assert whole == (ended if thinking else text)


BLOCK = "\n\n" + CALLS
ARGUMENTS = json.dumps({"city": 'Bern "x"\n', "days": [1, 2]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # V4 forgot </think>, or says it after the calls: the calls count (vLLM 45862, llama.cpp 25891).
        ("why" + BLOCK, [Reasoning("why"), ToolCall(0, "weather", ARGUMENTS), ToolCall(1, "now", "{}")]),
        ("why" + BLOCK + "\n</think>x", [Reasoning("why"), ToolCall(0, "weather", ARGUMENTS), ToolCall(1, "now", "{}"),
                                        Content("x")]),
        # Calls that it goes on to think about were thought of, not made.
        ("why" + BLOCK + " no, wait</think>x", [Reasoning("why" + BLOCK + " no, wait"), Content("x")]),
        ("w" + BLOCK + BLOCK, [Reasoning("w" + BLOCK), ToolCall(0, "weather", ARGUMENTS), ToolCall(1, "now", "{}")]),
        # Half a block doesn't keep the answer after it in the reasoning.
        ("why\n\n<｜DSML｜tool_calls>\n</think>x", [Reasoning("why\n\n<｜DSML｜tool_calls>\n"), Content("x")]),
        ("why\n\n<｜DSML｜tool_calls>", [Reasoning("why\n\n<｜DSML｜tool_calls>")]),
    ],
)  # fmt: skip
def test_calls_inside_the_reasoning(text: str, expected: list[Event]) -> None:
    for cuts in ([], list(range(len(text)))):
        assert parse(text, cuts, thinking=True) == expected


TEXT = st.text(st.sampled_from("<｜>/\n\"=x 界") | st.characters(), max_size=60)


@given(st.lists(TEXT | st.sampled_from(PIECES), max_size=8).map("".join), st.data(), st.booleans(), st.booleans())
def test_any_text_in_any_split_is_parsed_as_whole(text: str, data: Any, thinking: bool, tools: bool) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert parse(text, cuts, thinking, tools) == parse(text, [], thinking, tools)
    assert parse(text, list(range(len(text))), thinking, tools) == parse(text, [], thinking, tools)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.characters(exclude_characters='"<>\n', exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3), st.data())
def test_calls_as_encoded_are_read_back(calls: list[tuple[str, dict[str, Any]]], data: Any) -> None:
    """What the encoder, which equals DeepSeek's own, writes for a call is what the parser reads, at any split."""
    made = [{"id": str(k), "function": {"name": name, "arguments": json.dumps(arguments)}}
            for k, (name, arguments) in enumerate(calls)]  # fmt: skip
    prompt = encode_messages([user("q"), assistant("Text.", tool_calls=made)], continue_last=True)
    text = prompt.split("</think>", 1)[1]
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    content, *rest = parse(text, cuts)
    assert content == Content("Text.")
    assert [(e.name, json.loads(e.arguments)) for e in rest if isinstance(e, ToolCall)] == calls
    assert len(rest) == len(calls)


def test_response_format_and_continuation() -> None:
    schema = {"type": "object"}
    asked = encode_messages([user("a")], response_format=schema)
    assert asked == (
        f"{BOS}\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object"}<｜User｜>a<｜Assistant｜></think>'
    )
    begun = encode_messages([user("a"), assistant("b")], continue_last=True)
    assert begun == f"{BOS}<｜User｜>a<｜Assistant｜></think>b"
    with pytest.raises(InputError, match="nothing to continue"):
        encode_messages([user("a")], continue_last=True)
