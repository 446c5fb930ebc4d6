"""What Ascend's pages say of the fused operators that upwell calls: each one's conditions and its formula.

Written from github.com/Ascend/op-plugin, docs/zh/custom_APIs/torch_npu (commit 517f2e7d), not from upwell's code. The
tests compute with the formulas; the contract job (contract/check.py) holds real calls to the conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)


def need(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def rule_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    need(2 <= x.dim() <= 8 and gamma.shape == x.shape[-1:], "shapes")
    need(x.dtype in FLOAT and gamma.dtype in (torch.float32, x.dtype), "dtypes")


def npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * r1 + turned * r2


def rule_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> None:
    need(rotary_mode == "interleave" and x.dim() == 3, "layout TND")
    need(r1.shape == r2.shape == (x.shape[0], 1, x.shape[2]), "r1 and r2 are T1D")
    need(x.shape[1] < 1000 and x.shape[2] < 896 and x.shape[2] % 2 == 0, "N < 1000, D even and < 896")
    need(x.dtype in FLOAT and r1.dtype == r2.dtype == x.dtype, "one dtype")


def npu_moe_init_routing_v2(x: Tensor, expert_idx: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.sort(expert_idx.flatten().long(), stable=True).indices
    counts = (expert_idx.flatten()[:, None] == torch.arange(options["expert_num"])).sum(0)
    rows, scale = x[order // expert_idx.shape[1]], torch.empty(0)
    if options["quant_mode"] == 1:
        rows, scale = npu_dynamic_quant(rows)
    return rows, order.int(), counts.long(), scale


def rule_moe_init_routing_v2(x: Tensor, expert_idx: Tensor, **options: Any) -> None:
    need(x.dim() == expert_idx.dim() == 2 and x.shape[0] == expert_idx.shape[0], "shapes")
    need(x.dtype in (*FLOAT, torch.int8) and expert_idx.dtype == torch.int32, "dtypes")
    need(options["active_num"] in (-1, 0, expert_idx.numel()) and 0 < options["expert_num"] <= 10240, "numbers")
    need(options["active_expert_range"] == [0, options["expert_num"]] and options["drop_pad_mode"] == 0, "all experts")
    need(options["expert_tokens_num_type"] == 1 and options["row_idx_type"] == 1, "counts and scatter index")
    need(options["quant_mode"] == -1 or (options["quant_mode"] == 1 and x.dtype in HALF), "quant_mode")


def npu_grouped_matmul(x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, **options: Any) -> list[Tensor]:
    counts = group_list.tolist()
    if weight[0].dtype == torch.int32:  # eight INT4 each, along the last axis in memory, the lowest bits first
        scale, offset = options["antiquant_scale"][0].double(), options["antiquant_offset"][0].double()  # [E, G, N]
        stored = weight[0].transpose(1, 2)
        codes = torch.stack([(stored << (28 - 4 * i)) >> 28 for i in range(8)], dim=-1).flatten(2).transpose(1, 2)
        length = codes.shape[1] // scale.shape[1]
        dense = (codes + offset.repeat_interleave(length, 1)) * scale.repeat_interleave(length, 1)
        outs = [part.double() @ dense[e] for e, part in enumerate(x[0].split(counts))]
        return [torch.cat(outs).to(x[0].dtype)]
    wide = torch.double if x[0].dtype == torch.int8 else x[0].dtype
    outs = [part.to(wide) @ weight[0][e].to(wide) for e, part in enumerate(x[0].split(counts))]
    if x[0].dtype != torch.int8:
        return [torch.cat(outs)]
    scaled = [out * options["scale"][0][e].double() for e, out in enumerate(outs)]
    return [(torch.cat(scaled) * options["per_token_scale"][0].double().unsqueeze(1)).to(options["output_dtype"])]


def rule_grouped_matmul(x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, **options: Any) -> None:
    need(len(x) == len(weight) == 1 and x[0].dim() == 2 and weight[0].dim() == 3, "one x, one weight, one y")
    depth = weight[0].shape[1]
    if weight[0].dtype == torch.int32:
        scale, offset = options.pop("antiquant_scale"), options.pop("antiquant_offset")
        need(weight[0].transpose(1, 2).is_contiguous() and not weight[0].is_contiguous(), "INT4 here is transposed")
        depth *= 8
        experts, groups, columns = scale[0].shape
        need((experts, columns) == (weight[0].shape[0], weight[0].shape[2]), "a scale for each expert's columns")
        need(depth % groups == 0 and depth // groups % 2 == 0, "groups divide k, of even length")
        need(scale[0].is_contiguous() and offset[0].is_contiguous() and offset[0].shape == scale[0].shape, "offset")
        need(x[0].dtype in HALF and x[0].dtype == scale[0].dtype == offset[0].dtype, "dtypes of INT4 weights")
    else:
        need(x[0].dtype == weight[0].dtype and x[0].dtype in (*FLOAT, torch.int8), "dtypes")
    if x[0].dtype == torch.int8:
        scale, per_token = options.pop("scale"), options.pop("per_token_scale")
        need(scale[0].dtype == options.pop("output_dtype") == torch.bfloat16, "scales are BF16 where the output is")
        need(scale[0].shape == (weight[0].shape[0], weight[0].shape[2]), "a scale for each expert's columns")
        need(per_token[0].dtype == torch.float32 and per_token[0].shape == x[0].shape[:1], "a scale for each row")
    need(x[0].shape[1] == depth and group_list.shape == weight[0].shape[:1], "shapes")
    need(group_list.dtype == torch.int64, "group_list is INT64")
    need(options == {"split_item": 2, "group_type": 0, "group_list_type": 1}, "grouped by rows, by counts, one output")
    need(max(*x[0].shape[1:], *weight[0].shape[1:]) <= 65536, "inner axes up to 65536")


def npu_clipped_swiglu(x: Tensor, *, alpha: float, limit: float, bias: float, **options: Any) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return a * torch.sigmoid(alpha * a) * (b + bias)


def rule_clipped_swiglu(x: Tensor, *, alpha: float, limit: float, bias: float, **options: Any) -> None:
    need(x.dim() > 1 and x.shape[-1] % 2 == 0 and x.is_contiguous() and x.dtype in FLOAT, "x")
    need(options == {"dim": -1, "interleaved": False}, "halves of the last axis")


def npu_dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1) / 127
    return torch.round(x.float() / scale.unsqueeze(-1)).to(torch.int8), scale


def rule_dynamic_quant(x: Tensor) -> None:
    need(x.dim() > 1 and x.dtype in HALF, "x")


def npu_quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor, output_dtype: Any) -> Tensor:
    exact = x1.double() @ x2.double()
    return (exact * scale.double() * pertoken_scale.double().unsqueeze(1)).to(output_dtype)


def rule_quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor, output_dtype: Any) -> None:
    need(x1.dtype == x2.dtype == torch.int8 and 2 <= x1.dim() <= 6, "INT8")
    need(scale.dtype in (torch.float32, torch.bfloat16) and scale.shape == x2.shape[-1:], "scale by column")
    need(pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == x1.shape[-2:-1], "scale by row")
    need(output_dtype in HALF, "output_dtype")


def npu_lightning_indexer(query: Tensor, key: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    k = options["sparse_count"]
    out = torch.full((query.shape[0], 1, 1, k), -1, dtype=torch.int32)
    for b, length in enumerate(options["actual_seq_lengths_key"].tolist()):
        own = key[options["block_table"][b].long()].flatten(0, 1)[:length, 0].float()
        scores = (weights[b, 0].float()[:, None] * torch.relu(query[b, 0].float() @ own.T)).sum(0)
        best = scores.topk(min(k, length)).indices
        out[b, 0, 0, : len(best)] = best.int()
    return out, torch.empty(0)


def rule_lightning_indexer(query: Tensor, key: Tensor, weights: Tensor, **options: Any) -> None:
    need(query.dtype in HALF and key.dtype == query.dtype, "dtypes")
    need(weights.dtype in (torch.float32, query.dtype) and weights.shape == query.shape[:3], "weights")
    need(query.is_contiguous() and weights.is_contiguous() and key.is_contiguous(), "no strides")
    need(query.shape[3] == key.shape[3] == 128 and query.shape[2] <= 64 and key.shape[2] == 1, "heads and dim")
    need(options["layout_key"] == "PA_BSND" and key.shape[1] % 16 == 0 and key.shape[1] <= 1024, "paged keys")
    lengths = (options["actual_seq_lengths_query"], options["actual_seq_lengths_key"])
    need(all(t.dtype == torch.int32 and t.shape == query.shape[:1] for t in lengths), "lengths")
    need(options["block_table"].dtype == torch.int32 and options["block_table"].dim() == 2, "block_table")
    need(1 <= options["sparse_count"] <= 2048 and options["sparse_mode"] == 0, "sparse_count and mode")


def npu_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sparse_indices: Tensor, scale_value: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.cat((query, options["query_rope"]), dim=-1).float()
    k = torch.cat((key, options["key_rope"]), dim=-1).float()
    out = torch.empty_like(query)
    for b in range(query.shape[0]):
        picks = sparse_indices[b, 0, 0]
        picks = picks[picks >= 0].long()
        probs = (scale_value * q[b, 0] @ k[b, picks, 0].T).softmax(-1)
        out[b, 0] = (probs @ value[b, picks, 0].float()).to(out.dtype)
    return out, torch.empty(0), torch.empty(0)


def rule_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sparse_indices: Tensor, scale_value: float, **options: Any
) -> None:
    need(query.dtype in HALF and query.dtype == key.dtype == value.dtype, "one dtype, a half one")
    need(query.shape[3] == key.shape[3] == value.shape[3] == 512, "dim 512")
    need(query.shape[2] in (1, 2, 4, 8, 16, 32, 64, 128) and key.shape[2] == 1, "heads")
    ropes = (options["query_rope"], options["key_rope"])
    need(all(r.shape == (*t.shape[:3], 64) for r, t in zip(ropes, (query, key), strict=True)), "64 rotary dims")
    need(all(t.is_contiguous() for t in (query, key, value, sparse_indices, *ropes)), "no strides")
    need(sparse_indices.dtype == torch.int32 and sparse_indices.shape[:3] == (*query.shape[:2], 1), "indices")
    need(options["attention_mode"] == 2 and options["sparse_mode"] == 0 and options["sparse_block_size"] == 1, "modes")
    need(options["layout_query"] == options["layout_kv"] == "BSND" and "sinks" not in options, "layouts, no sinks")


def npu_mhc_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> tuple[Tensor, ...]:
    tokens, n, _ = x.shape
    flat = x.reshape(tokens, -1).float()
    normed = flat / torch.sqrt((flat**2).mean(1, keepdim=True) + norm_eps)
    parts = zip((normed @ phi.T).split([n, n, n * n], 1), bias.split([n, n, n * n]), alpha, strict=True)
    pre, post, res = (a * part + b for part, b, a in parts)
    h_in = ((pre.sigmoid() + hc_eps).unsqueeze(2) * x.float()).sum(1)
    return h_in.to(x.dtype), 2 * post.sigmoid(), res.view(tokens, n, n), *(torch.empty(0) for _ in range(3))


def rule_mhc_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> None:
    n, dim = x.shape[1:]
    need(x.dtype in HALF and phi.dtype == alpha.dtype == bias.dtype == torch.float32, "dtypes")
    need(n in (4, 6, 8) and dim % 16 == 0 and 1 <= dim <= 16384 and x.numel() > 0, "streams")
    need(phi.shape == (n * n + 2 * n, n * dim) and alpha.shape == (3,) and bias.shape == phi.shape[:1], "parameters")


def npu_mhc_sinkhorn(x: Tensor, *, eps: float = 1e-6, num_iters: int = 20) -> tuple[Tensor, ...]:
    y = x.softmax(-1) + eps
    y = y / (y.sum(-2, keepdim=True) + eps)
    for _ in range(1, num_iters):
        y = y / (y.sum(-1, keepdim=True) + eps)
        y = y / (y.sum(-2, keepdim=True) + eps)
    return y, torch.empty(0), torch.empty(0)


def rule_mhc_sinkhorn(x: Tensor, *, eps: float = 1e-6, num_iters: int = 20) -> None:
    need(x.dtype == torch.float32 and x.dim() == 3 and x.shape[1] == x.shape[2], "[T, n, n], FP32")
    need(x.shape[1] in (4, 6, 8) and 1 <= x.shape[0] <= 65536 and 1 <= num_iters <= 100, "numbers")


def npu_mhc_post(x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor) -> Tensor:
    # The page writes H_res x; which index is summed is from op-plugin's test_npu_mhc_post.py.
    kept = (h_res.unsqueeze(3) * x.float().unsqueeze(2)).sum(1)
    return (kept + h_post.unsqueeze(2) * h_out.float().unsqueeze(1)).to(x.dtype)


def rule_mhc_post(x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor) -> None:
    tokens, n, dim = x.shape
    need(x.dtype in HALF and h_out.dtype == x.dtype, "x and h_out of one dtype, a half one")
    need(h_res.dtype == h_post.dtype == torch.float32, "mappings in FP32")
    need(h_res.shape == (tokens, n, n) and h_out.shape == (tokens, dim) and h_post.shape == (tokens, n), "shapes")


NAMES = sorted(name for name in globals() if name.startswith("npu_"))


def checked(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """`operator`, called only where the page's conditions hold."""
    rule = globals()["rule_" + name.removeprefix("npu_")]

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            rule(*args, **kwargs)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        return operator(*args, **kwargs)

    return call


def operators() -> SimpleNamespace:
    """A stand-in for the module torch_npu, of these operators only."""
    return SimpleNamespace(**{name: checked(name, globals()[name]) for name in NAMES})
