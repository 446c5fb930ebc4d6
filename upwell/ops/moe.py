"""Mixture of experts: scores sqrt(softplus), bias-corrected top-k or hash table, SwiGLU with a limit (paper 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from upwell.formats.int4 import dequantize_int4, unpack_int4
from upwell.ops import gradients, moe_autograd, npu
from upwell.ops.linear import integer_linear, linear, round_to_int8
from upwell.ops.topk import stable_topk

_FEW_TOKENS = 64  # a decode step's
_PAIR_BYTES = 256 << 20  # bound on the weights that gathered_experts copies at once


def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """sqrt(softplus(W x)): [T, D], [E, D] -> [T, E], FP32."""
    return F.softplus(linear(x.float(), weight.float())).sqrt()


def route(scores: Tensor, k: int, scaling: float, bias: Tensor | None, experts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Experts [T, k] and their weights [T, k] FP32. `experts` given: a hash layer; else top-k of scores + bias.

    Weights are the scores without bias, normalised over the k, times `scaling`.
    """
    if experts is None:
        experts = stable_topk(scores if bias is None else scores + bias, k)
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(dim=-1, keepdim=True) * scaling


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    if gradients.recording(gate, up):
        return moe_autograd.swiglu(gate, up, limit)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def expert_hidden(x: Tensor, w1: Tensor, w3: Tensor, limit: float, s1: Tensor | None, s3: Tensor | None) -> Tensor:
    """One expert's hidden values, silu(w1 x) * w3 x with the limit: x [T, D] -> [T, I], FP32. s1, s3: scales."""
    return swiglu(linear(x, w1, s1).float(), linear(x, w3, s3).float(), limit)


def grouped_experts(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    """All routed experts of dense weights: x [T, D], experts/weights [T, k], w13 [E, 2I, D], w2 [E, D, I] -> [T, D].

    Tokens are sorted by expert, so each expert is one product over its rows; the weight comes before w2, as in the
    official code, and the sum over the k is in FP32.
    """
    if gradients.recording(x, w13):
        return moe_autograd.grouped_experts(x, experts, weights, w13, w2, limit)
    if (kernels := npu.fused(x)) is not None:
        out = kernels.grouped_experts(x, experts, weights, w13, w2, limit)
        if out is not None:
            return out
    if x.device.type != "cpu" and x.shape[0] <= _FEW_TOKENS:
        return gathered_experts(x, experts, weights, w13, w2, limit)
    up_weights, down_weights = w13.unbind(0), w2.unbind(0)  # one gradient tensor, not one a slice

    def up(rows: Tensor, e: int) -> Tensor:
        return F.linear(rows, up_weights[e].to(rows.dtype))  # large BF16 ones of an FP32 model stay as they are

    def down(rows: Tensor, e: int) -> Tensor:
        return F.linear(rows, down_weights[e].to(rows.dtype))

    return _by_expert(x, experts, weights, w13.shape[0], up, down, limit)


def integer_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, limit: float
) -> Tensor:
    """grouped_experts with integer weights: INT8 w13 [E, 2I, D], w2 [E, D, I], or INT4, packed uint8 with half the last
    axis; FP32 scales s13 [E, 2I], s2 [E, D], then what goes into a product is rounded by token (W8A8, W4A8), or BF16
    ones of groups, [E, 2I, D/group], [E, D, I/group] (W4A16), as ops.linear has it."""
    if (kernels := npu.fused(x)) is not None:
        out = kernels.integer_experts(x, experts, weights, w13, s13, w2, s2, limit)
        if out is not None:
            return out
    if x.device.type != "cpu" and x.shape[0] <= _FEW_TOKENS:
        return gathered_experts(x, experts, weights, w13, w2, limit, s13, s2)

    def up(rows: Tensor, e: int) -> Tensor:
        return integer_linear(rows, w13[e], s13[e])

    def down(rows: Tensor, e: int) -> Tensor:
        return integer_linear(rows, w2[e], s2[e])

    return _by_expert(x, experts, weights, w13.shape[0], up, down, limit)


Product = Callable[[Tensor, int], Tensor]
"""Rows [R, in] of one expert, and its number -> [R, out]."""


def _by_expert(
    x: Tensor, experts: Tensor, weights: Tensor, count: int, up: Product, down: Product, limit: float
) -> Tensor:
    """Tokens sorted by expert, so that each of `count` experts has one product up and one down over its rows."""
    tokens, k = experts.shape
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=count).tolist()
    rows = x[order // k]
    row_weights = weights.flatten()[order].unsqueeze(-1)
    hidden = torch.cat([up(part, e) for e, part in enumerate(rows.split(counts)) if part.shape[0]])
    gate, up_part = hidden.chunk(2, dim=-1)
    hidden = (swiglu(gate.float(), up_part.float(), limit) * row_weights).to(x.dtype)
    outs = torch.cat([down(part, e) for e, part in enumerate(hidden.split(counts)) if part.shape[0]])
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return outs[back].view(tokens, k, -1).float().sum(1).to(x.dtype)


def gathered_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float,
    s13: Tensor | None = None, s2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """grouped_experts (or integer_experts, with scales) for few tokens: each (token, expert) pair reads its expert's
    weights, so no shape depends on the routing and the host learns nothing of it, which a captured step needs."""
    tokens, k = experts.shape
    rows = x.unsqueeze(1).expand(-1, k, -1).reshape(tokens * k, 1, -1)
    row_weights = weights.reshape(tokens * k, 1, 1)
    pairs = max(1, _PAIR_BYTES // ((w13[0].numel() + w2[0].numel()) * x.element_size()))
    outs = []
    for picks, part, part_weights in zip(
        experts.flatten().split(pairs), rows.split(pairs), row_weights.split(pairs), strict=True
    ):
        gate, up = _of_pairs(part, w13, s13, picks).chunk(2, dim=-1)
        hidden = (swiglu(gate.float(), up.float(), limit) * part_weights).to(x.dtype)
        outs.append(_of_pairs(hidden, w2, s2, picks))
    return torch.cat(outs).view(tokens, k, -1).float().sum(1).to(x.dtype)


def _of_pairs(rows: Tensor, weights: Tensor, scales: Tensor | None, picks: Tensor) -> Tensor:
    """Each row by its own expert's weight: rows [P, 1, in], weights [E, out, in], picks [P] -> [P, 1, out]."""
    if scales is not None and weights.dtype == torch.uint8 and (kernels := npu.fused(rows)) is not None:
        by_row = scales.dim() == 2
        wide, step = round_to_int8(rows) if by_row else (rows, None)
        out = kernels.int4_products(wide.squeeze(1), weights, scales, picks, step, rows.dtype)
        if out is not None:
            return out.unsqueeze(1)
    picked = weights[picks]
    if scales is None:
        return torch.bmm(rows, picked.transpose(1, 2))
    if scales.dim() == 3:
        dense = dequantize_int4(picked.flatten(0, 1), scales[picks].flatten(0, 1), rows.dtype)
        return torch.bmm(rows, dense.view(*picked.shape[:2], -1).transpose(1, 2))
    quantized, per_token = round_to_int8(rows)
    codes = unpack_int4(picked) if picked.dtype == torch.uint8 else picked
    product = torch.bmm(quantized, codes.float().transpose(1, 2))
    return (product * per_token * scales[picks].unsqueeze(1)).to(rows.dtype)
