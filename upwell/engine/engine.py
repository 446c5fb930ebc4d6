"""The engine: requests in, one step at a time, deltas out to each request's sink. One thread owns it.

LLM drives it directly; the server through EngineThread. What it doesn't know: HTTP, chat, and text prompts.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.engine.blocks import blocks_for
from upwell.engine.budget import ChunkBudget
from upwell.engine.detokenizer import Detokenizer
from upwell.engine.fingerprint import fingerprint
from upwell.engine.outputs import Delta, Draw, FinishReason
from upwell.engine.params import Allowed, SamplingParams, TokenMask
from upwell.engine.prefix import PREFIX_CACHE_BYTES, PrefixCache, next_cut
from upwell.engine.prefix_disk import PREFIX_CACHE_DISK_BYTES, PrefixDisk
from upwell.engine.runner import Runner
from upwell.engine.sampler import sample
from upwell.engine.scheduler import Scheduler
from upwell.engine.sequence import Request, Sequence, Sink, Status
from upwell.engine.speculative import MOST_DRAFTS, Draft, Speculator
from upwell.engine.stats import EngineStats
from upwell.engine.structured import GrammarCompiler, GrammarMask
from upwell.engine.tokenizer import Tokenizer
from upwell.errors import DeadlineError, EngineError, InputError, QueueFullError, RankError, UpwellError
from upwell.model import Transformer

PREFILL_CHUNK = 512  # prompt tokens a step while nothing decodes: as many as the kernels take at once
MAX_NUM_SEQS = 32
CACHE_TOKENS = 65536
SPECULATIVE_TOKENS = 0  # off unless asked for, as in vLLM

logger = logging.getLogger(__name__)


class EngineOptions(TypedDict, total=False):
    """What Engine takes beside a model, for those who pass it on."""

    max_num_seqs: int
    cache_tokens: int
    chunk: int
    max_queue: int | None
    enable_prefix_caching: bool
    prefix_cache_bytes: int
    prefix_cache_dir: str | Path | None
    prefix_cache_disk_bytes: int
    graphs: bool
    speculative_tokens: int | None


class Engine:
    """Continuous batching over one model. `cache_tokens` (rounded up to blocks of 256) are shared by all sequences.

    `max_num_seqs` sequences run at once; with `max_queue`, a request is refused while as many more wait. The prefix
    cache keeps up to `prefix_cache_bytes` in memory and, given a directory, `prefix_cache_disk_bytes` there.
    Up to `speculative_tokens` are drafted a step where that pays (speculative.py); None or 0 drafts none.
    `graphs`: decode steps are captured as device graphs and replayed (npu, cuda).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        cache_tokens: int = CACHE_TOKENS,
        chunk: int = PREFILL_CHUNK,
        max_queue: int | None = None,
        enable_prefix_caching: bool = True,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        prefix_cache_dir: str | Path | None = None,
        prefix_cache_disk_bytes: int = PREFIX_CACHE_DISK_BYTES,
        graphs: bool = False,
        speculative_tokens: int | None = None,
    ) -> None:
        sizes = {
            "max_num_seqs": max_num_seqs, "cache_tokens": cache_tokens, "chunk": chunk,
            "prefix_cache_bytes": prefix_cache_bytes, "prefix_cache_disk_bytes": prefix_cache_disk_bytes,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} is {value}, must be at least 1")
        if max_queue is not None and max_queue < 0:
            raise InputError(f"max_queue is {max_queue}, must be at least 0")
        if prefix_cache_dir is not None and not enable_prefix_caching:
            raise InputError("prefix_cache_dir is given, but prefix caching is off", "turn it on or leave this out")
        drafts = SPECULATIVE_TOKENS if speculative_tokens is None else speculative_tokens
        if not 0 <= drafts <= MOST_DRAFTS:
            raise InputError(f"speculative_tokens is {drafts}, must be from 0 to {MOST_DRAFTS}")
        if graphs and model.local is not model.config:
            raise InputError("graphs are asked for, but the model is shared by several ranks", "leave one of them out")
        blocks = blocks_for(cache_tokens)
        self.tokenizer = tokenizer
        self.config = model.config
        vocab, eos = self.config.vocab_size, self.config.eos_token_id
        self._grammars = None if tokenizer is None else GrammarCompiler(tokenizer, vocab, eos)
        self.runner = Runner(model, blocks, max_num_seqs, graphs)
        self.speculator = Speculator(self.runner, drafts) if drafts else None
        if self.speculator is not None:
            self.runner.reader = self.speculator.read
        self.prefix: PrefixCache | None = None
        if enable_prefix_caching:
            disk = None
            if prefix_cache_dir is not None:
                disk = PrefixDisk(Path(prefix_cache_dir), fingerprint(model), prefix_cache_disk_bytes)
            self.prefix = PrefixCache(self.runner.cache, prefix_cache_bytes, disk)
        self.scheduler = Scheduler(blocks, max_num_seqs, chunk, self.prefix, self.runner.computes_ragged)
        self.budget = ChunkBudget(chunk)
        # A sequence's last token is never computed, so it needs no place in the cache.
        self.max_model_len = min(model.config.max_position_embeddings, blocks * BLOCK_TOKENS)
        self.max_queue = max_queue
        self.at_close: list[Callable[[], None]] = []
        self._requests: dict[Request, list[Sequence]] = {}
        self._arrivals = itertools.count()
        self._open = 0  # sequences taken and not ended
        self._taking = threading.Lock()  # over _open
        self._generated = self._prompted = 0  # tokens
        self.clock: Callable[[], float] = time.perf_counter  # by which steps are measured
        self.before_computing: Callable[[], None] = _nothing  # called in each step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def stats(self) -> EngineStats:
        """Counts of this moment. Any thread may ask."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running), waiting=max(0, self._open - len(scheduler.running)),
            blocks_total=scheduler.blocks.total, blocks_free=scheduler.blocks.free,
            prefix_queried_tokens=scheduler.prefix_queried, prefix_hit_tokens=scheduler.prefix_hits,
            generated_tokens=self._generated, prompt_tokens=self._prompted, preemptions=scheduler.preemptions,
            draft_proposed=0 if self.speculator is None else self.speculator.proposed,
            draft_accepted=0 if self.speculator is None else self.speculator.accepted,
        )  # fmt: skip

    def request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        prompt: str | None = None,
        token_mask: TokenMask | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Request:
        """Check a request against this model. Raises InputError; touches no state, so any thread may call it.

        The lowest `priority` goes first. `timeout` seconds after the engine took it, what isn't done ends with
        finish reason "timeout" and a DeadlineError.
        """
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InputError(f"priority is {priority!r}, must be an integer (lower goes first)")
        if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < threading.TIMEOUT_MAX):
            raise InputError(f"timeout is {timeout!r}, must be a number of seconds above 0")
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
        new_mask = self._new_mask(prompt_token_ids, params, token_mask)
        eos = self.config.eos_token_id
        ids = list(prompt_token_ids)
        return Request(prompt, ids, params, limit, eos, sink, token_mask, new_mask, priority, timeout)

    def _new_mask(
        self, prompt: list[int], params: SamplingParams, token_mask: TokenMask | None
    ) -> Callable[[], GrammarMask] | None:
        if params.structured_outputs is None:
            return None
        if token_mask is not None:
            raise InputError("token_mask and structured_outputs are both given", "one of them decides what is allowed")
        grammars = self._grammars
        if grammars is None:
            raise InputError("structured_outputs are given, but this model has no tokenizer")
        matcher = grammars.compile(params.structured_outputs)
        return lambda: grammars.mask(matcher, prompt)

    def admit(self, request: Request) -> None:
        """Take a request; `start` or `withdraw` must follow. Raises QueueFullError. Any thread may call it."""
        slots = self.scheduler.slots.total
        with self._taking:
            if self.max_queue is not None and self._open >= slots + self.max_queue:
                raise QueueFullError(
                    f"{slots} requests run and {self._open - slots} wait, the most this engine takes", "try again later"
                )
            self._open += request.params.n
        request.deadline = None if request.timeout is None else time.monotonic() + request.timeout

    def add(self, request: Request) -> None:
        """Take a request and put it in the queue. Raises QueueFullError."""
        self.admit(request)
        self.start(request)

    def start(self, request: Request) -> None:
        """Put a request that was admitted in the queue."""
        self._prompted += len(request.prompt_token_ids)
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
            self._end(sequence, "abort")

    @torch.inference_mode()  # entered here and nowhere else: each time costs a small model two percent of a step
    def step(self) -> None:
        """Decode one token of every running sequence and compute some prompt tokens beside it."""
        self._expire()
        batch = self.scheduler.schedule(self.budget)
        self.before_computing()
        decode = [(sequence, 1) for sequence in batch.decode if not sequence.alone]
        prefill = [(sequence, tokens) for sequence, tokens in batch.prefill if not sequence.alone]
        suspects = [(s, 1) for s in batch.decode if s.alone] + [(s, n) for s, n in batch.prefill if s.alone]
        began = self.clock()
        shares = self.runner.computes_ragged and bool(prefill)
        decoding = [sequence for sequence, _ in decode]
        speculator = self.speculator
        if speculator is not None and not (shares and speculator.rests) and speculator.looks(decoding):
            self._speculate(speculator, decoding)
            self._run(prefill)
        elif self.runner.computes_ragged:
            self._run(decode + prefill)
        else:  # padding one token to a chunk would cost a chunk
            self._run(decode)
            self._run(prefill)
        for suspect in suspects:
            self._run([suspect])
        self.budget.measured(len(batch.decode), sum(n for _, n in batch.prefill), self.clock() - began)
        for sequence in batch.restored:
            if self.speculator is not None and sequence.restored is not None:
                self.speculator.read(sequence, sequence.computed - 1, sequence.restored)
            self._run([(sequence, 0)])

    def fail_all(self, error: Exception) -> None:
        """End every request with an error: the engine can't go on."""
        for sequence in [s for sequences in self._requests.values() for s in sequences]:
            self._fail(sequence, error)

    def close(self) -> None:
        """Finish writing what is kept on disk (prefixes, experts' use), and what else waits for the end. The engine
        isn't used after it."""
        if self.prefix is not None:
            self.prefix.close()
        if self.runner.model.pages is not None:
            self.runner.model.pages.close()
        while self.at_close:
            self.at_close.pop()()

    def _expire(self) -> None:
        late = [r for r in self._requests if r.deadline is not None and r.deadline <= time.monotonic()]
        for request in late:
            for sequence in self._requests.get(request, ()):
                done = f"{len(sequence.output)} tokens" if sequence.output else "its first token"
                what = f"the deadline of {request.timeout:g} s passed {'after' if sequence.output else 'before'} {done}"
                self._end(sequence, "timeout", DeadlineError(what))

    def _run(self, batch: list[tuple[Sequence, int]]) -> None:
        """Compute the next n tokens of each (sequence, n), and the first or next token of those that are through."""
        # A sink may have cancelled a sequence of this batch while another part of the step ran.
        batch = [(s, n) for s, n in batch if s.status is not Status.FINISHED]
        if not batch:
            return
        ready: list[Sequence] = []  # whose next token is to be drawn,
        rows: list[int] = []  # from which of the streams
        try:
            streams = self.runner.streams(batch) if batch[0][1] else batch[0][0].restored
            assert streams is not None
            for row, (sequence, tokens) in enumerate(batch):
                if sequence.status is Status.DECODE:
                    sequence.computed += 1
                    ready.append(sequence)
                    rows.append(row)
                    continue
                through = self.scheduler.computed(sequence, tokens)
                self._save(sequence, streams[row])
                if not through:
                    continue
                forks = [] if sequence.alone else self.scheduler.fork(sequence)
                ready += [sequence, *forks]
                rows += [row] * (1 + len(forks))
                for fork in forks:
                    self.runner.fork(sequence, fork)
            masks = [None if s.mask is None else self._mask(s) for s in ready]
            if any([s.status is Status.FINISHED for s in ready]):  # its mask has failed
                kept = [i for i, s in enumerate(ready) if s.status is Status.DECODE]
                rows, ready, masks = [rows[i] for i in kept], [ready[i] for i in kept], [masks[i] for i in kept]
            if ready:
                once = list(dict.fromkeys(rows))  # forks share a row
                logits = self.runner.logits(streams if len(once) == len(streams) else streams[once])
                if len(once) < len(rows):
                    logits = logits[[once.index(row) for row in rows]]
                self._sample(logits, ready, masks)
        except RankError:
            raise  # nothing runs any more
        except Exception as error:
            self._failed([*(s for s, _ in batch), *ready], error)

    def _failed(self, sequences: list[Sequence], error: Exception) -> None:
        """The model failed. One sequence fails by itself; of several each is computed again, alone, which shows whose
        fault it was."""
        logger.error("a step of %d sequences failed", len(sequences), exc_info=error)
        left = [s for s in dict.fromkeys(sequences) if s.status is not Status.FINISHED]
        if len(left) == 1:
            self._fail(left[0], error)
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):
                sequence.alone = False
            return
        for sequence in left:
            sequence.alone = True
            self.scheduler.preempt(sequence)

    def _speculate(self, speculator: Speculator, sequences: list[Sequence]) -> None:
        """Draft for decoding sequences, and take of each draft what the model draws too, and one token more."""
        sequences = [s for s in sequences if s.status is not Status.FINISHED]
        if not sequences:
            return
        try:
            drafts = speculator.propose(sequences)
            for draft in drafts:
                if draft.error is not None and not draft.tokens:
                    self._fail(draft.sequence, draft.error)
            drafts = [d for d in drafts if d.sequence.status is not Status.FINISHED]
            if drafts:
                self._verify(speculator, drafts)
                speculator.clock(drafts)
        except RankError:
            raise
        except Exception as error:
            self._failed(sequences, error)

    def _verify(self, speculator: Speculator, drafts: list[Draft]) -> None:
        streams = self.runner.verify([d.sequence for d in drafts], [d.tokens for d in drafts])
        # Of each row that a token is drawn from: its sequence, what may come, and after what.
        sequences: list[Sequence] = []
        allowed: list[Allowed] = []
        ahead: list[list[int]] = []
        rows: list[int] = []
        counts, begin = [], 0
        for draft in drafts:
            count = len(draft.tokens) + (draft.error is None)
            sequences += [draft.sequence] * count
            allowed += draft.allowed[:count]
            ahead += [draft.tokens[:k] for k in range(count)]
            rows += range(begin, begin + count)
            counts.append(count)
            begin += len(draft.tokens) + 1
        at_rows = streams[: len(rows)] if not rows or rows[-1] == len(rows) - 1 else streams[rows]
        draws = sample(self.runner.logits(at_rows), sequences, allowed, ahead)
        taken, accepted, at, begin = [], [], 0, 0
        for draft, count in zip(drafts, counts, strict=True):
            own = draws[at : at + count]
            accepted.append(_agreeing(own, draft.tokens))
            taken.append(own[: accepted[-1] + 1])
            if draft.sequence.unread is not None:
                speculator.read(draft.sequence, draft.sequence.computed, streams[begin : begin + len(taken[-1])])
            at += count
            begin += len(draft.tokens) + 1
        speculator.settle(drafts, accepted)
        for draft, own in zip(drafts, taken, strict=True):
            self.scheduler.computed(draft.sequence, 1)
            draft.sequence.computed += len(own) - 1  # the last token counts as not computed, a drafted one or not
            self._append(draft.sequence, own)

    def _save(self, sequence: Sequence, streams: Tensor) -> None:
        """Keep in the prefix cache what the sequence's prompt came to."""
        if self.prefix is None or sequence.restored is not None:
            return
        keys, at = sequence.keys, sequence.computed
        if next_cut(at - 1) == at:
            self.prefix.save_cut(keys, at, sequence.slot, sequence.table)
        if at == len(sequence) and not sequence.output:
            self.prefix.save_whole(keys, sequence.slot, sequence.table, streams)

    def _sample(self, logits: Tensor, sequences: Items[Sequence], allowed: list[Allowed]) -> None:
        for sequence, draw in zip(sequences, sample(logits, sequences, allowed), strict=True):
            self._append(sequence, (draw,))

    def _append(self, sequence: Sequence, draws: Items[Draw]) -> None:
        if sequence.status is Status.FINISHED:
            return  # by itself, or another's sink has just cancelled it
        before = len(sequence.output)
        try:
            sequence.append(draws)
            if sequence.mask is not None and sequence.finish_reason is None and (end := sequence.only_end()):
                sequence.append((end,))
        except Exception as error:  # of its sink, detokenizer or mask
            self._fail(sequence, error)
            return
        finally:
            self._generated += len(sequence.output) - before
        if sequence.finish_reason is not None:
            self._finish(sequence, sequence.finish_reason)

    def _mask(self, sequence: Sequence) -> Allowed:
        """The ids allowed next, None for all. A mask that fails or allows nothing ends this sequence alone."""
        try:
            return sequence.allowed()
        except Exception as error:
            self._fail(sequence, error)
            return None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.FINISHED:
            return  # its own sink has cancelled it
        self.scheduler.finish(sequence, reason)
        with self._taking:
            self._open -= 1
        if all(s.status is Status.FINISHED for s in self._requests.get(sequence.request, ())):
            self._requests.pop(sequence.request, None)

    def _end(self, sequence: Sequence, reason: FinishReason, error: UpwellError | None = None) -> None:
        """End a sequence from outside and tell its sink, unless it has ended already."""
        if sequence.status is Status.FINISHED:
            return
        self._finish(sequence, reason)
        try:
            sequence.request.sink(Delta(sequence.index, finish_reason=reason, error=error))
        except Exception:
            logger.exception("a request's sink failed at its end")

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        wrapped = EngineError(f"the engine failed: {type(error).__name__}: {error}")
        self._end(sequence, "error", error if isinstance(error, UpwellError) else wrapped)

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, params.stops, params.skip_special_tokens)


def _nothing() -> None:
    """No one is told."""


def _agreeing(draws: list[Draw], tokens: list[int]) -> int:
    """How many tokens, from the first, are those that were drawn."""
    count = 0
    for draw, token in zip(draws, tokens, strict=False):
        if draw.token != token:
            break
        count += 1
    return count
