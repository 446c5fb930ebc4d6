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
    """`thinking`: the prompt ended with <think>, so the reply opens with reasoning. `tools`: calls are looked for.

    V4 sometimes calls tools without ending its reasoning. A block of calls with which a reply ends therefore counts,
    wherever it stands; one that is followed by more reasoning was only thought of, and stays reasoning.
    """

    def __init__(self, thinking: bool, tools: bool = True) -> None:
        self._state = _State.REASONING if thinking else _State.CONTENT
        self._tools = tools
        self._held = ""
        self._searched = 0  # of what is held, up to where the tag that is looked for can't begin
        self._calls = 0

    def push(self, text: str) -> list[Event]:
        if not self._tools and self._state is _State.CONTENT and not self._held:  # nothing to look for
            return [Content(text)] if text else []
        self._held += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """What was held back: a call that ends the reasoning, or the start of a tag that never ended."""
        text, self._held = self._held, ""
        if not text:
            return []
        if self._state is not _State.REASONING:
            return [Content(text)]
        if text.removeprefix(_BREAK).startswith(TOOL_CALLS):
            end = text.find(END_TOOL_CALLS) + len(END_TOOL_CALLS)
            calls = self._read_block(text[:end]) if end >= len(END_TOOL_CALLS) else []
            if calls and not text[end:].strip():
                return calls
        return [Reasoning(text)]

    def _advance(self, events: list[Event]) -> bool:
        """Consume what is certain; True if the state changed and there may be more."""
        if self._state is _State.REASONING:
            return self._reasoning(events)
        if self._state is _State.CONTENT:
            return self._content(events)
        end = self._find(END_TOOL_CALLS)
        if end < 0:
            return False
        end += len(END_TOOL_CALLS)
        block = self._held[:end]
        events += self._read_block(block) or [Content(block)]
        self._drop(end)
        self._state = _State.CONTENT
        return True

    def _reasoning(self, events: list[Event]) -> bool:
        """Up to </think>. A block of calls is held back until it is clear whether the reply ends with it."""
        end = self._find(END_THINK)
        block = self._held.find(TOOL_CALLS, 0, end if end >= 0 else None) if self._tools else -1
        if block >= 0:
            self._release(self._block_start(block), Reasoning, events)
            return self._block_in_reasoning(events)
        if end < 0:
            tags = (END_THINK, *((_BREAK + TOOL_CALLS, TOOL_CALLS) if self._tools else ()))
            self._release(len(self._held) - max(overlap(self._held, tag) for tag in tags), Reasoning, events)
            return False
        self._release(end, Reasoning, events)
        self._drop(len(END_THINK))
        self._state = _State.CONTENT
        return True

    def _block_in_reasoning(self, events: list[Event]) -> bool:
        """What is held begins with a block of calls: what follows the block decides what it is."""
        end = self._held.find(END_THINK)
        close = self._held.find(END_TOOL_CALLS, 0, end if end >= 0 else None)
        if close < 0:  # not closed yet; or never, as the reasoning ends before
            self._release(max(end, 0), Reasoning, events)
            return end >= 0
        close += len(END_TOOL_CALLS)
        rest = self._held[close:].lstrip()
        if rest != END_THINK and END_THINK.startswith(rest):
            return False  # nothing follows yet, or the beginning of </think>
        calls = self._read_block(self._held[:close]) if rest.startswith(END_THINK) else []
        if not calls:
            self._release(close, Reasoning, events)
            return True
        events += calls
        self._drop(end + len(END_THINK))
        self._state = _State.CONTENT
        return True

    def _content(self, events: list[Event]) -> bool:
        if not self._tools:
            self._release(len(self._held), Content, events)
            return False
        at = self._held.find(TOOL_CALLS)
        if at < 0:
            keep = max(overlap(self._held, _BREAK + TOOL_CALLS), overlap(self._held, TOOL_CALLS))
            self._release(len(self._held) - keep, Content, events)
            return False
        # The line breaks before a block belong to it; they stay held, in case it is no block after all.
        self._release(self._block_start(at), Content, events)
        self._state = _State.CALLS
        return True

    def _block_start(self, at: int) -> int:
        return at - len(_BREAK) if self._held[:at].endswith(_BREAK) else at

    def _read_block(self, block: str) -> list[Event]:
        """The calls of a whole block; none if anything in it isn't well-formed."""
        inner = block.removeprefix(_BREAK)[len(TOOL_CALLS) : -len(END_TOOL_CALLS)]
        calls = _parse_calls(inner, self._calls)
        self._calls += len(calls)
        return calls

    def _find(self, tag: str) -> int:
        """Where `tag` is in what is held, searching no character twice: a long argument comes token by token."""
        at = self._held.find(tag, max(0, self._searched - len(tag) + 1))
        self._searched = len(self._held) if at < 0 else 0
        return at

    def _release(self, size: int, kind: type[Reasoning] | type[Content], events: list[Event]) -> None:
        if size:
            events.append(kind(self._held[:size]))
            self._drop(size)

    def _drop(self, size: int) -> None:
        self._held, self._searched = self._held[size:], 0


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
