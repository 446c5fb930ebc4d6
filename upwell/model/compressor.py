"""The compressor (paper section 2.3): every m tokens become one entry; in CSA, neighbouring windows overlap.

Entry w pools tokens m*w .. m*w+m-1 (b half) and, in CSA, the a half of the window before. It is complete with its
last token, rotated to the position of its first, and visible to queries t with w < (t + 1) // m.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upwell.config import ModelConfig, Numerics
from upwell.model.cache import Step, Tail
from upwell.model.layers import Linear, RMSNorm, linears
from upwell.ops import compress_native
from upwell.ops.compress import pool, pool_ring
from upwell.ops.fake_quant import fake_fp4, fake_fp8, hadamard
from upwell.ops.rope import rope_angles


class Compressor(nn.Module):
    """Tokens x [B, S, D] to entries [B, n, d]; d is head_dim, or index_head_dim for the indexer's own.

    Parameters: wkv, wgate [coff*d, D], ape [m, coff*d] FP32, norm [d]; coff is 2 in CSA (halves a and b), 1 in HCA.
    """

    def __init__(self, config: ModelConfig, ratio: int, dim: int, numerics: Numerics, for_index: bool = False) -> None:
        super().__init__()
        self.ratio, self.dim = ratio, dim
        self.overlap = ratio == config.csa_ratio
        width = dim * (2 if self.overlap else 1)
        self.wkv = Linear(config.hidden_size, width)
        self.wgate = Linear(config.hidden_size, width)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.rope_dim = config.qk_rope_head_dim
        self.official = numerics == "official"
        self.for_index = for_index

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """kv and gate (position bias added) of each token: [..., D], positions [...] -> [..., coff*d] twice, FP32."""
        if self.official:
            x = x.float()
        kv, gate = linears(x, self.wkv, self.wgate)
        return kv.float(), self._biased(gate, positions)

    def _biased(self, gate: Tensor, positions: Tensor) -> Tensor:
        return gate.float() + self.ape.float()[positions % self.ratio]

    def forward(self, x: Tensor, freqs: Tensor, projected: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Entries of sequences from position 0, without a cache: [B, S, D] -> [B, S // m, d] in x's dtype.

        projected: wkv x and wgate x [B, S, coff*d], where the caller has them.
        """
        if projected is not None and compress_native.usable(*projected, self.ape):
            pooled = compress_native.pool(*projected, self.ape, self.dim)
            return self._entries(pooled, torch.arange(pooled.shape[1]) * self.ratio, freqs, x.dtype)
        usable = x.shape[1] // self.ratio * self.ratio
        positions = torch.arange(usable, device=x.device)
        if projected is None:
            kv, gate = self.project(x[:, :usable], positions)
        else:
            kv, gate = projected[0][:, :usable].float(), self._biased(projected[1][:, :usable], positions)
        return self._pool(kv, gate, None, None, 0, freqs, x.dtype)

    def extend(self, x: Tensor, slot: int, start: int, tail: Tail, freqs: Tensor) -> Tensor:
        """Entries that the next tokens x [n, D] of one sequence complete, [n', d]; keeps the tail up to date."""
        n = x.shape[0]
        positions = torch.arange(start, start + n, device=x.device)
        kv, gate = self.project(x, positions)
        first = start // self.ratio  # the window that is open
        open_at = torch.arange(first * self.ratio, start, device=x.device) % tail.ring
        all_kv = torch.cat((tail.kv[slot, open_at], kv))
        all_gate = torch.cat((tail.gate[slot, open_at], gate))
        prior_kv = prior_gate = None
        if self.overlap and first > 0:
            before = torch.arange((first - 1) * self.ratio, first * self.ratio, device=x.device) % tail.ring
            prior_kv = tail.kv[slot, before, : self.dim].unsqueeze(0)
            prior_gate = tail.gate[slot, before, : self.dim].unsqueeze(0)
        usable = all_kv.shape[0] // self.ratio * self.ratio
        entries = self._pool(
            all_kv[None, :usable], all_gate[None, :usable], prior_kv, prior_gate, first, freqs, x.dtype
        )[0]
        kept = slice(max(0, n - tail.ring), n)
        at = positions[kept] % tail.ring
        tail.kv[slot, at], tail.gate[slot, at] = kv[kept], gate[kept]
        return entries

    def step(self, x: Tensor, step: Step, tail: Tail, freqs: Tensor) -> Tensor | None:
        """Decode: one token a sequence, x [B, D]. Returns each sequence's entry as far as it is known, [B, d]; None
        where no sequence completes one. Its shapes depend on B alone."""
        slots, positions = step.decode.slots, step.decode.positions
        kv, gate = self.project(x, positions)
        at = positions % tail.ring
        tail.kv[slots, at], tail.gate[slots, at] = kv, gate
        if not step.may_complete(self.ratio):
            return None
        pooled = pool_ring(tail.kv, tail.gate, slots, positions, self.ratio, self.dim)
        first = (positions // self.ratio * self.ratio).unsqueeze(1)
        return self._entries(pooled.unsqueeze(1), first, freqs, x.dtype)[:, 0]

    def _pool(
        self, kv: Tensor, gate: Tensor, prior_kv: Tensor | None, prior_gate: Tensor | None,
        first: int, freqs: Tensor, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Whole windows [B, n*m, coff*d], the first being the one numbered `first`, to entries [B, n, d]."""
        n = kv.shape[1] // self.ratio
        if n == 0:
            return kv.new_empty(kv.shape[0], 0, self.dim, dtype=dtype)
        pooled = pool(kv, gate, prior_kv, prior_gate, self.ratio, self.dim)
        return self._entries(pooled, torch.arange(first, first + n, device=kv.device) * self.ratio, freqs, dtype)

    def _entries(self, pooled: Tensor, at: Tensor, freqs: Tensor, dtype: torch.dtype) -> Tensor:
        """Pooled windows [B, n, d] FP32 that begin at positions `at` [n] or [B, n] -> entries of `dtype`."""
        entries = self.norm.turned(pooled, *rope_angles(at, freqs), dtype)
        if self.official:
            entries = fake_fp4(hadamard(entries), 32) if self.for_index else fake_fp8_nope(entries, self.rope_dim)
        return entries


def fake_fp8_nope(latent: Tensor, rope_dim: int) -> Tensor:
    """Official numerics of a latent [..., d]: the dims before the rotary ones go through FP8, groups of 64."""
    nope = latent[..., :-rope_dim]
    return torch.cat((fake_fp8(nope, 64), latent[..., -rope_dim:]), dim=-1)
