"""Attention with gradients as one node: whole sequences over the window and every visible entry.

The same function as `ops.attention.attend` without a choice of entries, made for training. Queries go in blocks of
few rows, all sequences at once, so that little is computed outside the band; scores are never kept: the backward pass
makes each block's again. The sink is one more key, of value zero. Products are in the autocast dtype where one is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops.gradients import compute_dtype

_ROWS = 32  # queries a block: each sees up to window + _ROWS - 1 window keys


def attend_whole(q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, window: int, ratio: int) -> Tensor:
    """q [B, S, H, d], kv [B, S, d], entries [B, N, d] or None, sink [H] -> [B, S, H, d] in q's dtype."""
    if entries is None or entries.shape[1] == 0:
        entries, ratio = None, 0
    out: Tensor = _Attend.apply(q, kv, entries, sink, window, ratio)
    return out


class _Blocks:
    """The blocks of one call: where each one's queries and keys lie, and its probabilities."""

    def __init__(
        self, q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, heads: int, window: int, ratio: int
    ) -> None:
        self.q, self.kv, self.entries, self.heads, self.window, self.ratio = q, kv, entries, heads, window, ratio
        self.sink = sink.to(q.dtype)
        self.scale = q.shape[-1] ** -0.5
        self.steps = kv.shape[1]

    def __iter__(self) -> Iterator[tuple[slice, slice, int]]:
        """(queries' rows in [B, S*H, d], window positions, number of entries) of each block."""
        for begin in range(0, self.steps, _ROWS):
            end = min(begin + _ROWS, self.steps)
            entries = 0 if self.entries is None else min(end // self.ratio, self.entries.shape[1])
            yield slice(begin * self.heads, end * self.heads), slice(max(0, begin - self.window + 1), end), entries

    def keys(self, near: slice, entries: int) -> Tensor:
        """[B, n + 1, d]: window latents, entries, and the sink's zeros."""
        parts = [self.kv[:, near], self.kv.new_zeros(self.kv.shape[0], 1, self.kv.shape[2])]
        if self.entries is not None:
            parts.insert(1, self.entries[:, :entries])
        return torch.cat(parts, dim=1)

    def bias(self, rows: slice, near: slice, entries: int) -> Tensor:
        """[s, H, n + 1] to add to the scores: 0 or -inf for each key, and the sink."""
        at = torch.arange(rows.start // self.heads, rows.stop // self.heads, device=self.q.device)[:, None]
        key = torch.arange(near.start, near.stop, device=self.q.device)
        hidden = (key > at) | (key <= at - self.window)
        if entries:
            later = torch.arange(entries, device=self.q.device) >= (at + 1) // self.ratio
            hidden = torch.cat((hidden, later), dim=1)
        bias = self.q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        steps = bias.shape[0]
        column = self.sink.expand(steps, -1).unsqueeze(-1)
        return torch.cat((bias.unsqueeze(1).expand(-1, self.heads, -1), column), dim=-1)

    def probabilities(self, rows: slice, near: slice, entries: int, scaled_keys: Tensor) -> Tensor:
        """[B, s*H, n + 1]."""
        scores = torch.bmm(self.q[:, rows], scaled_keys.transpose(1, 2))
        scores.view(scores.shape[0], -1, self.heads, scores.shape[-1]).add_(self.bias(rows, near, entries))
        return scores.softmax(dim=-1)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, window: int, ratio: int
    ) -> Tensor:
        batch, steps, heads, dim = q.shape
        dtype = compute_dtype(q)
        ctx.dtypes = [t.dtype if t is not None else None for t in (q, kv, entries, sink)]
        q = q.to(dtype).reshape(batch, steps * heads, dim)
        kv, entries = kv.to(dtype), entries if entries is None else entries.to(dtype)
        ctx.save_for_backward(q, kv, entries, sink)
        ctx.shape = heads, window, ratio
        out = torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):
            blocks = _Blocks(q, kv, entries, sink, heads, window, ratio)
            for rows, near, count in blocks:
                keys = blocks.keys(near, count)
                probs = blocks.probabilities(rows, near, count, keys * blocks.scale)
                out[:, rows] = torch.bmm(probs, keys)
        return out.view(batch, steps, heads, dim).to(ctx.dtypes[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, kv, entries, sink = ctx.saved_tensors
        heads, window, ratio = ctx.shape
        grad = grad.to(q.dtype).reshape(q.shape)
        grad_q = torch.empty_like(q)
        grad_kv = torch.zeros_like(kv, dtype=torch.float32)
        grad_entries = None if entries is None else torch.zeros_like(entries, dtype=torch.float32)
        grad_sink = torch.zeros_like(sink, dtype=torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            blocks = _Blocks(q, kv, entries, sink, heads, window, ratio)
            for rows, near, count in blocks:
                keys = blocks.keys(near, count)
                scaled = keys * blocks.scale
                probs = blocks.probabilities(rows, near, count, scaled)
                grad_keys = torch.bmm(probs.transpose(1, 2), grad[:, rows])
                grad_scores = torch.bmm(grad[:, rows], keys.transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_scores, probs, -1, probs.dtype)
                grad_q[:, rows] = torch.bmm(grad_scores, scaled)
                grad_keys.baddbmm_(grad_scores.transpose(1, 2), q[:, rows], alpha=blocks.scale)
                width = near.stop - near.start
                grad_kv[:, near] += grad_keys[:, :width]
                if grad_entries is not None:
                    grad_entries[:, :count] += grad_keys[:, width : width + count]
                grad_sink += grad_scores[..., -1].view(-1, heads).float().sum(0)
        to_q, to_kv, to_entries, to_sink = ctx.dtypes
        if grad_entries is not None:
            grad_entries = grad_entries.to(to_entries)
        shape = (kv.shape[0], kv.shape[1], heads, kv.shape[2])
        return grad_q.view(shape).to(to_q), grad_kv.to(to_kv), grad_entries, grad_sink.to(to_sink), None, None
