"""The routed experts, and SwiGLU, each with its gradient as one node.

Tokens are sorted once; each expert's products go straight into its rows of one buffer, forwards and backwards; kept
are the sorted rows and what w1 and w3 made of them. Products are in the autocast dtype where one is set. In FP32 on
the CPU moe_native's C++ kernels serve the experts, and SwiGLU alone is one pass of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import training_kernels
from upwell.ops.gradients import compute_dtype


def _swiglu_forward(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return torch.nn.functional.silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit))


def _swiglu_backward(gate: Tensor, up: Tensor, limit: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the forward value, all FP32."""
    sigmoid = gate.clamp(max=limit).sigmoid_()
    silu, inner = gate.clamp(max=limit).mul_(sigmoid), up.clamp(-limit, limit)
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)  # of silu: s + silu * (1 - s)
    grad_gate = slope.mul_(inner).mul_(grad).mul_(gate <= limit)
    grad_up = (grad * silu).mul_(up.abs() <= limit)
    return grad_gate, grad_up, silu.mul_(inner)


def _weighted_hidden(inner: Tensor, row_weights: Tensor, limit: float) -> Tensor:
    """Gate and up side by side, [R, 2I], to hidden values times each row's weight, [R, I], in inner's dtype."""
    gate, up = inner.float().chunk(2, dim=-1)
    return _swiglu_forward(gate, up, limit).mul_(row_weights).to(inner.dtype)


def _weighted_hidden_backward(
    inner: Tensor, row_weights: Tensor, limit: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden values again, and the gradients of inner and of the rows' weights [R] (FP32)."""
    wide = grad.float()
    gate, up = inner.float().chunk(2, dim=-1)
    grad_gate, grad_up, value = _swiglu_backward(gate, up, limit, wide)
    grad_weights = (wide * value).sum(-1)
    grad_inner = torch.cat((grad_gate, grad_up), dim=-1).mul_(row_weights).to(inner.dtype)
    return value.mul_(row_weights).to(inner.dtype), grad_inner, grad_weights


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        if not training_kernels.usable(gate, up):
            ctx.save_for_backward(gate, up)
            return _swiglu_forward(gate, up, limit)
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out, width = torch.empty_like(gate), gate.shape[-1]
        rows = gate.numel() // width
        training_kernels.run("swiglu_forward", rows, gate, up, width, None, float(limit), out, width)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        if not training_kernels.usable(gate, up, grad):
            return *_swiglu_backward(gate, up, ctx.limit, grad)[:2], None
        grad_gate, grad_up, width = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
        training_kernels.run(
            "swiglu_backward", gate.numel() // width, gate, up, width, None, float(ctx.limit), grad.contiguous(),
            grad_gate, grad_up, width, None, None, width,
        )  # fmt: skip
        return grad_gate, grad_up, None


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """`ops.moe.swiglu`: silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    out: Tensor = _SwiGLU.apply(gate, up, limit)
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
        k = experts.shape[1]
        dtype = compute_dtype(x)
        order = experts.flatten().argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        source = order.div(k, rounding_mode="floor")
        counts = torch.bincount(experts.flatten(), minlength=w13.shape[0]).tolist()
        up_weights, down_weights = w13.to(dtype), w2.to(dtype)
        rows = x.to(dtype).index_select(0, source)
        row_weights = weights.flatten()[order].unsqueeze(-1)
        with torch.autocast(x.device.type, enabled=False):
            inner = rows.new_empty(rows.shape[0], w13.shape[1])
            for e, span in _spans(counts):
                torch.mm(rows[span], up_weights[e].t(), out=inner[span])
            hidden = _weighted_hidden(inner, row_weights, limit)
            outs = rows.new_empty(rows.shape)
            for e, span in _spans(counts):
                torch.mm(hidden[span], down_weights[e].t(), out=outs[span])
        ctx.save_for_backward(rows, inner, row_weights, source, back, up_weights, down_weights)
        ctx.counts, ctx.limit, ctx.k = counts, limit, k
        ctx.dtypes = x.dtype, weights.dtype, w13.dtype, w2.dtype
        return _sum_of_each_token(outs, back, k).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, inner, row_weights, source, back, up_weights, down_weights = ctx.saved_tensors
        dtype, counts = rows.dtype, ctx.counts
        with torch.autocast(grad.device.type, enabled=False):
            grad_outs = grad.to(dtype).index_select(0, source)
            grad_hidden = rows.new_empty(rows.shape[0], down_weights.shape[2])
            for e, span in _spans(counts):
                torch.mm(grad_outs[span], down_weights[e], out=grad_hidden[span])
            hidden, grad_inner, sorted_weights = _weighted_hidden_backward(inner, row_weights, ctx.limit, grad_hidden)
            grad_weights = sorted_weights[back].view(-1, ctx.k)
            grad_rows = rows.new_empty(rows.shape)
            grad_up_weights, grad_down_weights = torch.empty_like(up_weights), torch.empty_like(down_weights)
            for e, count in enumerate(counts):
                if not count:
                    grad_up_weights[e].zero_()
                    grad_down_weights[e].zero_()
            for e, span in _spans(counts):
                torch.mm(grad_outs[span].t(), hidden[span], out=grad_down_weights[e])
                torch.mm(grad_inner[span].t(), rows[span], out=grad_up_weights[e])
                torch.mm(grad_inner[span], up_weights[e], out=grad_rows[span])
        to_x, to_weights, to_w13, to_w2 = ctx.dtypes
        grad_x = _sum_of_each_token(grad_rows, back, ctx.k).to(to_x)
        return grad_x, None, grad_weights.to(to_weights), grad_up_weights.to(to_w13), grad_down_weights.to(to_w2), None


def _spans(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows among the sorted ones) of each expert that has any."""
    spans, begin = [], 0
    for e, count in enumerate(counts):
        if count:
            spans.append((e, slice(begin, begin + count)))
        begin += count
    return spans


def _sum_of_each_token(rows: Tensor, back: Tensor, k: int) -> Tensor:
    """Sorted rows [T*k, D] to FP32 sums over each token's k: [T, D]."""
    return rows.index_select(0, back).view(-1, k, rows.shape[-1]).sum(1, dtype=torch.float32)


def grouped_experts(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    """`ops.moe.grouped_experts`: x [T, D], experts/weights [T, k], w13 [E, 2I, D], w2 [E, D, I] -> [T, D]."""
    out: Tensor = _Experts.apply(x, experts, weights, w13, w2, limit)
    return out
