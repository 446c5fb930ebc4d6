"""Prefill and decode of the bare model through its cache, without scheduler, sampler and text; as llama-bench does.

Each is timed several times after a warm-up; with transformers beside it on the same weights, the two take turns.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from upwell.bench.record import speed_row
from upwell.checkpoint import save_checkpoint
from upwell.config import BLOCK_TOKENS
from upwell.errors import InputError
from upwell.model import Step, Transformer

CHUNK = 512  # prompt tokens a forward, for both


class Runs(Protocol):
    """One side of a comparison."""

    name: str

    def prefill(self, ids: Tensor) -> Tensor:
        """ids [B, S] from an empty cache -> logits [B, V] after the last."""

    def decode(self, ids: Tensor, steps: int) -> Callable[[], None]:
        """Prefills ids [B, S]; each call then makes `steps` greedy tokens a sequence."""


class Ours:
    name = "upwell"

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        return self._prefilled(ids, ids.shape[1])[1]

    def decode(self, ids: Tensor, steps: int, room: int = 8192) -> Callable[[], None]:
        length = ids.shape[1]
        extend, logits = self._prefilled(ids, length + room)
        last = logits.argmax(-1, keepdim=True)

        def run() -> None:
            nonlocal length, last
            for _ in range(steps):
                last = extend(last, length).argmax(-1, keepdim=True)
                length += 1

        return run

    def _prefilled(self, ids: Tensor, tokens: int) -> tuple[Callable[[Tensor, int], Tensor], Tensor]:
        """How to go on from ids, and the logits after them, with a cache for `tokens`."""
        batch, length = ids.shape
        each = -(-tokens // BLOCK_TOKENS)
        cache = self.model.new_cache(batch * each, batch)
        tables = [list(range(b * each, (b + 1) * each)) for b in range(batch)]

        def extend(new: Tensor, start: int) -> Tensor:
            count = new.shape[1]
            step = Step(list(range(batch)), [start] * batch, [count] * batch, tables, self.model.device)
            return self.model.logits(self.model.streams(new, cache, step, only_last=True))

        logits = torch.empty(0)
        for begin in range(0, length, CHUNK):
            logits = extend(ids[:, begin : begin + CHUNK], begin)
        return extend, logits


class Transformers:
    """transformers' model with our weights, written by us and read by it; the faster of its expert paths, and, where
    ours multiplies in BF16, the faster of the model's dtype and BF16."""

    name = "transformers"

    def __init__(self, model: Transformer) -> None:
        try:
            from transformers import DeepseekV4ForCausalLM
        except ImportError:
            raise InputError(
                "--compare transformers: it isn't installed, or too old to know DeepSeek V4",
                "pip install 'transformers>=5.23'",
            ) from None
        with tempfile.TemporaryDirectory() as directory:
            save_checkpoint(model, directory, format="transformers")
            self.model: Any = DeepseekV4ForCausalLM.from_pretrained(
                directory, dtype=model.dtype, attn_implementation="eager"
            ).eval()
        self._models = [self.model]
        if model.products == torch.bfloat16:
            self._models.append(copy.deepcopy(self.model).to(torch.bfloat16))

    def prefill(self, ids: Tensor) -> Tensor:
        return self._prefilled(ids).logits[:, -1]

    def decode(self, ids: Tensor, steps: int) -> Callable[[], None]:
        states: dict[Any, list[Any]] = {}  # cache and last token, by model

        def run() -> None:
            if self.model not in states:
                out = self._prefilled(ids)
                states[self.model] = [out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)]
            state = states[self.model]
            for _ in range(steps):
                out = self.model(state[1], past_key_values=state[0], use_cache=True)
                state[0], state[1] = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

        return run

    def tune(self, run: Callable[[], Any]) -> None:
        """Keep the fastest of the dtypes and expert paths for what `run` does."""
        costs = {}
        for choice in product(self._models, ("eager", "grouped_mm")):
            self._take(*choice)
            run()
            began = time.perf_counter()
            run()
            costs[choice] = time.perf_counter() - began
        self._take(*min(costs, key=lambda choice: costs[choice]))

    def _take(self, model: Any, experts: str) -> None:
        self.model = model
        model.config._experts_implementation = experts

    def _prefilled(self, ids: Tensor) -> Any:
        past, out = None, None
        for begin in range(0, ids.shape[1], CHUNK):
            part = ids[:, begin : begin + CHUNK]
            out = self.model(part, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
        return out


@torch.inference_mode()
def prefill(sides: Sequence[Runs], ids: Tensor, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Rows for prompts of these lengths, batch ids.shape[0]."""
    rows = []
    for length in lengths:
        part = ids[:, :length]
        jobs = [(side, _job(side, part)) for side in sides]
        rows += _alternate(f"prefill {length} x{len(ids)}", jobs, part.numel(), rounds)
    return rows


@torch.inference_mode()
def decode(sides: Sequence[Runs], ids: Tensor, batches: Sequence[int], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows for `steps` tokens after ids, at these batch sizes."""
    rows = []
    for batch in batches:
        jobs = [(side, side.decode(ids[:batch], steps)) for side in sides]
        rows += _alternate(f"decode {ids.shape[1]}+{steps} x{batch}", jobs, batch * steps, rounds)
    return rows


def agreement(ours: Ours, theirs: Transformers, ids: Tensor) -> float:
    """The largest difference of the logits after a prompt [1, S], as a share of their scale."""
    with torch.inference_mode():
        a, b = ours.prefill(ids).float(), theirs.prefill(ids).float()
    return float((a - b).abs().max() / b.abs().max())


def _job(side: Runs, ids: Tensor) -> Callable[[], Any]:
    return lambda: side.prefill(ids)


def _alternate(name: str, jobs: list[tuple[Runs, Callable[[], Any]]], tokens: int, rounds: int) -> list[dict[str, Any]]:
    seconds: list[list[float]] = [[] for _ in jobs]
    for side, run in jobs:
        if isinstance(side, Transformers):
            side.tune(run)
        run()
    for _ in range(rounds):
        for (_, run), kept in zip(jobs, seconds, strict=True):
            began = time.perf_counter()
            run()
            kept.append(time.perf_counter() - began)
    return [speed_row(name, side.name, tokens, kept) for (side, _), kept in zip(jobs, seconds, strict=True)]


def place(path: Path | None) -> str:
    """A model's name in a record."""
    return "upwell-nano" if path is None else path.name
