"""What goes into the routed experts when given texts run through the model, and INT4 weights that are rounded for it.

The model is run a layer at a time, all texts through one layer before the next, so that each weight is read once. What
the layers' experts get is kept in files beside the target until the conversion is done (2 * hidden_size bytes a token
and layer), and read back an expert at a time, in any order: memory stays that of one layer's inputs and one expert.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from upwell.checkpoint.load import load_model
from upwell.checkpoint.rounding import gptq, search_scale
from upwell.config import ModelConfig
from upwell.errors import InputError
from upwell.formats.int4 import INT4_MAX, round_to_int4
from upwell.model import Transformer
from upwell.model.attention import Rope
from upwell.model.moe import MoE
from upwell.model.transformer import Block
from upwell.ops.moe import swiglu
from upwell.ops.rope import rope_angles

MOST_TOKENS = 32_768  # read in all
LONGEST = 2048  # of one text
MOST_ROWS = 8192  # of one expert's inputs
_COMPLETE = "complete"
FEWEST_ROWS = 32  # with fewer, an expert's weights are rounded without them


@dataclass(frozen=True)
class Calibration:
    """Files of the experts' inputs. Threads may read it; one weight is rounded at a time, with all threads of torch."""

    directory: Path
    limit: float  # the experts' swiglu_limit
    threads: int = field(default_factory=torch.get_num_threads)  # always as many: sums come out the same
    _lock: Lock = field(default_factory=Lock)

    def inputs(self, layer: str, expert: int) -> tuple[Tensor, Tensor]:
        """What went into an expert: x [n, D] FP32, and its share in each token's output, [n] FP32."""
        kept = torch.load(self.directory / f"{layer}.pt", mmap=True, weights_only=True)
        token, place = (kept["experts"] == expert).nonzero(as_tuple=True)
        token, place = token[:MOST_ROWS], place[:MOST_ROWS]
        return kept["x"][token].float(), kept["weights"][token, place]

    def round_to_int4(
        self, layer: str, expert: int, leaf: str, up: Callable[[], list[Tensor]], weight: Tensor, group: int | None
    ) -> tuple[Tensor, Tensor]:
        """Integers int8 [out, in] and scale of weight `leaf` (w1, w2, w3); `up` gives the expert's w1 and w3."""
        with self._lock, _threads(self.threads):
            x, shares = self.inputs(layer, expert)
            if len(x) < FEWEST_ROWS or not x.isfinite().all():
                scale = search_scale(weight, INT4_MAX, group)
                return round_to_int4(weight, scale), scale
            if leaf == "w2":
                w1, w3 = up()
                x = swiglu(x @ w1.T, x @ w3.T, self.limit) * shares.unsqueeze(1)
            return rounded_for(x, weight, group)

    def remove(self) -> None:
        shutil.rmtree(self.directory)


def rounded_for(x: Tensor, weight: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """INT4 integers and scale of weight [out, in] for which its products with x [n, in] are near the exact ones."""
    gram = x.T @ x
    scale = search_scale(weight, INT4_MAX, group, gram.diagonal() / len(x))
    return gptq(weight, scale, gram, INT4_MAX), scale


def calibrate(source: Path, texts: Sequence[Tensor], directory: Path, progress: Callable[[int, int], None]) -> None:
    """Run the texts' token ids through the checkpoint at `source` and keep the experts' inputs in `directory`.

    A directory that an earlier call completed is taken as it is. The weights of an official checkpoint stay mapped from
    its files. `progress`: layers done, layers in all.
    """
    if (directory / _COMPLETE).is_file():
        return
    directory.mkdir(exist_ok=True)
    model = load_model(source)
    with torch.inference_mode():
        _run(model, texts, directory, progress)
    (directory / _COMPLETE).touch()


def disk_bytes(config: ModelConfig, texts: Sequence[Tensor]) -> int:
    """What `calibrate` writes, at most."""
    tokens = sum(map(len, texts))
    layers = len(config.compress_ratios) + config.num_nextn_predict_layers
    streams = 4 * config.hc_mult * config.hidden_size
    return tokens * (layers * (2 * config.hidden_size + 6 * config.num_experts_per_tok) + streams)


def first_tokens(texts: Sequence[Sequence[int]], vocab: int) -> list[Tensor]:
    """The texts up to MOST_TOKENS in all, each up to LONGEST. Raises InputError for none, and for ids out of range."""
    kept: list[Tensor] = []
    left = MOST_TOKENS
    for ids in texts:
        part = torch.tensor(ids[: min(left, LONGEST)], dtype=torch.long)
        if len(part) > 1:
            kept.append(part)
            left -= len(part)
    if not kept:
        raise InputError("the calibration text is empty", "give some hundred prompts, or pages of text")
    if any(int(ids.max()) >= vocab or int(ids.min()) < 0 for ids in kept):
        raise InputError(f"the calibration text has token ids that the model's vocabulary of {vocab} hasn't")
    return kept


def _run(model: Transformer, texts: Sequence[Tensor], directory: Path, progress: Callable[[int, int], None]) -> None:
    config = model.config
    lengths = [len(ids) for ids in texts]
    total, layers = sum(lengths), len(model.layers) + len(model.mtp)
    file = directory / "streams"
    width = config.hc_mult * config.hidden_size
    streams = torch.from_file(str(file), shared=True, size=total * width, dtype=model.dtype)
    # In the file, so that they needn't stay in memory.
    parts = streams.view(total, config.hc_mult, config.hidden_size).split(lengths)
    for ids, part in zip(texts, parts, strict=True):
        part.copy_(model.embed(ids).unsqueeze(1).expand_as(part))
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        freqs = model.compress_freqs if config.compress_ratios[i] else model.freqs
        with _recorded(block.ffn, directory / f"layers.{i}.ffn.experts.pt"):
            for ids, part in zip(texts, parts, strict=True):
                rope = Rope(freqs, *rope_angles(torch.arange(len(ids)).unsqueeze(0), freqs))
                part.copy_(block(part, ids.unsqueeze(0), rope, None, None))
        progress(i + 1, layers)
    for depth, block in enumerate(model.mtp):  # each from the streams of the one before, a token further on
        assert isinstance(block, Block)
        with _recorded(block.ffn, directory / f"mtp.{depth}.ffn.experts.pt"):
            for ids, part in zip(texts, parts, strict=True):
                n = len(ids) - depth - 1
                if n > 0:
                    part[:n] = model.draft_streams(ids[None, depth + 1 :], part[:n], depth=depth)
        progress(len(model.layers) + depth + 1, layers)
    file.unlink()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _recorded(ffn: MoE, file: Path) -> Iterator[None]:
    """Inside, what goes into the experts and where each token goes is noted; after it, it is in the file."""
    seen: dict[str, list[Tensor]] = {"x": [], "experts": [], "weights": []}

    def note(_module: object, arguments: tuple[Tensor, Tensor]) -> None:
        x, ids = arguments
        experts, weights = ffn.gate(x, ids)
        for key, value in (("x", x.bfloat16()), ("experts", experts.short()), ("weights", weights.float())):
            seen[key].append(value)

    hook = ffn.register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()
    temporary = file.with_suffix(".tmp")
    torch.save({key: torch.cat(values) for key, values in seen.items()}, temporary)
    temporary.rename(file)
