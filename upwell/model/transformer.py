"""The whole model: embedding, h residual streams through blocks of attention and MoE, hyper head, logits.

Shapes: input_ids [B, S]; streams are kept flat, [B*S, h, D]; logits [B, S, V].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upwell.config import ModelConfig, Numerics
from upwell.errors import InputError, RankError
from upwell.model import compiled
from upwell.model.attention import Attention, Rope
from upwell.model.cache import KVCache, LayerCache, Step
from upwell.model.hyper_connections import HyperConnection, HyperHead, Streams, settled
from upwell.model.layers import Linear, RMSNorm
from upwell.model.moe import MoE
from upwell.model.offload import GUESSED_TOKENS, Pages, expect_choice, expect_hash_layers
from upwell.ops import linear_autograd, loss_autograd
from upwell.ops.rope import inverse_frequencies, rope_angles


class Block(nn.Module):
    """Attention and MoE, each between norm and hyper-connection. `ratio` picks the attention kind."""

    def __init__(self, config: ModelConfig, ratio: int, is_hash: bool, numerics: Numerics) -> None:
        super().__init__()
        self.attn = Attention(config, ratio, numerics)
        self.ffn = MoE(config, is_hash)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)

    def forward(
        self, streams: Streams, input_ids: Tensor, rope: Rope, cache: LayerCache | None, step: Step | None,
        rows: Tensor | None = None,
    ) -> Streams:  # fmt: skip
        """streams [B*S, h, D], input_ids [B, S] -> streams; those of `rows` [N] alone where they are given."""
        x, past, post, comb = self.hc_attn.enter(streams, self.attn_norm)
        out = self.attn(x.view(*input_ids.shape, -1), rope, cache, step).flatten(0, 1)
        input_ids = input_ids.flatten()
        if rows is not None:
            out, past, post, comb, input_ids = (t[rows] for t in (out, past, post, comb, input_ids))
        streams = self.hc_attn.leave(past, out, post, comb)
        x, past, post, comb = self.hc_ffn.enter(streams, self.ffn_norm)
        return self.hc_ffn.leave(past, self.ffn(x, input_ids), post, comb)


class MTPBlock(Block):
    """Multi-token prediction (paper section 2.4): from the streams at t and token t+1, the streams that predict t+2.

    e_proj(enorm(embed(next))) is added to h_proj(hnorm(X)) of each stream; then a sliding block with learned
    routing. Embedding and output head are the model's; hyper head and norm are its own.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__(config, 0, False, numerics)
        self.e_proj = Linear(config.hidden_size, config.hidden_size)
        self.h_proj = Linear(config.hidden_size, config.hidden_size)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)

    def join(self, embedded: Tensor, streams: Tensor) -> Tensor:
        """embedded next tokens [T, D] and streams [T, h, D] -> streams [T, h, D]."""
        return self.e_proj(self.enorm(embedded)).unsqueeze(1) + self.h_proj(self.hnorm(streams))


class Transformer(nn.Module):
    """V4. `model(input_ids [B, S])` gives logits [B, S, V]; with `cache` and `step` it extends cached sequences.

    numerics "exact" computes in the model's dtype; "official" rounds activations where the official code does.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics = "exact") -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        self.local = config  # the geometry of what is here of it
        self.expert_load: Tensor | None = None  # [layers + MTP blocks, E] INT64, where counted
        self.products = torch.float32
        self.cached: torch.dtype | None = None  # what new caches hold, None: the model's dtype
        self.pages: Pages | None = None  # where experts are paged in from disk
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, ratio, config.is_hash_layer(i), numerics)
            for i, ratio in enumerate(config.compress_ratios)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MTPBlock(config, numerics) for _ in range(config.num_nextn_predict_layers))
        r = config.qk_rope_head_dim
        self.freqs: Tensor
        self.compress_freqs: Tensor
        self.register_buffer("freqs", inverse_frequencies(r, config.rope_theta, None), persistent=False)
        self.register_buffer(
            "compress_freqs", inverse_frequencies(r, config.compress_rope_theta, config.yarn), persistent=False
        )

    def on_failure(self, listener: Callable[[RankError], None]) -> None:
        """Tell a listener when another process that has a part of this model is gone (model/parallel.py)."""

    def new_cache(self, blocks: int, slots: int) -> KVCache:
        """An empty cache for this model. Raises InputError for one in INT8 where the CPU kernels don't serve it."""
        if self.cached == torch.int8:
            with torch.no_grad():
                served = compiled.plan(self) is not None
            if not served:
                raise InputError("a KV cache in int8 is for the CPU kernels, which don't run here (upwell doctor)",
                                 "leave it at auto")  # fmt: skip
        return KVCache(self.config, blocks, slots, self.cached or self.dtype, self.device)

    def cache_in(self, dtype: torch.dtype | None) -> None:
        """From now on new caches hold windows, compressed entries and the indexer's keys in `dtype`: None, the model's,
        or INT8, of which the CPU kernels make products of bytes (docs/kernels.md)."""
        self.cached = dtype
        self.__dict__.pop("_plan", None)

    def multiply_in(self, dtype: torch.dtype) -> None:
        """From now on the CPU kernels multiply in `dtype`, FP32 or BF16. In BF16 weights and what they multiply are
        rounded to it, but for the router's and mHC's, and summed in FP32, in which all else stays."""
        self.products = dtype
        self.__dict__.pop("_plan", None)

    def count_experts(self) -> Tensor:
        """From now on, count how many tokens choose each expert: [layers + MTP blocks, E], at 0."""
        blocks: list[Any] = [*self.layers, *self.mtp]
        self.expert_load = torch.zeros(len(blocks), self.config.n_routed_experts, dtype=torch.long, device=self.device)
        for block, row in zip(blocks, self.expert_load, strict=True):
            block.ffn.load = row
        return self.expert_load

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, step: Step | None = None) -> Tensor:
        """Logits [B, S, V] in FP32 for input_ids [B, S] (positions from 0, or `step`'s with a cache)."""
        streams = self.streams(input_ids, cache, step)
        return self.logits(streams).view(*input_ids.shape, -1)

    def streams(
        self, input_ids: Tensor, cache: KVCache | None = None, step: Step | None = None, only_last: bool = False
    ) -> Tensor:
        """The final residual streams [B*S, h, D], before the hyper head: what logits and MTP both start from.

        A ragged step's input [1, T] gives [T, h, D]. only_last, with a step: those after each sequence's last new
        token, [B, h, D], all that its next token needs. The other tokens leave the last layer when it has their keys.
        """
        if self.pages is not None:
            expect_hash_layers(self, self.pages, input_ids)
        if cache is not None and step is not None and (plan := self._plan_for(cache, step)) is not None:
            return compiled.run_layers(
                plan, input_ids, cache, step, self.embed.weight, load=self.expert_load, only_last=only_last
            )
        embedded = self.embed(input_ids).flatten(0, 1).unsqueeze(1).expand(-1, self.config.hc_mult, -1)
        if step is not None and step.is_ragged(input_ids):
            parts = input_ids[0].split(step.lengths)
            padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
            if only_last:
                return self.streams(padded, cache, step, True)
            at = torch.cat([b * padded.shape[1] + torch.arange(n) for b, n in enumerate(step.lengths)])
            return self.streams(padded, cache, step)[at.to(input_ids.device)]
        rows = step.last_rows(input_ids) if only_last and step is not None and input_ids.shape[1] > 1 else None
        plain, compressed = self._ropes(input_ids, step)
        streams: Streams = embedded
        for i, block in enumerate(self.layers):
            if self.pages is not None and embedded.shape[0] <= GUESSED_TOKENS:
                expect_choice(self.pages, i, block, settled(streams))
            rope = compressed if self.config.compress_ratios[i] else plain
            last = i == len(self.layers) - 1
            streams = block(streams, input_ids, rope, cache.layers[i] if cache else None, step, rows if last else None)
        return settled(streams)

    @property
    def computes_ragged(self) -> bool:
        """Sequences of different lengths in one forward cost no more than their tokens (no gradient, no autograd)."""
        with torch.no_grad():
            return compiled.plan(self) is not None

    def _plan_for(self, cache: KVCache, step: Step) -> compiled.Plan | None:
        return compiled.plan(self, step) if compiled.takes(self, cache) else None

    def logits(self, streams: Tensor) -> Tensor:
        """streams [T, h, D] -> logits [T, V], FP32."""
        if (plan := compiled.plan(self, heads=True)) is not None:
            return compiled.run_head(plan, streams, self.head.out_features)
        return self._head(self.norm(self.hc_head(streams)))

    def loss(self, streams: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets [T], the tokens after streams [T, h, D]; those that are -100 don't count.

        In FP32 training on the CPU the gradients come without the logits ever being kept (ops.loss_autograd).
        """
        x = self.norm(self.hc_head(streams))
        if linear_autograd.usable(x, self.head.weight):
            return loss_autograd.head_loss(x, self.head.weight, targets)
        return torch.nn.functional.cross_entropy(self._head(x), targets)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self.__dict__.pop("_plan", None)  # .to() and its kin move the weights
        return super()._apply(fn, recurse)

    def draft(
        self, next_ids: Tensor, streams: Tensor, cache: KVCache | None = None, step: Step | None = None, depth: int = 0
    ) -> tuple[Tensor, Tensor]:
        """MTP block `depth`: next_ids [B, S] are the tokens after those that gave `streams` [B*S, h, D].

        Returns logits [B*S, V] for the token after next, and the block's streams.
        """
        out = self.draft_streams(next_ids, streams, cache, step, depth)
        return self.draft_logits(out, depth), out

    def draft_logits(self, streams: Tensor, depth: int = 0) -> Tensor:
        """An MTP block's streams [T, h, D] -> logits [T, V], FP32."""
        if (plan := compiled.plan(self, heads=True)) is not None:
            return compiled.run_head(plan, streams, self.head.out_features, mtp=depth)
        block = self._mtp_block(depth)
        return self._head(block.norm(block.hc_head(streams)))

    def draft_streams(
        self, next_ids: Tensor, streams: Tensor, cache: KVCache | None = None, step: Step | None = None, depth: int = 0
    ) -> Tensor:
        """What MTP block `depth` makes of the streams and the tokens after them: streams [B*S, h, D]."""
        block = self._mtp_block(depth)
        joined = block.join(self.embed(next_ids).flatten(0, 1), streams)
        if cache is not None and step is not None and (plan := self._plan_for(cache, step)) is not None:
            return compiled.run_layers(
                plan, next_ids, cache, step, streams=joined.contiguous(), mtp=depth, load=self.expert_load
            )
        plain, _ = self._ropes(next_ids, step)
        return settled(block(joined, next_ids, plain, cache.mtp[depth] if cache else None, step))

    def _mtp_block(self, depth: int) -> MTPBlock:
        block = self.mtp[depth]
        assert isinstance(block, MTPBlock)
        return block

    def _head(self, x: Tensor) -> Tensor:
        if self.numerics == "official":
            return torch.nn.functional.linear(x.float(), self.head.weight.float())
        return self.head(x).float()

    def _ropes(self, input_ids: Tensor, step: Step | None) -> tuple[Rope, Rope]:
        if step is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        else:
            positions = step.positions(input_ids.shape[1])
        return (
            Rope(self.freqs, *rope_angles(positions, self.freqs)),
            Rope(self.compress_freqs, *rope_angles(positions, self.compress_freqs)),
        )
