"""V4's attention core: one shared K=V latent, a sliding window, compressed entries, and a sink in the softmax.

Keys of a query at position t: window latents at t-W < j <= t, and compressed entries, either all visible ones
(HCA; CSA while they fit its top-k) or the selected ones (CSA). p = exp(s_j) / (sum exp(s) + exp(sink)).
Nothing is computed densely and masked away but the window's own triangle: the window is a band, CSA gathers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.ops import attention_autograd, gradients, npu

_GATHER_BYTES = 32 << 20  # bound on gathered entries a query block makes


def softmax_with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """Probabilities over the last dim with `sink` [H] as one more logit without value: scores [B, S, H, N], FP32."""
    column = sink.float().view(1, 1, -1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


def attend(
    q: Tensor,
    window_kv: Tensor,
    entries: Tensor | None,
    sink: Tensor,
    start: int,
    window: int,
    ratio: int,
    selected: Tensor | None = None,
) -> Tensor:
    """Attention of S consecutive queries from position `start`, all sequences at the same one.

    q [B, S, H, d]; window_kv [B, P + S, d], the P latents before `start` and the queries' own; entries [B, N, d]
    or None (sliding layer), entry w visible iff w < (t + 1) // ratio; selected [B, S, K] indices into entries with
    -1 for none (None: every visible entry). Returns [B, S, H, d] in q's dtype, before the inverse rotation.
    """
    batch, steps, _, dim = q.shape
    prior = window_kv.shape[1] - steps
    if selected is None and start == prior == 0 and gradients.recording(q, window_kv):
        return attention_autograd.attend_whole(q, window_kv, entries, sink, window, ratio)
    rows = window
    if selected is not None:
        rows = max(1, min(rows, _GATHER_BYTES // (4 * batch * selected.shape[-1] * dim)))
    q = q * dim**-0.5
    out = []
    for begin in range(0, steps, rows):
        end = min(begin + rows, steps)
        lo = max(0, prior + begin - window + 1)
        keys = window_kv[:, lo : prior + end]
        block = q[:, begin:end]
        distance = torch.arange(prior + begin, prior + end, device=q.device)[:, None]
        distance = distance - torch.arange(lo, prior + end, device=q.device)[None, :]
        hidden = (distance < 0) | (distance >= window)
        if selected is not None and entries is not None:
            out.append(_attend_selected(block, keys, hidden, entries, selected[:, begin:end], sink))
            continue
        if entries is not None:
            seen = entries[:, : min((start + end) // ratio, entries.shape[1])]
            visible = (torch.arange(start + begin, start + end, device=q.device) + 1) // ratio
            not_yet = torch.arange(seen.shape[1], device=q.device)[None, :] >= visible[:, None]
            keys, hidden = torch.cat((keys, seen), dim=1), torch.cat((hidden, not_yet), dim=1)
        out.append(_attend_block(block, keys, hidden, sink))
    return torch.cat(out, dim=1) if len(out) > 1 else out[0]


def _attend_block(q: Tensor, keys: Tensor, hidden: Tensor, sink: Tensor) -> Tensor:
    """Scaled q [B, S, H, d] over shared keys [B, N, d], hidden [S, N]. The sink is one more key, of value zero."""
    batch, steps, heads, dim = q.shape
    keys = torch.nn.functional.pad(keys, (0, 0, 0, 1))
    bias = torch.zeros(hidden.shape, device=q.device).masked_fill(hidden, float("-inf"))
    bias = torch.cat((bias.unsqueeze(1).expand(-1, heads, -1), sink.float().expand(steps, -1).unsqueeze(-1)), dim=-1)
    scores = torch.matmul(q.reshape(batch, steps * heads, dim), keys.transpose(1, 2)).view(batch, steps, heads, -1)
    probs = (scores.float() + bias).softmax(dim=-1).to(q.dtype)
    return torch.matmul(probs.view(batch, steps * heads, -1), keys).view(batch, steps, heads, dim)


def _attend_selected(q: Tensor, keys: Tensor, hidden: Tensor, entries: Tensor, picks: Tensor, sink: Tensor) -> Tensor:
    """Scaled q [B, S, H, d] over shared window keys and each query's own picks [B, S, K] of entries, -1 for none."""
    batch, steps, heads, dim = q.shape
    n_keys = keys.shape[1]
    scores = torch.matmul(q.reshape(batch, steps * heads, dim), keys.transpose(1, 2)).view(batch, steps, heads, -1)
    scores = scores.float().masked_fill(hidden[None, :, None, :], float("-inf"))
    gathered = gather_entries(entries, picks.clamp(min=0))
    extra = torch.matmul(q, gathered.transpose(-1, -2)).float()
    extra = extra.masked_fill((picks < 0).unsqueeze(2), float("-inf"))
    probs = softmax_with_sink(torch.cat((scores, extra), dim=-1), sink).to(q.dtype)
    window_part = torch.matmul(probs[..., :n_keys].reshape(batch, steps * heads, n_keys), keys)
    return window_part.view(batch, steps, heads, dim) + torch.matmul(probs[..., n_keys:], gathered)


def attend_step(q: Tensor, keys: Tensor, valid: Tensor, sink: Tensor) -> Tensor:
    """Decode: one query a sequence over its own keys. q [B, H, d], keys [B, N, d], valid [B, N] -> [B, H, d]."""
    if (kernels := npu.fused(q)) is not None and (out := kernels.attend_step(q, keys, valid, sink)) is not None:
        return out
    scores = torch.matmul(q.float(), keys.float().transpose(1, 2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~valid.unsqueeze(1), float("-inf"))
    probs = softmax_with_sink(scores.unsqueeze(1), sink).squeeze(1)
    return torch.matmul(probs.to(q.dtype), keys)


def attend_cached(
    q: Tensor, window: Tensor, slots: Tensor, positions: Tensor, pool: Tensor, rows: Tensor, sink: Tensor
) -> Tensor:
    """attend_step from the cache itself: rings window [slots, W, d] at slots [B], whose place n holds a token iff
    n <= position, and the rows [B, K] of pool [R, d], -1 for none. q [B, H, d] -> [B, H, d]."""
    if (kernels := npu.fused(q)) is not None:
        out = kernels.attend_cached(q, window, slots, positions, pool, rows, sink)
        if out is not None:
            return out
    valid = torch.arange(window.shape[1], device=q.device)[None, :] <= positions[:, None]
    keys = torch.cat((window[slots], pool[rows.clamp(min=0)]), dim=1)
    return attend_step(q, keys, torch.cat((valid, rows >= 0), dim=1), sink)


def gather_entries(entries: Tensor, picks: Tensor) -> Tensor:
    """entries [B, N, d] at picks [B, S, K] (all >= 0) -> [B, S, K, d]."""
    batch, steps, k = picks.shape
    flat = picks.reshape(batch, steps * k, 1).expand(-1, -1, entries.shape[-1])
    return entries.gather(1, flat).view(batch, steps, k, -1)
