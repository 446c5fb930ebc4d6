"""Body of OpenAI's /v1/responses, and what it means as a conversation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from upwell.chat.grammar import JSON_OBJECT
from upwell.engine import SamplingParams
from upwell.errors import InputError
from upwell.server.responders import Conversation
from upwell.server.sampling import Effort, Strict, thinking_for

_TEXTS = ("input_text", "output_text", "text")


class ReasoningConfig(Strict):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # reasoning comes whole: there is nothing to choose


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(Strict):
    format: TextFormat = TextFormat()


class FunctionTool(Strict):
    type: Literal["function"]
    name: str = Field(pattern=r'^[^"<>\n]+$')
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Strict):
    type: Literal["function"]
    name: str


class ResponsesRequest(Strict):
    """Nothing is kept between requests: previous_response_id is refused, and the whole input comes each time."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    # They say nothing about the answer; `store` true keeps nothing here, and the answer says so.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or [])

    def conversation(self) -> Conversation:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += input_messages(self.input)
        choice = self.tool_choice.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type", "strict"})}
            for tool in self.tools or []
        ]
        effort = None if self.reasoning is None else self.reasoning.effort
        return Conversation(
            messages, thinking_for(effort), tools, choice or "auto", self.parallel_tool_calls is not False,
            self._schema(),
        )  # fmt: skip

    def params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise InputError(
                f"top_logprobs is {self.top_logprobs}, but logprobs aren't asked for",
                'add "message.output_text.logprobs" to include',
            )
        given = {"temperature": self.temperature, "top_p": self.top_p}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        logprobs = (self.top_logprobs or 0) if self.wants_logprobs else None
        return SamplingParams(**chosen, max_tokens=self.max_output_tokens, logprobs=logprobs)

    def _schema(self) -> dict[str, Any] | None:
        if self.text is None or self.text.format.type == "text":
            return None
        if self.text.format.type == "json_object":
            return dict(JSON_OBJECT)
        if self.text.format.schema_ is None:
            raise InputError("text.format.schema is missing")
        return self.text.format.schema_


def input_messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as OpenAI's chat messages: reasoning, text and calls, in this order, are one message of the assistant."""
    messages: list[dict[str, Any]] = []

    def assistant(*, before: tuple[str, ...]) -> dict[str, Any]:
        """The assistant's message under way, if it has nothing yet of what comes after this part; else a new one."""
        last = messages[-1] if messages else None
        if last is None or last["role"] != "assistant" or any(last.get(name) for name in before):
            last = {"role": "assistant", "content": ""}
            messages.append(last)
        return last

    for k, item in enumerate(items):
        where = f"input[{k}]"
        kind = item.get("type", "message")
        if kind == "message":
            text = _text(item.get("content"), where)
            if item.get("role") == "assistant":
                assistant(before=("content", "tool_calls"))["content"] = text
            else:
                messages.append({"role": item.get("role"), "content": text})
        elif kind == "reasoning":
            text = _reasoning(item.get("content") or item.get("summary") or [], where)
            assistant(before=("reasoning_content", "content", "tool_calls"))["reasoning_content"] = text
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
            call = {"id": item.get("call_id", ""), "type": "function", "function": function}
            assistant(before=()).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            text = _text(item.get("output", ""), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id", ""), "content": text})
        else:
            raise InputError(f"{where}.type is {kind!r}", "use message, reasoning, function_call, function_call_output")
    if not messages:
        raise InputError("input is [], must have something in it")
    return messages


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where}.content is a {type(content).__name__}, must be text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise InputError(f"{where}.content[{i}] is of type {kind!r}", "V4 reads text parts only")
        texts.append(part["text"])
    return "".join(texts)


def _reasoning(parts: Any, where: str) -> str:
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        raise InputError(f"{where}.content is {parts!r}, must be a list of reasoning_text parts")
    return "".join(part["text"] for part in parts)
