"""V4's attention (paper section 2.3): sliding window, CSA and HCA, one module.

One latent a token is key and value of all heads. A layer with a compression ratio adds compressed entries: all
visible ones (HCA), or the indexer's choice (CSA). The output's rotary part is rotated back, then projected in groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upwell.config import ModelConfig, Numerics
from upwell.model.cache import LayerCache, Step, Tail
from upwell.model.compressor import Compressor, fake_fp8_nope
from upwell.model.indexer import Indexer
from upwell.model.layers import Linear, RMSNorm, linears
from upwell.ops import attention_native, linear_autograd
from upwell.ops.attention import attend, attend_cached, attend_step
from upwell.ops.indexer import select_step
from upwell.ops.norm import rms_norm
from upwell.ops.rope import apply_rope


class Rope:
    """Frequencies of one rotary kind and the angles at this forward's positions: cos, sin [B, S, r/2]."""

    def __init__(self, freqs: Tensor, cos: Tensor, sin: Tensor) -> None:
        self.freqs, self.cos, self.sin = freqs, cos, sin


class Attention(nn.Module):
    """x [B, S, D] (normed) -> [B, S, D]. `ratio`: 0 sliding, csa_ratio CSA, hca_ratio HCA."""

    def __init__(self, config: ModelConfig, ratio: int, numerics: Numerics) -> None:
        super().__init__()
        self.ratio = ratio
        self.heads, self.dim, self.window = config.num_attention_heads, config.head_dim, config.sliding_window
        self.groups, self.o_rank, self.eps = config.o_groups, config.o_lora_rank, config.rms_norm_eps
        self.rope_dim = config.qk_rope_head_dim
        self.official = numerics == "official"
        width = self.heads * self.dim
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = Linear(config.q_lora_rank, width)
        self.wkv = Linear(config.hidden_size, self.dim)
        self.kv_norm = RMSNorm(self.dim, self.eps)
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        self.wo_a = Linear(width // self.groups, self.groups * self.o_rank)
        self.wo_b = Linear(self.groups * self.o_rank, config.hidden_size)
        self.compressor = Compressor(config, ratio, self.dim, numerics) if ratio else None
        self.indexer = Indexer(config, numerics) if ratio == config.csa_ratio else None

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None, step: Step | None = None) -> Tensor:
        whole = cache is None or step is None
        joined = [self.wq_a, self.wkv]
        if whole and self.compressor is not None and not self.official:
            joined += [self.compressor.wkv, self.compressor.wgate]
        raw_latent, raw_kv, *pooled = linears(x, *joined)
        q_latent = self.q_norm(raw_latent)
        raw_q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        kv = self.kv_norm.turned(raw_kv, rope.cos, rope.sin, raw_kv.dtype)
        if self.official:
            kv = fake_fp8_nope(kv, self.rope_dim)
        if cache is None or step is None:
            return self._project_out(self._from_scratch(x, raw_q, q_latent, kv, pooled, rope))
        q = self._turned(raw_q, rope)
        if step.is_decode:
            out = self._decode(x, q, q_latent, kv, rope, cache, step)
        else:
            out = self._prefill(x, q, q_latent, kv, rope, cache, step)
        out = apply_rope(out, rope.cos.unsqueeze(-2), rope.sin.unsqueeze(-2), inverse=True)
        return self._project_out(out)

    def _turned(self, raw_q: Tensor, rope: Rope) -> Tensor:
        """Queries after the heads' norm and the rotation."""
        return apply_rope(rms_norm(raw_q, None, self.eps), rope.cos.unsqueeze(-2), rope.sin.unsqueeze(-2))

    def _project_out(self, out: Tensor) -> Tensor:
        """Grouped low-rank projection: group i sees its own heads only. [B, S, H, d] -> [B, S, D]."""
        batch, steps = out.shape[:2]
        if linear_autograd.usable(out, self.wo_a.weight):
            return self.wo_b(linear_autograd.grouped_linear(out.flatten(-2), self.wo_a.weight, self.groups))
        grouped = out.reshape(batch * steps, self.groups, -1).transpose(0, 1)
        wo_a = self.wo_a.dense(out.dtype).view(self.groups, self.o_rank, -1)
        latent = torch.bmm(grouped, wo_a.transpose(1, 2))
        return self.wo_b(latent.transpose(0, 1).reshape(batch, steps, -1))

    def _from_scratch(
        self, x: Tensor, raw_q: Tensor, q_latent: Tensor, kv: Tensor, pooled: list[Tensor], rope: Rope
    ) -> Tensor:
        """Whole sequences from position 0, no cache; differentiable. Outputs are rotated back.

        pooled: the compressor's projections of x, or empty where it makes them itself.
        """
        entries = selected = None
        if self.compressor is not None:
            entries = self.compressor(x, rope.freqs, (pooled[0], pooled[1]) if pooled else None)
            if self.indexer is not None and entries.shape[1] > self.indexer.topk:
                keys = self.indexer.compressor(x, rope.freqs)
                selected = self._select(x, q_latent, keys, rope, 0)
        if selected is None and attention_native.usable(raw_q, kv, entries):
            return attention_native.attend_raw(
                raw_q, kv, entries, self.attn_sink, rope.cos, rope.sin, self.eps, self.window, self.ratio
            )
        q = self._turned(raw_q, rope)
        out = attend(q, kv, entries, self.attn_sink, 0, self.window, self.ratio, selected)
        return apply_rope(out, rope.cos.unsqueeze(-2), rope.sin.unsqueeze(-2), inverse=True)

    def _select(self, x: Tensor, q_latent: Tensor, keys: Tensor, rope: Rope, start: int) -> Tensor:
        assert self.indexer is not None
        queries, weights = self.indexer.queries(x, q_latent, rope.cos, rope.sin)
        visible = (torch.arange(start, start + x.shape[1], device=x.device) + 1) // self.ratio
        return self.indexer(queries, weights, keys, visible.expand(x.shape[0], -1))

    def _prefill(
        self, x: Tensor, q: Tensor, q_latent: Tensor, kv: Tensor, rope: Rope, cache: LayerCache, step: Step
    ) -> Tensor:
        """The next lengths[b] tokens of each sequence, one sequence after another: they differ in start and length."""
        out = torch.zeros_like(q)
        for b, (slot, start, n) in enumerate(zip(step.slots, step.starts, step.lengths, strict=True)):
            if n == 0:
                continue
            prior = torch.arange(max(0, start - self.window + 1), start, device=x.device) % self.window
            window_kv = torch.cat((cache.window[slot, prior], kv[b, :n])).unsqueeze(0)
            entries = selected = None
            if self.compressor is not None:
                entries = self._extend(self.compressor, x[b, :n], slot, start, cache.tail, cache.entries, step, b, rope)
                if self.indexer is not None:
                    keys = self._extend(
                        self.indexer.compressor, x[b, :n], slot, start, cache.index_tail, cache.index_keys, step, b,
                        rope,
                    )  # fmt: skip
                    if entries.shape[1] > self.indexer.topk:
                        own = Rope(rope.freqs, rope.cos[b : b + 1, :n], rope.sin[b : b + 1, :n])
                        selected = self._select(x[b : b + 1, :n], q_latent[b : b + 1, :n], keys, own, start)
            out[b, :n] = attend(
                q[b : b + 1, :n], window_kv, entries, self.attn_sink, start, self.window, self.ratio, selected
            )[0]
            recent = torch.arange(start + max(0, n - self.window), start + n, device=x.device) % self.window
            cache.window[slot, recent] = kv[b, max(0, n - self.window) : n]
        return out

    def _extend(
        self, compressor: Compressor, x: Tensor, slot: int, start: int, tail: Tail | None, pool: Tensor | None,
        step: Step, b: int, rope: Rope,
    ) -> Tensor:  # fmt: skip
        """Store the entries that x completes; return all of the sequence's entries, [1, N, d]."""
        assert tail is not None and pool is not None  # a compressed layer has both
        fresh = compressor.extend(x, slot, start, tail, rope.freqs)
        rows = step.entry_rows(self.ratio)[b]
        flat = pool.view(-1, pool.shape[-1])
        flat[rows[len(rows) - len(fresh) :]] = fresh
        return flat[rows].unsqueeze(0)

    def _decode(
        self, x: Tensor, q: Tensor, q_latent: Tensor, kv: Tensor, rope: Rope, cache: LayerCache, step: Step
    ) -> Tensor:
        """One token a sequence, all sequences at once: keys are the window's ring and the gathered entries.

        No shape depends on the numbers in step.decode, and nothing waits for them.
        """
        slots, positions = step.decode.slots, step.decode.positions
        cache.window[slots, positions % self.window] = kv[:, 0]
        if self.compressor is None:
            valid = torch.arange(self.window, device=x.device)[None, :] <= positions[:, None]
            return attend_step(q[:, 0], cache.window[slots], valid, self.attn_sink).unsqueeze(1)
        entries = self._append(self.compressor, x[:, 0], cache.tail, cache.entries, step, rope)
        table, visible = step.decode.rows(self.ratio), step.decode.visible(self.ratio)
        seen = torch.arange(table.shape[1], device=x.device)[None, :] < visible[:, None]
        if self.indexer is not None:
            self._append(self.indexer.compressor, x[:, 0], cache.index_tail, cache.index_keys, step, rope)
            if table.shape[1] > self.indexer.topk:
                assert cache.index_keys is not None
                queries, weights = self.indexer.queries(x, q_latent, rope.cos, rope.sin)
                picks = select_step(
                    queries, weights, cache.index_keys, step.decode.tables, table, visible, self.indexer.topk
                )
                seen = picks >= 0
                table = table.gather(1, picks.clamp(min=0))
        rows = table.masked_fill(~seen, -1)
        return attend_cached(q[:, 0], cache.window, slots, positions, entries, rows, self.attn_sink).unsqueeze(1)

    def _append(
        self, compressor: Compressor, x: Tensor, tail: Tail | None, pool: Tensor | None, step: Step, rope: Rope
    ) -> Tensor:
        """Store the sequences' entries as far as they are known; return the pool as rows [blocks * per_block, d].

        An entry without all its tokens isn't visible, and is written anew until its last token is there.
        """
        assert tail is not None and pool is not None
        fresh = compressor.step(x, step, tail, rope.freqs)
        flat: Tensor = pool.view(-1, pool.shape[-1])
        if fresh is not None:
            flat[step.decode.open_row(self.ratio)] = fresh
        return flat
