"""What a request gives back: pieces as they come, and the whole at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from upwell.engine.params import SamplingParams
from upwell.errors import UpwellError

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of the token drawn, and of the most likely ones, best first.

    Of the distribution after penalties, bias and mask, before temperature and truncation.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Draw(NamedTuple):
    """A drawn token, with its log-probabilities where asked for."""

    token: int
    logprob: TokenLogprob | None


@dataclass(slots=True)  # frozen ones take several times as long to make
class Delta:
    """What a step, or a few, added to completion `index` of a request. `text` may lag behind `token_ids`: a character's
    bytes or the start of a stop string are held back until it is clear what they are."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: UpwellError | None = None
    at: float = field(default_factory=time.monotonic, compare=False)  # when the last of it was made
    since: float | None = field(default=None, compare=False)  # when the first was, if that is another

    def then(self, later: Delta) -> Delta:
        """This and the one that followed it as one."""
        return Delta(self.index, self.text + later.text, self.token_ids + later.token_ids,
                     self.logprobs + later.logprobs, later.finish_reason, later.error, later.at,
                     self.at if self.since is None else self.since)  # fmt: skip


@dataclass
class CompletionOutput:
    """One completion of a prompt. `logprobs` is None unless asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        if self.logprobs is not None:
            self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason


@dataclass
class RequestOutput:
    """A prompt and its `n` completions. `text` and `token_ids` are the first one's."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @staticmethod
    def empty(prompt: str | None, prompt_token_ids: list[int], params: SamplingParams) -> RequestOutput:
        """What nothing has been added to yet."""
        logprobs = params.logprobs is not None
        empty = [CompletionOutput(i, logprobs=[] if logprobs else None) for i in range(params.n)]
        return RequestOutput(prompt, prompt_token_ids, empty)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)
