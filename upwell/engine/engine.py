"""The engine: requests in, one step at a time, deltas out to each request's sink. One thread owns it.

LLM drives it directly; the server through EngineThread. What it doesn't know: HTTP, chat, and text prompts.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.engine.blocks import blocks_for
from upwell.engine.detokenizer import Detokenizer
from upwell.engine.outputs import Delta
from upwell.engine.params import SamplingParams, TokenMask
from upwell.engine.runner import Runner
from upwell.engine.sampler import sample
from upwell.engine.scheduler import Scheduler
from upwell.engine.sequence import Request, Sequence, Sink, Status
from upwell.engine.tokenizer import Tokenizer
from upwell.errors import EngineError, InputError, UpwellError
from upwell.model import Transformer

PREFILL_CHUNK = 512  # prompt tokens a step: long enough to be efficient, short enough not to stall decoding
MAX_NUM_SEQS = 32
CACHE_TOKENS = 65536

Ids = Items[int] | None

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model. `cache_tokens` (rounded up to blocks of 256) are shared by all sequences."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        cache_tokens: int = CACHE_TOKENS,
        chunk: int = PREFILL_CHUNK,
        graphs: bool = False,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("cache_tokens", cache_tokens), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"{name} is {value}, must be at least 1")
        blocks = blocks_for(cache_tokens)
        self.tokenizer = tokenizer
        self.config = model.config
        self.runner = Runner(model, blocks, max_num_seqs, graphs)
        self.scheduler = Scheduler(blocks, max_num_seqs, chunk)
        # A sequence's last token is never computed, so it needs no place in the cache.
        self.max_model_len = min(model.config.max_position_embeddings, blocks * BLOCK_TOKENS)
        self._requests: dict[Request, list[Sequence]] = {}
        self._arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        prompt: str | None = None,
        token_mask: TokenMask | None = None,
    ) -> Request:
        """Check a request against this model. Raises InputError; touches no state, so any thread may call it."""
        length, vocab = len(prompt_token_ids), self.config.vocab_size
        if not length:
            raise InputError("the prompt has no tokens")
        for token in (*prompt_token_ids, *params.logit_bias, *params.stop_token_ids):
            if not 0 <= token < vocab:
                raise InputError(f"token id {token} isn't in the vocabulary of {vocab}")
        if params.stops and self.tokenizer is None:
            raise InputError(f"stop is {list(params.stops)!r}, but this model has no tokenizer", "use stop_token_ids")
        room = self.max_model_len - length
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if wanted > room:
            raise InputError(
                f"the prompt's {length} tokens and {wanted} new ones are more than the context of {self.max_model_len}",
                "shorten the prompt or max_tokens, or give the engine more cache_tokens",
            )
        limit = room if params.max_tokens is None else params.max_tokens
        if params.min_tokens > limit:
            raise InputError(f"min_tokens is {params.min_tokens}, but the context has room for {limit}")
        return Request(prompt, list(prompt_token_ids), params, limit, self.config.eos_token_id, sink, token_mask)

    def add(self, request: Request) -> None:
        sequences = [
            Sequence(request, index, next(self._arrivals), self._detokenizer(request.params))
            for index in range(request.params.n)
        ]
        self._requests[request] = sequences
        for sequence in sequences:
            self.scheduler.add(sequence)

    def cancel(self, request: Request) -> None:
        """End what still runs of a request, with finish reason 'abort'. A finished one is left alone."""
        for sequence in self._requests.get(request, ()):
            if sequence.status is not Status.FINISHED:
                self.scheduler.finish(sequence, "abort")
                request.sink(Delta(sequence.index, finish_reason="abort"))
        self._requests.pop(request, None)

    def step(self) -> None:
        """Decode one token of every running sequence and compute one chunk of prompts."""
        batch = self.scheduler.schedule()
        if batch.decode:
            self._run([(sequence, 1) for sequence in batch.decode])
        if batch.prefill:
            self._run(batch.prefill)

    def fail_all(self, error: Exception) -> None:
        """End every request with an error: the engine can't go on."""
        for sequence in [s for sequences in self._requests.values() for s in sequences]:
            self._fail(sequence, error)

    def _run(self, batch: list[tuple[Sequence, int]]) -> None:
        # A sink may have cancelled a sequence of this batch while the other half of the step ran.
        batch = [(s, n) for s, n in batch if s.status is not Status.FINISHED]
        if not batch:
            return
        try:
            logits = self.runner.run(batch)
            for sequence, tokens in batch:
                self.scheduler.computed(sequence, tokens)
            masks = {b: self._mask(s) for b, (s, _) in enumerate(batch) if s.status is Status.DECODE}
            ready = [b for b in masks if batch[b][0].status is Status.DECODE]  # a mask may have failed
            if ready:
                self._sample(logits[ready], [batch[b][0] for b in ready], [masks[b] for b in ready])
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(batch))
            for sequence, _ in batch:
                self._fail(sequence, error)

    @torch.inference_mode()
    def _sample(self, logits: Tensor, sequences: list[Sequence], allowed: list[Ids]) -> None:
        for sequence, draw in zip(sequences, sample(logits, sequences, allowed), strict=True):
            sequence.append(draw.token, draw.logprob)
            if sequence.finish_reason is not None:
                self._finish(sequence)

    def _mask(self, sequence: Sequence) -> Ids:
        """The ids allowed next, None for all. A mask that fails or allows nothing ends this sequence alone."""
        mask = sequence.request.token_mask
        if mask is None:
            return None
        try:
            allowed = mask(sequence.output)
            if allowed is not None and not len(allowed):
                raise EngineError(f"the token mask allows nothing after {len(sequence.output)} tokens")
            return allowed
        except Exception as error:
            self._fail(sequence, error)
            return None

    def _finish(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        self.scheduler.finish(sequence, sequence.finish_reason)
        if all(s.status is Status.FINISHED for s in self._requests.get(sequence.request, ())):
            self._requests.pop(sequence.request, None)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if sequence.status is Status.FINISHED:
            return
        sequence.finish_reason = "error"
        self._finish(sequence)
        wrapped = EngineError(f"the engine failed: {type(error).__name__}: {error}")
        told = error if isinstance(error, UpwellError) else wrapped
        sequence.request.sink(Delta(sequence.index, finish_reason="error", error=told))

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, params.stops, params.skip_special_tokens)
