"""A request, and each of its completions as a sequence with its place in the cache."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from upwell.engine.detokenizer import Detokenizer
from upwell.engine.lookup import Lookup
from upwell.engine.outputs import Delta, Draw, FinishReason, TokenLogprob
from upwell.engine.params import Allowed, SamplingParams, TokenMask, allowed_after, only_choice
from upwell.engine.prefix import PrefixKeys

Sink = Callable[[Delta], None]


class Status(Enum):
    WAITING = "waiting"  # holds nothing in the cache
    PREFILL = "prefill"  # has slot and blocks; some of its tokens aren't computed
    DECODE = "decode"  # one token, the last, isn't computed
    FINISHED = "finished"


@dataclass(frozen=True)
class Unread:
    """The model's final streams [n, h, D] of a sequence's tokens from `start` on, which MTP has yet to read."""

    start: int
    streams: Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.streams)


@dataclass(eq=False)
class Request:
    """A prompt and what to do with it. `limit` is the most tokens a completion may have; deltas go to `sink`.

    Lower `priority` goes first. `timeout` seconds after the engine took it, at `deadline`, it ends with an error.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    limit: int
    eos_token_id: int
    sink: Sink
    token_mask: TokenMask | None = None
    new_mask: Callable[[], TokenMask] | None = None  # for each completion one of its own
    priority: int = 0
    timeout: float | None = None
    deadline: float | None = None  # by time.monotonic()
    scheduled_at: float | None = None  # when its first completion left the queue, by time.monotonic()


class Sequence:
    """One completion. `order` says who goes first; `computed` tokens of prompt + output are in the cache."""

    def __init__(self, request: Request, index: int, arrival: int, detokenizer: Detokenizer | None) -> None:
        self.request, self.index, self.arrival = request, index, arrival
        self._prompt_tokens = len(request.prompt_token_ids)
        self.params = params = request.params
        self.order = (request.priority, arrival)
        self.detokenizer = detokenizer
        self.output: list[int] = []
        self.mask = request.token_mask if request.new_mask is None else request.new_mask()
        self._allowed: tuple[int, Allowed] | None = None  # what the mask said after so many tokens of output
        self.counts: Counter[int] = Counter()  # of output tokens, where a penalty needs them
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.computed = 0
        self.alone = False  # a step that it shared has failed: it is computed by itself, to see whose fault that was
        self.slot = -1
        self.table: list[int] = []
        self.restored: Tensor | None = None  # streams [1, h, D] after the last token, where no token had to be computed
        self.unread: Unread | None = None
        self.lookup: Lookup | None = None
        self._keys: PrefixKeys | None = None
        # An own source of randomness: nothing else in the batch can change what is drawn.
        self._random = random.Random(None if params.seed is None else f"{params.seed}/{index}")
        self._uniforms: deque[float] = deque()
        self.end_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            self.end_ids.add(request.eos_token_id)

    def __len__(self) -> int:
        return self._prompt_tokens + len(self.output)

    @property
    def keys(self) -> PrefixKeys:
        """Hashes of all tokens so far; made anew when they have grown."""
        if self._keys is None or self._keys.length != len(self):
            self._keys = PrefixKeys.of(self.tokens(0, len(self)))
        return self._keys

    def allowed(self) -> Allowed:
        """What the mask allows next. Raises what it raises, and EngineError where it allows nothing."""
        if self._allowed is None or self._allowed[0] != len(self.output):
            self._allowed = len(self.output), allowed_after(self.mask, self.output)
        return self._allowed[1]

    def only_end(self) -> Draw | None:
        """The token that ends it, where the mask allows no other: no logits are needed to draw that."""
        token, k = only_choice(self.allowed()), self.params.logprobs
        if token is None or token not in self.end_ids:
            return None
        return Draw(token, None if k is None else TokenLogprob(token, 0.0, ((token, 0.0),)[:k]))

    def uniform(self, ahead: int = 0) -> float:
        """The random number in [0, 1) of the next token, or of the one `ahead` tokens after it: one for each token,
        however often it is asked for."""
        while len(self._uniforms) <= ahead:
            self._uniforms.append(self._random.random())
        return self._uniforms[ahead]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop-1 of prompt + output."""
        prompt = self.request.prompt_token_ids
        if start >= len(prompt):
            return self.output[start - len(prompt) : stop - len(prompt)]
        return (prompt[start:stop] + self.output[: max(0, stop - len(prompt))])[: stop - start]

    def append(self, draws: Iterable[Draw]) -> None:
        """Take drawn tokens up to the one that is the last, if one is, and send what they add."""
        detokenizer, text, before = self.detokenizer, "", len(self.output)
        logprobs: tuple[TokenLogprob, ...] = ()
        for token, logprob in draws:
            text += self._take(token)
            if logprob is not None:
                logprobs += (logprob,)
            if self.finish_reason is not None:
                break
        if self.finish_reason is not None and detokenizer is not None:
            text += detokenizer.finish()
            if detokenizer.stopped:
                self.finish_reason = "stop"  # the stop string was complete only with the last bytes
        self.request.sink(Delta(self.index, text, tuple(self.output[before:]), logprobs, self.finish_reason))

    def _take(self, token: int) -> str:
        """Take a drawn token and decide whether it is the last -> the text that it made certain."""
        output, params, detokenizer, text = self.output, self.params, self.detokenizer, ""
        output.append(token)
        if params.penalizes:
            self.counts[token] += 1
        if not params.is_greedy:
            self.uniform()
            self._uniforms.popleft()
        if token in self.end_ids:  # before min_tokens it was drawn only because nothing else was allowed
            self.finish_reason = "stop"
            return text
        if detokenizer is not None:
            text = detokenizer.push(token, len(output) >= params.min_tokens)
            if detokenizer.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(output) >= self.request.limit:
            self.finish_reason = "length"
        return text
