"""Request bodies. An unknown field is refused by name: nothing is accepted and then ignored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from upwell.chat.encoding import Thinking
from upwell.engine import SamplingParams
from upwell.errors import InputError


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatRequest(BaseModel):
    """POST /v1/chat/completions: OpenAI's fields, and vLLM's top_k, min_p, repetition_penalty, min_tokens,
    stop_token_ids, ignore_eos."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: Literal["none", "low", "medium", "high", "max"] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None  # who asks on behalf of whom; says nothing about the answer
    metadata: dict[str, Any] | None = None  # the caller's own notes, as with OpenAI
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def thinking(self) -> Thinking:
        """V4 has two efforts: what asks for less than the most is 'high'. Not asked for: off."""
        if self.reasoning_effort in (None, "none"):
            return "off"
        return "max" if self.reasoning_effort == "max" else "high"

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else self.tools or []

    def sampling(self) -> SamplingParams:
        """Raises InputError naming the parameter."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs is given without logprobs", "set logprobs to true")
        same = (
            "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "logit_bias",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        # The special tokens stay in the text: </think> and the calls' markup are what the parser looks for.
        return SamplingParams(**given, max_tokens=limit, logprobs=logprobs, skip_special_tokens=False)
