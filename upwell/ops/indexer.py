"""The Lightning Indexer's scores and selection (paper section 2.3.1, eqs. 13-17)."""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.ops import npu
from upwell.ops.topk import stable_topk

_SCORE_BYTES = 64 << 20  # bound on the [S, n, N] intermediate


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """score(t, w) = sum_h weights_h relu(q_h . k_w): [B, S, n, c], [B, N, c], [B, S, n] -> [B, S, N], FP32.

    `weights` already holds the scales c^-1/2 n^-1/2 and may be negative.
    """
    batch, steps, heads, _ = queries.shape
    n_entries = keys.shape[1]
    rows = max(1, _SCORE_BYTES // (4 * heads * max(n_entries, 1) * batch))
    keys_t = keys.float().transpose(1, 2)
    parts = []
    for begin in range(0, steps, rows):
        q = queries[:, begin : begin + rows].float()
        dots = torch.bmm(q.flatten(1, 2), keys_t).relu_().view(batch, -1, heads, n_entries)
        w = weights[:, begin : begin + rows].float()
        parts.append(torch.einsum("bsh,bshn->bsn", w, dots))
    return torch.cat(parts, dim=1)


def select_entries(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k best of the visible entries: scores [B, S, N], visible counts [B, S] -> indices [B, S, min(k, N)], -1 none.

    Entry w is visible to a query iff w < its count; the mask comes before the top-k.
    """
    entries = torch.arange(scores.shape[-1], device=scores.device)
    masked = scores.masked_fill(entries >= visible.unsqueeze(-1), float("-inf"))
    picks = stable_topk(masked, k)
    return picks.masked_fill(picks >= visible.unsqueeze(-1), -1)


def select_step(
    queries: Tensor, weights: Tensor, pool: Tensor, tables: Tensor, rows: Tensor, visible: Tensor, k: int
) -> Tensor:
    """Decode: each sequence's k best visible entries, -1 none: [B, k].

    queries [B, 1, n, c], weights [B, 1, n]; the keys lie in pool [blocks, per_block, c], at the blocks of tables
    [B, T], which are the pool's rows [B, N] in order; visible [B].
    """
    if (kernels := npu.fused(queries)) is not None:
        picks = kernels.index_step(queries, weights, pool, tables, visible, k)
        if picks is not None:
            return picks
    keys = pool.view(-1, pool.shape[-1])[rows]
    return select_entries(index_scores(queries, keys, weights), visible[:, None], k)[:, 0]
