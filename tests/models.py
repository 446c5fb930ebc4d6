"""transformers' DeepseekV4 and ours on the same random weights, by way of a saved checkpoint.

The weights' scale keeps every selection clear: `run_clear` measures the gap at the cut of each top-k in
transformers' own run and refuses inputs with a near-tie, where either side may rightly pick the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from upwell.checkpoint import load_model
from upwell.config import BLOCK_TOKENS
from upwell.model import KVCache, Step, Transformer, compiled

VOCAB = 300
TOLERANCE = 1e-4  # of the logits' scale
MIN_GAP = 3e-6  # at each top-k's cut, of the scores' spread; FP32 rounding moves scores by some 1e-7 to 1e-6
FULL_FORWARD = 1025  # transformers' longest forward in one piece: beyond it attention's memory is the cost


@dataclass(frozen=True)
class Spec:
    """One model to compare. No dimension is a power of two but the window's and the compression ratios."""

    ratios: tuple[int, ...]
    hash_layers: int
    yarn: bool
    length: int
    seed: int

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "vocab_size": VOCAB, "hidden_size": 90, "moe_intermediate_size": 38, "num_attention_heads": 6,
            "head_dim": 44, "q_lora_rank": 52, "num_experts_per_tok": 3, "n_routed_experts": 10, "o_groups": 3,
            "o_lora_rank": 22, "index_n_heads": 20, "index_head_dim": 36, "index_topk": 12, "sliding_window": 128,
            "qk_rope_head_dim": 12, "num_hidden_layers": len(self.ratios), "compress_ratios": list(self.ratios),
            "num_hash_layers": self.hash_layers, "max_position_embeddings": 16 * 65536,
        }  # fmt: skip
        if self.yarn:
            config["rope_scaling"] = {
                "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
                "beta_fast": 32, "beta_slow": 1,
            }  # fmt: skip
        return config


SPECS = {
    "sliding": Spec((0, 0), hash_layers=1, yarn=False, length=1025, seed=0),
    "csa": Spec((4,), hash_layers=0, yarn=True, length=4097, seed=2),
    "csa-plain-rope-hash": Spec((4, 4), hash_layers=2, yarn=False, length=1025, seed=1),
    "hca": Spec((128,), hash_layers=1, yarn=True, length=4097, seed=0),
    "hca-plain-rope": Spec((128, 128), hash_layers=0, yarn=False, length=1025, seed=0),
    "mixed": Spec((0, 4, 128), hash_layers=3, yarn=True, length=4097, seed=0),
    "mixed-deep": Spec((0, 4, 128, 4, 128, 4), hash_layers=3, yarn=True, length=1025, seed=1),
    "mixed-plain-rope": Spec((128, 128, 4, 128, 4), hash_layers=1, yarn=False, length=513, seed=0),
}


@dataclass
class Twin:
    """Both models, a sequence, and transformers' answer: logits [L, V], each CSA layer's picks [L, K] (-1 none)."""

    spec: Spec
    theirs: Any
    ours: Transformer
    ids: Tensor
    logits: Tensor
    picks: list[Tensor]

    @staticmethod
    def build(spec: Spec, directory: Path) -> Twin:
        theirs = build_theirs(spec)
        theirs.save_pretrained(directory)
        ours = load_model(directory, dtype=torch.float32)
        ids = random_ids(1, spec.length, spec.seed)
        logits, seen = run_clear(theirs, ids)
        topk = spec.config()["index_topk"]
        picks = [torch.cat([pad(p, (0, topk - p.shape[-1]), value=-1) for p in layer]) for layer in seen.picks]
        return Twin(spec, theirs, ours, ids, logits[0], picks)


def build_theirs(spec: Spec) -> Any:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(**spec.config())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # its grouped product wants strides of whole 16 bytes
    model = DeepseekV4ForCausalLM(config).eval()
    fill(model, spec.seed, config.num_local_experts)
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int, experts: int) -> None:
    """Random weights, drawn so that attention, routing and mHC are all far from uniform, and so from ties."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.1 * noise)
        elif parameter.dim() == 1 or name.endswith(("position_bias", "ape")):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * 1.2 * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            order = torch.rand(buffer.shape[0], experts, generator=generator).argsort(1)
            buffer.copy_(order[:, : buffer.shape[1]])
        elif name.endswith(("correction_bias", "gate.bias")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)


def random_ids(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def run_theirs(model: Any, ids: Tensor, chunk: int = 512) -> Tensor:
    """Logits [B, S, V] of transformers; sequences longer than FULL_FORWARD in chunks with its cache."""
    if ids.shape[1] <= FULL_FORWARD:
        return model(ids, use_cache=False).logits
    parts, cache = [], None
    for piece in ids.split(chunk, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


@dataclass
class Seen:
    """What a watched run of transformers did, by layer: indexer scores and picks a chunk, router scores a chunk."""

    scores: list[list[Tensor]] = field(default_factory=list)
    picks: list[list[Tensor]] = field(default_factory=list)
    routed: list[list[Tensor]] = field(default_factory=list)


@contextmanager
def watch(model: Any) -> Iterator[Seen]:
    seen, handles = Seen(), []

    def keep(rows: list[Tensor], module: nn.Module, what: Any) -> None:
        handles.append(module.register_forward_hook(lambda m, args, out: rows.append(what(m, out))))

    for module in model.modules():
        kind = type(module).__name__
        if kind == "DeepseekV4Indexer":
            seen.picks.append([])
            keep(seen.picks[-1], module, lambda m, out: out[0])
        elif kind == "DeepseekV4IndexerScorer":
            seen.scores.append([])
            keep(seen.scores[-1], module, lambda m, out: out[0])
        elif kind == "DeepseekV4TopKRouter":
            seen.routed.append([])
            keep(seen.routed[-1], module, lambda m, out: (m.score_fn(out[0]) + m.e_score_correction_bias, m.top_k))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_clear(model: Any, ids: Tensor) -> tuple[Tensor, Seen]:
    """Logits [B, S, V] of transformers, asserting that none of its selections hangs on rounding."""
    with watch(model) as seen:
        logits = run_theirs(model, ids)
    gaps = [index_gap(chunks, model.config.index_topk) for chunks in seen.scores]
    gap = min(gaps + [router_gap(chunks) for chunks in seen.routed], default=1.0)
    assert gap > MIN_GAP, f"near-tie in the fixture: gap {gap:.1e}, choose another seed"
    return logits, seen


def index_gap(chunks: list[Tensor], k: int) -> float:
    """The least distance between the k-th and the next score of any query, in units of that query's spread."""
    least, start = float("inf"), 0
    for scores in chunks:
        at = torch.arange(start, start + scores.shape[0])
        start += scores.shape[0]
        visible = (at + 1) // 4
        hidden = torch.arange(scores.shape[1])[None] >= visible[:, None]
        chosen = visible > k
        if chosen.any():
            rows = scores.masked_fill(hidden, float("-inf"))[chosen]
            top = rows.topk(k + 1).values
            spread = scores.masked_fill(hidden, 0.0)[chosen].abs().amax(1)
            least = min(least, float(((top[:, -2] - top[:, -1]) / spread).min()))
    return least


def router_gap(chunks: list[Any]) -> float:
    least = float("inf")
    for scores, k in chunks:
        top = scores.topk(k + 1).values
        least = min(least, float((top[:, -2] - top[:, -1]).min()))
    return least


@contextmanager
def path(name: str) -> Iterator[None]:
    """ "modules": the plain modules, whatever this install has; "kernels": its C++ kernels, where they serve."""
    with patch.object(compiled, "plan", (lambda model, heads=False: None) if name == "modules" else compiled.plan):
        yield


class Session:
    """Sequences fed to our model through one cache, in any order and in pieces of any size.

    The cache starts full of noise: whatever is read before it is written shows in the logits.
    """

    def __init__(self, model: Transformer, sequences: list[Tensor], mtp: bool = False) -> None:
        self.model, self.sequences = model, sequences
        blocks_each = [-(-len(s) // BLOCK_TOKENS) for s in sequences]
        total = sum(blocks_each)
        self.cache = KVCache(model.config, total + 1, len(sequences) + 1, model.dtype)
        for layer in (*self.cache.layers, *self.cache.mtp):
            for tensor in layer.tensors():
                tensor.normal_(0, 30, generator=torch.Generator().manual_seed(1))
        shuffled = torch.randperm(total + 1, generator=torch.Generator().manual_seed(2)).tolist()
        self.tables = [[shuffled.pop() for _ in range(n)] for n in blocks_each]
        self.slots = torch.randperm(len(sequences) + 1, generator=torch.Generator().manual_seed(3)).tolist()
        self.done = [0] * len(sequences)
        self.logits: list[list[Tensor]] = [[] for _ in sequences]
        self.mtp = mtp
        self.drafts: list[list[Tensor]] = [[] for _ in sequences]

    @torch.no_grad()
    def feed(self, lengths: dict[int, int]) -> None:
        """The next lengths[i] tokens of sequence i, in one forward, padded right."""
        rows, longest = list(lengths), max(lengths.values())
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        following = torch.zeros_like(ids)
        for b, i in enumerate(rows):
            begin, n = self.done[i], lengths[i]
            ids[b, :n] = self.sequences[i][begin : begin + n]
            after = self.sequences[i][begin + 1 : begin + 1 + n]
            following[b, : len(after)] = after
        step = Step(
            [self.slots[i] for i in rows], [self.done[i] for i in rows], [lengths[i] for i in rows],
            [self.tables[i] for i in rows],
        )  # fmt: skip
        streams = self.model.streams(ids, self.cache, step)
        logits = self.model.logits(streams).view(len(rows), longest, -1)
        drafts = None
        if self.mtp:
            drafts = self.model.draft(following, streams, self.cache, step)[0].view(len(rows), longest, -1)
        for b, i in enumerate(rows):
            self.logits[i].append(logits[b, : lengths[i]])
            if drafts is not None:
                self.drafts[i].append(drafts[b, : lengths[i]])
            self.done[i] += lengths[i]

    def feed_all(self, sizes: Iterator[int]) -> Session:
        """Every sequence to its end, each piece's size from `sizes`."""
        while any(d < len(s) for d, s in zip(self.done, self.sequences, strict=True)):
            left = {i: len(s) - d for i, (d, s) in enumerate(zip(self.done, self.sequences, strict=True)) if d < len(s)}
            self.feed({i: min(n, next(sizes)) for i, n in left.items()})
        return self

    def result(self, i: int = 0) -> Tensor:
        return torch.cat(self.logits[i])


def assert_close(ours: Tensor, theirs: Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    """Largest difference within `tolerance` of the reference's largest value."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < tolerance, f"{what}: off by {error:.1e} of the scale"
