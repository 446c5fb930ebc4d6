"""From a conversation of OpenAI-style messages to the text V4 continues.

    [bos][max effort][system]<｜User｜>text<｜Assistant｜></think>reply[eos]<｜User｜>text<｜Assistant｜><think>

A turn of the assistant opens with </think> (no reasoning) or <think>reasoning</think>. Reasoning of turns before the
last user turn is dropped, unless the conversation has tools: there it belongs to the chain of calls. A reply in
progress can be continued: then the last turn stays open and nothing is added after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from upwell.chat.protocol import (
    ASSISTANT,
    BOS,
    END_THINK,
    END_TOOL_CALLS,
    EOS,
    LATEST_REMINDER,
    MAX_EFFORT,
    THINK,
    TOOL_CALLS,
    USER,
    format_block,
    tools_block,
)
from upwell.errors import InputError

Thinking = Literal["off", "high", "max"]
Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass(frozen=True)
class _Turn:
    """One turn as V4 sees it. `text` of a user turn holds tool results too; "calls" are rendered tool calls."""

    role: Literal["system", "user", "assistant", "latest_reminder"]
    text: str
    reasoning: str = ""
    calls: str = ""


def encode_messages(
    messages: Sequence[Message],
    thinking: Thinking = "off",
    tools: Sequence[Mapping[str, Any]] = (),
    drop_thinking: bool = True,
    response_format: Mapping[str, Any] | None = None,
    continue_last: bool = False,
) -> str:
    """The prompt for the next reply. `tools` are OpenAI's {"type": "function", "function": {...}} or the inner object.

    `response_format` is the JSON schema that the reply must follow. With `continue_last` the last message, the
    assistant's, is the beginning of the reply. Raises InputError naming the message that can't be encoded.
    """
    if thinking not in ("off", "high", "max"):
        raise InputError(f"thinking is {thinking!r}, must be 'off', 'high' or 'max'")
    if not messages:
        raise InputError("messages is empty", "give at least one message")
    turns = _turns(messages)
    blocks = [tools_block("\n".join(_tool_schemas(tools)))] if tools else []
    if response_format is not None:
        blocks.append(format_block(json.dumps(response_format, ensure_ascii=False)))
    turns = _with_blocks(turns, blocks)
    if continue_last and turns[-1].role != "assistant":
        raise InputError("the last message isn't the assistant's", "there is nothing to continue")
    keep_from = 0
    if drop_thinking and not tools:
        keep_from = max((k for k, turn in enumerate(turns) if turn.role == "user"), default=-1) + 1
    parts = [BOS, MAX_EFFORT if thinking == "max" else ""]
    for k, turn in enumerate(turns):
        if turn.role == "system":
            parts.append(turn.text)
        elif turn.role == "latest_reminder":
            parts.append(LATEST_REMINDER + turn.text)
        elif turn.role == "user":
            parts.append(USER + turn.text)
        else:
            opening = END_THINK
            if thinking != "off" and k >= keep_from:
                opening = THINK + turn.reasoning + END_THINK
            parts.append(ASSISTANT + opening + turn.text + turn.calls)
            if continue_last and k == len(turns) - 1:
                return "".join(parts)
            parts.append(EOS)
    parts.append(ASSISTANT + (END_THINK if thinking == "off" else THINK))
    return "".join(parts)


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    """Messages as turns: developer is system, tool results join the user turn they belong to, in the calls' order."""
    turns: list[_Turn] = []
    blocks: list[str] = []  # of the user turn that is being put together
    results: list[tuple[int, str]] = []  # (place of the call, block) since the last assistant message
    order: dict[str, int] = {}

    def close_results() -> None:
        blocks.extend(block for _, block in sorted(results, key=lambda r: r[0]))
        results.clear()

    def close_user() -> None:
        close_results()
        if blocks:
            turns.append(_Turn("user", "\n\n".join(blocks)))
            blocks.clear()

    for k, message in enumerate(messages):
        where = f"messages[{k}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where} is {message!r}, must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"{where}.role is {role!r}, must be one of {', '.join(ROLES)}")
        # A tool's parts are set apart as V4's results are; other parts are one text.
        text = _text(message.get("content"), where, "\n\n" if role == "tool" else "")
        if role == "tool":
            call = str(message.get("tool_call_id", ""))
            results.append((order.get(call, len(order)), f"<tool_result>{text}</tool_result>"))
        elif role == "user":
            close_results()
            blocks.append(text)
        else:
            close_user()
            if role == "assistant":
                calls = message.get("tool_calls") or []
                if not isinstance(calls, list):
                    raise InputError(f"{where}.tool_calls is {calls!r}, must be a list")
                order = {str(call.get("id", "")): i for i, call in enumerate(calls) if isinstance(call, Mapping)}
                reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
                turns.append(_Turn("assistant", text, str(reasoning), _render_calls(calls, where)))
            else:
                turns.append(_Turn("latest_reminder" if role == "latest_reminder" else "system", text))
    close_user()
    return turns


def _text(content: Any, where: str, between: str = "") -> str:
    """A message's content: text, None, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where}.content is a {type(content).__name__}, must be text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InputError(f"{where}.content[{i}] is of type {kind!r}", "V4 reads text parts only")
        texts.append(part["text"])
    return between.join(texts)


def _tool_schemas(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    schemas = []
    for k, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"tools[{k}] has no function with a name")
        schemas.append(json.dumps(function, ensure_ascii=False))
    return schemas


def _with_blocks(turns: list[_Turn], blocks: Sequence[str]) -> list[_Turn]:
    """The blocks at the end of the first system turn; a conversation without one gets an empty one."""
    if not blocks:
        return turns
    at = next((k for k, turn in enumerate(turns) if turn.role == "system"), None)
    if at is None:
        turns, at = [_Turn("system", ""), *turns], 0
    system = _Turn("system", "\n\n".join([turns[at].text, *blocks]))
    return [*turns[:at], system, *turns[at + 1 :]]


def _render_calls(calls: Any, where: str) -> str:
    """An assistant message's tool calls in V4's markup; "" for none."""
    if not calls:
        return ""
    lines = ["\n\n" + TOOL_CALLS]
    for i, call in enumerate(calls):
        place = f"{where}.tool_calls[{i}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{place} has no function with a name")
        lines.append(f'<｜DSML｜invoke name="{function["name"]}">')
        arguments = _arguments(function.get("arguments"), place)
        if not arguments:
            lines.append("")  # the published encoding leaves the line of the arguments empty
        for name, value in arguments.items():
            is_text = isinstance(value, str)
            shown = value if is_text else json.dumps(value, ensure_ascii=False)
            flag = "true" if is_text else "false"
            lines.append(f'<｜DSML｜parameter name="{name}" string="{flag}">{shown}</｜DSML｜parameter>')
        lines.append("</｜DSML｜invoke>")
    return "\n".join([*lines, END_TOOL_CALLS])


def _arguments(arguments: Any, place: str) -> Mapping[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}.function.arguments isn't JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise InputError(f"{place}.function.arguments is {arguments!r}, must be a JSON object")
    return arguments
