"""A reply taken apart as it streams: reasoning, content, tool calls.

A pure state machine: push() text in any pieces, get events; finish() gives what was held back. No text is ever lost:
what looks like a call and isn't one comes back as content. Only the markup of well-formed calls, the two line breaks
before it and the </think> that ends the reasoning disappear.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum

from upwell.chat.overlap import overlap
from upwell.chat.protocol import END_THINK, END_TOOL_CALLS, TOOL_CALLS


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call; `arguments` is a JSON object as text."""

    index: int
    name: str
    arguments: str


Event = Reasoning | Content | ToolCall


class _State(Enum):
    REASONING = "reasoning"
    CONTENT = "content"
    CALLS = "calls"


_INVOKE = re.compile(r'\s*<｜DSML｜invoke name="([^"]+)">(.*?)</｜DSML｜invoke>', re.DOTALL)
_PARAMETER = re.compile(
    r'\s*<｜DSML｜parameter name="([^"]+)" string="(true|false)">(.*?)</｜DSML｜parameter>', re.DOTALL
)
_BREAK = "\n\n"


class ReplyParser:
    """`thinking`: the prompt ended with <think>, so the reply opens with reasoning. `tools`: calls are looked for."""

    def __init__(self, thinking: bool, tools: bool = True) -> None:
        self._state = _State.REASONING if thinking else _State.CONTENT
        self._tools = tools
        self._held = ""
        self._calls = 0

    def push(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """What was held back: the start of a tag that never ended."""
        text, self._held = self._held, ""
        if not text:
            return []
        return [Reasoning(text) if self._state is _State.REASONING else Content(text)]

    def _advance(self, events: list[Event]) -> bool:
        """Consume what is certain; True if the state changed and there may be more."""
        if self._state is _State.REASONING:
            return self._until(END_THINK, Reasoning, _State.CONTENT, events)
        if self._state is _State.CONTENT:
            return self._tools_or_text(events)
        end = self._held.find(END_TOOL_CALLS)
        if end < 0:
            return False
        block, rest = self._held[: end + len(END_TOOL_CALLS)], self._held[end + len(END_TOOL_CALLS) :]
        inner = block.removeprefix(_BREAK)[len(TOOL_CALLS) : -len(END_TOOL_CALLS)]
        calls = _parse_calls(inner, self._calls)
        events += calls or [Content(block)]
        self._calls += len(calls)
        self._held, self._state = rest, _State.CONTENT
        return True

    def _until(self, tag: str, kind: type[Reasoning], after: _State, events: list[Event]) -> bool:
        at = self._held.find(tag)
        if at < 0:
            self._release(len(self._held) - overlap(self._held, tag), kind, events)
            return False
        self._release(at, kind, events)
        self._held, self._state = self._held[len(tag) :], after
        return True

    def _tools_or_text(self, events: list[Event]) -> bool:
        if not self._tools:
            self._release(len(self._held), Content, events)
            return False
        at = self._held.find(TOOL_CALLS)
        if at < 0:
            keep = max(overlap(self._held, _BREAK + TOOL_CALLS), overlap(self._held, TOOL_CALLS))
            self._release(len(self._held) - keep, Content, events)
            return False
        # The line breaks before a block belong to it; they stay held, in case it is no block after all.
        start = at - len(_BREAK) if self._held[:at].endswith(_BREAK) else at
        self._release(start, Content, events)
        self._state = _State.CALLS
        return True

    def _release(self, size: int, kind: type[Reasoning] | type[Content], events: list[Event]) -> None:
        if size:
            events.append(kind(self._held[:size]))
            self._held = self._held[size:]


def _parse_calls(inner: str, first: int) -> list[Event]:
    """The calls of a block, numbered from `first`; none if anything in it isn't well-formed."""
    calls: list[Event] = []
    at = 0
    while match := _INVOKE.match(inner, at):
        arguments = _parse_parameters(match[2])
        if arguments is None:
            return []
        calls.append(ToolCall(first + len(calls), match[1], json.dumps(arguments, ensure_ascii=False)))
        at = match.end()
    return [] if inner[at:].strip() else calls


def _parse_parameters(inner: str) -> dict[str, object] | None:
    arguments: dict[str, object] = {}
    at = 0
    while match := _PARAMETER.match(inner, at):
        name, is_text, value = match.groups()
        if name in arguments:
            return None
        try:
            arguments[name] = value if is_text == "true" else json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
        at = match.end()
    return None if inner[at:].strip() else arguments


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} isn't JSON")
