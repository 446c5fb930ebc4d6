"""Body of Anthropic's /v1/messages, and what it means as a conversation."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from upwell.engine import SamplingParams
from upwell.errors import InputError
from upwell.server.responders import Conversation
from upwell.server.sampling import Strict, thinking_for


class Block(Strict):
    """A part of a message. `cache_control` is a hint to Anthropic's caches; ours needs none."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedBlock(Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    model_config = ConfigDict(extra="ignore")  # newer clients say who the caller was

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


AnyBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class Tool(Block):
    model_config = ConfigDict(extra="ignore")  # hints on how a tool's input is streamed

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r'^[^"<>\n]+$')
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(Strict):
    """`budget_tokens` isn't enforced: V4 has efforts, no budgets. From 32,000 on it is the highest effort."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: str | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Strict):
    """What /v1/messages/count_tokens takes."""

    model: str
    messages: list[Message] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    def conversation(self) -> Conversation:
        """In the common terms: OpenAI's messages."""
        messages = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        for message in self.messages:
            messages += _plain_messages(message)
        choice, parallel = "auto", True
        if self.tool_choice is not None:
            parallel = not self.tool_choice.disable_parallel_tool_use
            choice = {"any": "required", "tool": self.tool_choice.name or ""}.get(
                self.tool_choice.type, self.tool_choice.type
            )
        config = self.output_config or OutputConfig()
        effort = None
        if self.thinking is not None and self.thinking.type != "disabled":
            budget = self.thinking.budget_tokens or 0
            effort = config.effort or ("max" if budget >= 32_000 else "high")
        return Conversation(
            messages,
            thinking_for(effort),
            [_tool(tool) for tool in self.tools or []],
            choice,
            parallel,
            None if config.format is None else config.format.schema_,
            continue_last=self.messages[-1].role == "assistant",
        )


class MessagesRequest(CountRequest):
    max_tokens: int
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    # They say nothing about the answer.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def params(self) -> SamplingParams:
        if self.temperature is not None and self.temperature > 1:
            raise InputError(f"temperature is {self.temperature:g}, must be at most 1")
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**chosen, max_tokens=self.max_tokens, stop=self.stop_sequences or ())


def _plain_messages(message: Message) -> list[dict[str, Any]]:
    """One message as OpenAI's: results of tools become messages of their own, before the text beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            reasoning.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ToolResultBlock):
            text = _text(block.content or "")
            text = f"Error: {text}" if block.is_error else text
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    if message.role != "user":
        plain: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
        if results:
            raise InputError(f"messages has a tool_result in a message of role {message.role!r}")
        if reasoning:
            plain["reasoning_content"] = "".join(reasoning)
        if calls:
            plain["tool_calls"] = calls
        return [plain]
    if calls:
        raise InputError("messages has a tool_use in a message of role 'user'")
    return results + ([{"role": "user", "content": "\n\n".join(texts)}] if texts or not results else [])


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}
