"""SamplingParams: how a completion is drawn and when it ends. Names and meanings as in vLLM and OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from upwell.engine.structured import StructuredOutputs
from upwell.errors import EngineError, InputError

Allowed = Sequence[int] | Tensor | None
"""What may come next: ids, or a bit for each id (INT32 [vocab / 32], lowest bit first), or None for all."""

TokenMask = Callable[[list[int]], Allowed]
"""From the tokens generated so far to what is allowed next. Called for each token, and with speculative decoding for
drafted tokens too, which may come to nothing: it should depend on nothing but its argument."""

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it would overflow
MAX_LOGPROBS = 20


def allowed_after(mask: TokenMask | None, output: list[int]) -> Allowed:
    """What a mask says. Raises EngineError where it allows nothing."""
    allowed = None if mask is None else mask(output)
    if allowed is not None and not (allowed.any() if isinstance(allowed, Tensor) else len(allowed)):
        raise EngineError(f"the token mask allows nothing after {len(output)} tokens")
    return allowed


def only_choice(allowed: Allowed) -> int | None:
    """The one id that may come, where ids are given and it is one."""
    return int(allowed[0]) if allowed is not None and not isinstance(allowed, Tensor) and len(allowed) == 1 else None


@dataclass(frozen=True)
class SamplingParams:
    """Validated at construction: an InputError names the parameter and its value.

    temperature 0 is greedy. top_k 0 or -1 is off. max_tokens None goes on to the end of the context. logprobs k gives
    the chosen token's and the k most likely ones'. stop strings end the text before them; stop_token_ids and the
    end-of-sequence token are kept in token_ids, not in the text. structured_outputs bind the text after any reasoning.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._number("temperature", 0.0, math.inf)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._integer("top_k", -1)
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.0, math.inf, open_low=True)
        if self.seed is not None:
            self._integer("seed", None)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1)
        self._integer("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}")
        self._integer("n", 1, 128)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}, must be true or false")
        self._normalise_stops()
        self._normalise_bias()
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputs):
                raise InputError(f"structured_outputs is {self.structured_outputs!r}, must be a StructuredOutputs")
            if self.ignore_eos:
                raise InputError("ignore_eos can't go with structured_outputs", "they end where their grammar ends")

    @cached_property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @cached_property
    def is_plain(self) -> bool:
        """Greedy, with nothing that changes the logits or reports them."""
        return self.is_greedy and self.logprobs is None and not (self.penalizes or self.logit_bias)

    @cached_property
    def penalizes(self) -> bool:
        """What was there before changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or value > high or value < low or (open_low and value == low):
            span = ("above" if open_low else "at least") + f" {low:g}"
            span += f" and at most {high:g}" if high < math.inf else ""
            raise InputError(f"{name} is {value!r}, must be a number {span}")

    def _integer(self, name: str, low: int | None, high: int | None = None) -> None:
        value: Any = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool)
        if not ok or (low is not None and value < low) or (high is not None and value > high):
            span = "" if low is None else f" of at least {low}" + ("" if high is None else f" and at most {high}")
            raise InputError(f"{name} is {value!r}, must be an integer{span}")

    def _normalise_stops(self) -> None:
        if not isinstance(self.stop, (str, list, tuple)) or not all(isinstance(s, str) and s for s in self.stops):
            raise InputError(f"stop is {self.stop!r}, must be a non-empty string or a list of such")
        ids = self.stop_token_ids
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise InputError(f"stop_token_ids is {ids!r}, must be a list of token ids")
        object.__setattr__(self, "stop", self.stops)
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    def _normalise_bias(self) -> None:
        try:
            bias = {int(token): float(value) for token, value in self.logit_bias.items()}
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"logit_bias is {self.logit_bias!r}, must map token ids to numbers") from None
        for token, value in bias.items():
            if token < 0 or not -100 <= value <= 100:
                raise InputError(f"logit_bias has {token}: {value:g}, must be a token id and a number from -100 to 100")
        object.__setattr__(self, "logit_bias", bias)
