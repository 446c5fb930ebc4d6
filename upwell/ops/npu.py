"""What an NPU runs in place of plain operations: torch_npu's fused operators on the chips whose page names them, and
Triton kernels (ops/triton) where they lack one.

Source of signatures, shapes, dtypes and products: github.com/Ascend/op-plugin, docs/zh/custom_APIs/torch_npu (commit
517f2e7d, 2026-08-21). Each method computes what the plain operation of the same name computes, or returns None where
the page doesn't cover the call: then the plain path runs. UPWELL_NPU_OPERATORS=plain turns all of them off,
UPWELL_NPU_OPERATORS=torch_npu the Triton kernels alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upwell.devices import npu as device_npu
from upwell.devices.npu import Chip, Family
from upwell.ops import triton

_A2_A3: frozenset[Family] = frozenset(("a2", "a3"))
_950: frozenset[Family] = frozenset(("950",))
_ALL = _A2_A3 | _950
# Operator -> families whose chips its page lists.
PRODUCTS: dict[str, frozenset[Family]] = {
    "npu_rms_norm": _A2_A3,
    "npu_rotary_mul": _A2_A3,
    "npu_moe_init_routing_v2": _A2_A3,
    "npu_grouped_matmul": _A2_A3,
    "npu_clipped_swiglu": _A2_A3,
    "npu_dynamic_quant": _A2_A3,
    "npu_quant_matmul": _A2_A3,
    "npu_lightning_indexer": _ALL,
    "npu_sparse_flash_attention": _ALL,
    "npu_mhc_pre": _950,
    "npu_mhc_sinkhorn": _950,
    "npu_mhc_post": _950,
}
_HALF = (torch.float16, torch.bfloat16)
_FLOAT = (*_HALF, torch.float32)
Product = Callable[..., Tensor]
"""rows [R, in] sorted by expert, counts [E] INT64 -> [R, out]."""
_SINK_TERMS = 3  # a sink as a sum of this many BF16 numbers is exact to FP32


def fused(x: Tensor) -> Fused | None:
    """The fused operators of the device x is on; None off an NPU, where autograd follows x, and where torch_npu isn't
    loaded (a test device) or is turned off."""
    if x.device.type != "npu" or (x.requires_grad and torch.is_grad_enabled()) or "torch_npu" not in sys.modules:
        return None
    if os.environ.get("UPWELL_NPU_OPERATORS") == "plain":
        return None
    return _fused_of(x.device)


@cache
def _fused_of(device: torch.device) -> Fused:
    chip = device_npu.chip_of(device)
    kernels = None if os.environ.get("UPWELL_NPU_OPERATORS") == "torch_npu" else triton.load(chip)
    return Fused(chip, sys.modules["torch_npu"], kernels)


class Fused:
    """The operators of `ops` (the module torch_npu) that `chip`'s family is documented to have, and Triton's `kernels`
    where Triton is installed."""

    def __init__(self, chip: Chip, ops: Any, kernels: triton.Kernels | None = None) -> None:
        self.chip, self.ops, self.kernels = chip, ops, kernels
        self.kept: dict[Hashable, Tensor] = {}
        self.has = {name for name, families in PRODUCTS.items() if chip.family in families}

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
        """ops.norm.rms_norm. gamma may be FP32 beside any x, or of x's dtype."""
        if "npu_rms_norm" not in self.has or x.dtype not in _FLOAT or not 2 <= x.dim() <= 8:
            return None
        if weight is None:
            weight = torch.ones(x.shape[-1], device=x.device)
        if weight.dtype not in (torch.float32, x.dtype):
            return None
        out: Tensor = self.ops.npu_rms_norm(x, weight, epsilon=eps)[0]
        return out

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor | None:
        """ops.rope.apply_rope, as layout TND in interleave mode; in FP32, as the plain operation."""
        heads = x.shape[-2] if cos.dim() == x.dim() and cos.shape[-2] == 1 and x.dim() > 2 else 1
        if "npu_rotary_mul" not in self.has or x.dtype not in _FLOAT or heads >= 1000 or x.numel() == 0:
            return None
        rope_dim = 2 * cos.shape[-1]
        lead = x.shape[:-2] if heads > 1 else x.shape[:-1]
        nope, rope = x[..., :-rope_dim], x[..., -rope_dim:]
        if heads > 1:
            cos, sin = cos.squeeze(-2), sin.squeeze(-2)
        if inverse:
            sin = -sin
        r1, r2 = (torch.stack((t, t), dim=-1).flatten(-2).expand(*lead, rope_dim) for t in (cos, sin))
        flat = rope.float().reshape(-1, heads, rope_dim)
        turned = self.ops.npu_rotary_mul(
            flat, r1.reshape(-1, 1, rope_dim), r2.reshape(-1, 1, rope_dim), rotary_mode="interleave"
        )
        return torch.cat((nope, turned.view(rope.shape).to(x.dtype)), dim=-1)

    def grouped_experts(
        self, x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float
    ) -> Tensor | None:
        """ops.moe.grouped_experts: rows sorted by expert, one grouped product over w13, one over w2."""
        needed = {"npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_clipped_swiglu"}
        if not needed <= self.has or x.dtype not in _FLOAT or w13.dtype != x.dtype or x.shape[0] == 0:
            return None
        return self._by_expert(x, experts, weights, w13.shape[0], limit, partial(self._grouped, weights=w13),
                               partial(self._grouped, weights=w2))  # fmt: skip

    def _by_expert(
        self, x: Tensor, experts: Tensor, weights: Tensor, count: int, limit: float, up: Product, down: Product
    ) -> Tensor:
        """Rows sorted by expert, and back; up and down: the grouped products of unrounded rows."""
        tokens, k = experts.shape
        rows, order, counts, _ = self.ops.npu_moe_init_routing_v2(
            x.contiguous(), experts.int(), active_num=tokens * k, expert_num=count, drop_pad_mode=0,
            expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1,
            active_expert_range=[0, count], row_idx_type=1,
        )  # fmt: skip
        order, counts = order.long(), counts.long()
        hidden = up(rows, counts=counts)
        hidden = self.ops.npu_clipped_swiglu(
            hidden.float(), dim=-1, alpha=1.0, limit=limit, bias=0.0, interleaved=False
        )
        hidden = (hidden * weights.flatten()[order].unsqueeze(-1)).to(x.dtype)
        outs = down(hidden, counts=counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return outs[back].view(tokens, k, -1).float().sum(1).to(x.dtype)

    def integer_experts(
        self, x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
        limit: float,
    ) -> Tensor | None:  # fmt: skip
        """ops.moe.integer_experts in W4A16, and in W8A8: there the routing rounds the rows too, and scales are BF16, as
        the page asks. It doesn't name INT4 weights beside INT8 rows (W4A8)."""
        if w13.dtype == torch.uint8 and s13.dim() == 3:
            return self._int4_experts(x, experts, weights, w13, s13, w2, s2, limit)
        needed = {"npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_clipped_swiglu", "npu_dynamic_quant"}
        if not needed <= self.has or x.dtype != torch.bfloat16 or x.shape[0] == 0 or w13.dtype != torch.int8:
            return None
        tokens, k = experts.shape
        rows, order, counts, per_token = self.ops.npu_moe_init_routing_v2(
            x.contiguous(), experts.int(), active_num=tokens * k, expert_num=w13.shape[0], drop_pad_mode=0,
            expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=1,
            active_expert_range=[0, w13.shape[0]], row_idx_type=1,
        )  # fmt: skip
        order, counts = order.long(), counts.long()
        hidden = self._grouped_int8(rows, per_token, w13, s13, counts)
        hidden = self.ops.npu_clipped_swiglu(
            hidden.float(), dim=-1, alpha=1.0, limit=limit, bias=0.0, interleaved=False
        )
        hidden = (hidden * weights.flatten()[order].unsqueeze(-1)).to(x.dtype)
        rows, per_token = self.ops.npu_dynamic_quant(hidden)
        outs = self._grouped_int8(rows, per_token, w2, s2, counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return outs[back].view(tokens, k, -1).float().sum(1).to(x.dtype)

    def _int4_experts(
        self, x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
        limit: float,
    ) -> Tensor | None:  # fmt: skip
        """Eight INT4 in an INT32, which the memory of packed bytes is: as transposed weights nothing is moved."""
        needed = {"npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_clipped_swiglu"}
        if not needed <= self.has or x.dtype != torch.bfloat16 or x.shape[0] == 0:
            return None
        if w13.shape[2] % 4 or w2.shape[2] % 4 or s13.dtype != x.dtype:
            return None
        up, down = (partial(self._grouped_int4, weights=w, scales=s) for w, s in ((w13, s13), (w2, s2)))
        return self._by_expert(x, experts, weights, w13.shape[0], limit, up, down)

    def _grouped_int4(self, rows: Tensor, weights: Tensor, scales: Tensor, counts: Tensor) -> Tensor:
        """rows BF16 [R, in], packed INT4 [E, out, in/2] with scales [E, out, in/group] -> [R, out]."""
        by_group = scales.transpose(1, 2).contiguous()  # loading lays them out so
        outs: list[Tensor] = self.ops.npu_grouped_matmul(
            [rows], [weights.view(torch.int32).transpose(1, 2)], antiquant_scale=[by_group],
            antiquant_offset=[self._zeros(by_group)], group_list=counts, split_item=2, group_type=0, group_list_type=1,
        )  # fmt: skip
        return outs[0]

    def _zeros(self, like: Tensor) -> Tensor:
        """Zeros of its shape, kept: all layers' are the same."""
        key = (*like.shape, like.device)
        if key not in self.kept:
            self.kept[key] = torch.zeros_like(like)
        return self.kept[key]

    def _grouped_int8(self, rows: Tensor, per_token: Tensor, weights: Tensor, scales: Tensor, counts: Tensor) -> Tensor:
        """INT8 rows [R, in] with their steps [R], INT8 weights [E, out, in] with scales [E, out] -> [R, out] BF16."""
        outs: list[Tensor] = self.ops.npu_grouped_matmul(
            [rows], [weights.transpose(1, 2)], scale=[scales.to(torch.bfloat16)], per_token_scale=[per_token],
            group_list=counts, split_item=2, group_type=0, group_list_type=1, output_dtype=torch.bfloat16,
        )  # fmt: skip
        return outs[0]

    def _grouped(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """rows [R, in] sorted by expert, weights [E, out, in], counts [E] INT64 -> [R, out]."""
        outs: list[Tensor] = self.ops.npu_grouped_matmul(
            [rows], [weights.transpose(1, 2)], group_list=counts, split_item=2, group_type=0, group_list_type=1
        )
        return outs[0]

    def quantized_linear(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
        """ops.linear.int8_linear: x [..., in], weight INT8 [out, in], scale FP32 [out] -> [..., out]."""
        if not {"npu_dynamic_quant", "npu_quant_matmul"} <= self.has or x.dtype not in _HALF or x.numel() == 0:
            return None
        quantized, per_token = self.ops.npu_dynamic_quant(x.reshape(-1, x.shape[-1]))
        out: Tensor = self.ops.npu_quant_matmul(
            quantized, weight.t(), scale, pertoken_scale=per_token, output_dtype=x.dtype
        )
        return out.view(*x.shape[:-1], -1)

    def index_step(
        self, queries: Tensor, weights: Tensor, pool: Tensor, tables: Tensor, visible: Tensor, k: int
    ) -> Tensor | None:
        """The indexer's choice in a decode step, straight from the paged keys: queries [B, 1, n, 128], weights
        [B, 1, n], pool [blocks, per_block, 128], tables [B, T], visible [B] -> picks [B, k], -1 none.

        The page doesn't say what stands where fewer than k are visible: by number they are the last places.
        """
        batch, _, heads, dim = queries.shape
        allowed = (8, 16, 24, 32, 64) if self.chip.family == "950" else range(1, 65)
        if "npu_lightning_indexer" not in self.has or queries.dtype not in _HALF or pool.dtype != queries.dtype:
            return None
        if dim != 128 or heads not in allowed or pool.shape[1] % 16 or not 1 <= k <= 2048:
            return None
        if self.chip.family == "950":
            weights = weights.to(queries.dtype)
        picks, _ = self.ops.npu_lightning_indexer(
            queries.contiguous(), pool.unsqueeze(2), weights,
            actual_seq_lengths_query=torch.ones_like(visible, dtype=torch.int32),
            actual_seq_lengths_key=visible.int(), block_table=tables.int(), layout_query="BSND",
            layout_key="PA_BSND", sparse_count=k, sparse_mode=0,
        )  # fmt: skip
        found = torch.arange(k, device=picks.device)[None, :] < visible[:, None]
        return picks.view(batch, k).long().masked_fill(~found, -1)

    def attend_step(self, q: Tensor, keys: Tensor, valid: Tensor, sink: Tensor) -> Tensor | None:
        """ops.attention.attend_step by sparse attention in its MLA form, heads' dim 512 plus 64 rotary.

        V4's rotary dims lie inside the 512, so the 64 are free: they carry the sink, which A2's and A3's operator
        lacks. One more key, of value zero, has ones there, and each query its sink, split into three BF16 numbers.
        """
        batch, heads, dim = q.shape
        if "npu_sparse_flash_attention" not in self.has or q.dtype not in _HALF or keys.dtype != q.dtype:
            return None
        if dim != 512 or heads not in (1, 2, 4, 8, 16, 32, 64, 128):
            return None
        scale, n = dim**-0.5, keys.shape[1]
        keys = torch.nn.functional.pad(keys, (0, 0, 0, 1)).unsqueeze(2)
        q_rope = q.new_zeros(batch, 1, heads, 64)
        rest = sink.float() / scale
        for term in range(_SINK_TERMS):
            part = rest.to(q.dtype)
            q_rope[..., term] = part
            rest = rest - part.float()
        key_rope = q.new_zeros(batch, n + 1, 1, 64)
        key_rope[:, n, :, :_SINK_TERMS] = 1.0
        valid = torch.nn.functional.pad(valid, (0, 1), value=True)
        # Valid places first, in order, then -1.
        places = torch.arange(n + 1, device=q.device).expand(batch, -1)
        indices = places.masked_fill(~valid, n + 1).sort(dim=1).values
        indices = indices.masked_fill(indices > n, -1).int().view(batch, 1, 1, -1)
        out = self.ops.npu_sparse_flash_attention(
            q.unsqueeze(1).contiguous(), keys, keys, indices, scale, query_rope=q_rope, key_rope=key_rope,
            sparse_block_size=1, layout_query="BSND", layout_kv="BSND", sparse_mode=0, attention_mode=2,
        )[0]  # fmt: skip
        return out.squeeze(1)

    def enter_streams(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """ops.hyper_connections.enter. The 950's operators take FP32 parameters and 4, 6 or 8 streams."""
        tokens, h, dim = streams.shape
        covered = streams.dtype in _HALF and h in (4, 6, 8) and dim % 16 == 0 and dim <= 16384 and tokens <= 65536
        if "npu_mhc_pre" in self.has and covered and tokens and 1 <= iterations <= 100:
            if not fn.dtype == base.dtype == scale.dtype == torch.float32:
                return None
            x, post, logits, *_ = self.ops.npu_mhc_pre(streams, fn, scale, base, norm_eps=norm_eps, hc_eps=eps)
            return x, post, self.ops.npu_mhc_sinkhorn(logits, eps=eps, num_iters=iterations)[0]
        if self.kernels is None or self.chip.family not in _A2_A3:
            return None
        return self.kernels.enter(streams, fn, base, scale, iterations, eps, norm_eps)

    def expand_streams(self, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor | None:
        """ops.hyper_connections.expand. The page's formula doesn't say over which index of h_res it sums; op-plugin's
        own test of it does (test/test_custom_ops/test_npu_mhc_post.py): the first, as comb has it."""
        if "npu_mhc_post" in self.has and streams.dtype in _HALF and output.dtype == streams.dtype:
            out: Tensor = self.ops.npu_mhc_post(streams, comb, output, post)
            return out
        if self.kernels is None or self.chip.family not in _A2_A3:
            return None
        return self.kernels.expand(streams, output, post, comb)

    def pool(
        self, kv: Tensor, gate: Tensor, prior_kv: Tensor | None, prior_gate: Tensor | None, ratio: int, dim: int
    ) -> Tensor | None:
        """ops.compress.pool."""
        return None if self.kernels is None else self.kernels.pool(kv, gate, prior_kv, prior_gate, ratio, dim)

    def pool_ring(
        self, kv: Tensor, gate: Tensor, slots: Tensor, positions: Tensor, ratio: int, dim: int
    ) -> Tensor | None:
        """ops.compress.pool_ring."""
        return None if self.kernels is None else self.kernels.pool_ring(kv, gate, slots, positions, ratio, dim)

    def int4_products(
        self, rows: Tensor, packed: Tensor, scales: Tensor, picks: Tensor, steps: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """rows [P, in] by packed INT4 weights [E, out, in/2] at picks [P], times steps [P, 1, 1] -> [P, out]."""
        if self.kernels is None:
            return None
        return self.kernels.int4_products(rows, packed, scales, picks, steps, dtype)

    def int4_linear(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
        """ops.linear.integer_linear for INT4: decoded into INT8 (W4A8) or x's dtype (W4A16) for the cube's product."""
        by_row = scale.dim() == 1
        if self.kernels is None or (by_row and "npu_quant_matmul" not in self.has):
            return None
        operand = self.kernels.int4_decode(weight, None if by_row else scale, torch.int8 if by_row else x.dtype)
        if operand is None:
            return None
        x = triton.split_columns(x)
        return self.quantized_linear(x, operand, scale) if by_row else F.linear(x, operand)

    def attend_cached(
        self, q: Tensor, window: Tensor, slots: Tensor, positions: Tensor, pool: Tensor, rows: Tensor, sink: Tensor
    ) -> Tensor | None:
        """ops.attention.attend_cached. Before npu_sparse_flash_attention, for which keys are copied three times."""
        if self.kernels is None:
            return None
        return self.kernels.attend_cached(q, window, slots, positions, pool, rows, sink)
