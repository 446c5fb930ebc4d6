"""The Lightning Indexer of CSA (paper section 2.3.1): which compressed entries each query reads."""

from __future__ import annotations

from torch import Tensor, nn

from upwell.config import ModelConfig, Numerics
from upwell.model.compressor import Compressor
from upwell.model.layers import Linear
from upwell.ops.fake_quant import fake_fp4, hadamard
from upwell.ops.indexer import index_scores, select_entries
from upwell.ops.rope import apply_rope


class Indexer(nn.Module):
    """Scores entries by small keys of its own and keeps the index_topk best visible ones.

    Parameters: wq_b [n*c, R_q], weights_proj [n, D], and a compressor at c = index_head_dim.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, config.csa_ratio, self.dim, numerics, for_index=True)
        self.official = numerics == "official"

    def queries(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, S, n, c] and head weights [B, S, n] (FP32, scaled) from x [B, S, D] and q_latent [B, S, R_q].

        cos, sin [B, S, r/2] are of the compressed layers' rotary at the queries' positions.
        """
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        q = apply_rope(q, cos.unsqueeze(-2), sin.unsqueeze(-2))
        if self.official:
            q = fake_fp4(hadamard(q), 32)
        weights = self.weights_proj(x).float() * (self.dim**-0.5 * self.heads**-0.5)
        return q, weights

    def forward(self, queries: Tensor, weights: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """Picks [B, S, K], -1 none; queries [B, S, n, c], weights [B, S, n], keys [B, N, c], visible [B, S]."""
        return select_entries(index_scores(queries, keys, weights), visible, self.topk)
