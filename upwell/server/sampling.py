"""The sampling fields that OpenAI's and vLLM's requests share, and how they become SamplingParams."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from upwell.chat.encoding import Thinking
from upwell.engine import SamplingParams, StructuredOutputs
from upwell.errors import InputError

_SAMPLED = (
    "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "logit_bias",
)  # fmt: skip

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Strict(BaseModel):
    """A body or a part of one. An unknown field is refused by name: nothing is accepted and then ignored."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredFields(Strict):
    """vLLM's structured_outputs."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingFields(Strict):
    """OpenAI's, and vLLM's top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos,
    structured_outputs, and what that was called before vLLM 0.12: guided_json and so on."""

    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredFields | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InputError naming the parameter."""
        given = {name: getattr(self, name) for name in _SAMPLED if getattr(self, name) is not None}
        form = self._structured()
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, structured_outputs=form)

    def _structured(self) -> StructuredOutputs | None:
        kinds = ("json", "regex", "choice", "grammar")
        older = {kind: getattr(self, f"guided_{kind}") for kind in kinds if getattr(self, f"guided_{kind}") is not None}
        if self.structured_outputs is None:
            return StructuredOutputs(**older) if older else None
        if older:
            raise InputError(f"guided_{next(iter(older))} is given beside structured_outputs, which replaces it")
        given = self.structured_outputs.model_dump(exclude_none=True, by_alias=True)
        return StructuredOutputs(**given)


def thinking_for(effort: Effort | None) -> Thinking:
    """V4 has two efforts: what asks for less than the most is 'high'. Not asked for: off."""
    if effort in (None, "none"):
        return "off"
    return "max" if effort in ("max", "xhigh") else "high"
