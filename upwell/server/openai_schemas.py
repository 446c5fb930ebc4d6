"""Bodies of /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from upwell.chat.grammar import JSON_OBJECT
from upwell.engine import SamplingParams
from upwell.errors import InputError
from upwell.server.responders import Conversation
from upwell.server.sampling import Effort, SamplingFields, StreamOptions, Strict, thinking_for


class JSONSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def as_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that the reply must follow; None for plain text. Every schema is followed strictly."""
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise InputError("response_format.json_schema is missing its schema")
            return self.json_schema.schema_
        if self.json_schema is not None:
            raise InputError(f"response_format.json_schema is given with type {self.type!r}")
        return JSON_OBJECT if self.type == "json_object" else None


class Function(Strict):
    name: str = Field(pattern=r'^[^"<>\n]+$')  # what V4's markup can write
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: Function

    def as_dict(self) -> dict[str, Any]:
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class Thinking(Strict):
    """DeepSeek's own switch."""

    type: Literal["enabled", "disabled"]


class ChatRequest(SamplingFields):
    """OpenAI's fields, vLLM's sampling fields and continue_final_message, DeepSeek's thinking."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool = False
    # They say nothing about the answer: who asks on behalf of whom, the caller's own notes, whose caches to use.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    def conversation(self) -> Conversation:
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        thinking = thinking_for(self.reasoning_effort)
        if self.thinking is not None:
            on = self.thinking.type == "enabled"
            thinking = (thinking if thinking != "off" else "high") if on else "off"
        return Conversation(
            self.messages,
            thinking,
            [tool.as_dict() for tool in self.tools or []],
            choice or "auto",
            self.parallel_tool_calls is not False,
            None if self.response_format is None else self.response_format.as_schema(),
            self.continue_final_message,
        )

    def params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs is given without logprobs", "set logprobs to true")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)


Token = Annotated[int, Field(ge=0)]


class CompletionRequest(SamplingFields):
    """OpenAI's fields and vLLM's sampling fields. Without max_tokens 16 are made, as with OpenAI."""

    model: str | None = None
    prompt: str | list[str] | list[Token] | list[list[Token]]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    user: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One text or token list each. Raises InputError where there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InputError("prompt is [], must have something in it")
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    def params(self) -> SamplingParams:
        return self.sampling(self.max_tokens, self.logprobs)
