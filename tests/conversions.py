"""A small V4 checkpoint as released, for the tests of upwell convert, and what they compare."""

from __future__ import annotations

from pathlib import Path

import torch
from models import fill
from torch import Tensor

from upwell.checkpoint import save_checkpoint
from upwell.config import ModelConfig
from upwell.model import Transformer
from upwell.ops.linear import dense_weight

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_attention_heads=4,
    head_dim=32, qk_rope_head_dim=16, q_lora_rank=48, o_lora_rank=24, o_groups=2, sliding_window=16, index_n_heads=4,
    index_head_dim=32, index_topk=5, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
    num_hash_layers=1, routed_scaling_factor=1.5, swiglu_limit=10.0, num_nextn_predict_layers=1,
    max_position_embeddings=4096,
)  # fmt: skip


def save_official(path: Path, config: ModelConfig = CONFIG, seed: int = 3) -> Path:
    """FP8 matrices and FP4 experts, as released."""
    model = Transformer(config).eval()
    fill(model, seed, config.n_routed_experts)
    save_checkpoint(model, path, quantize=True)
    (path / "tokenizer_config.json").write_text("{}")
    return path


def dense(model: Transformer) -> dict[str, Tensor]:
    """Every linear weight of a loaded model in FP32, experts too."""
    out = {}
    for name, module in model.named_modules():
        if hasattr(module, "dense"):
            out[name] = module.dense(torch.float32)
        elif getattr(module, "packed", None) is not None:
            for e, parts in enumerate(module.packed):
                out |= {f"{name}.{e}.{leaf}": dense_weight(w, s, torch.float32) for leaf, (w, s) in parts.items()}
        elif hasattr(module, "w13"):
            for e in range(module.n):
                s13, s2 = (None if s is None else s[e] for s in (module.w13_scale, module.w2_scale))
                w1, w3 = dense_weight(module.w13[e], s13, torch.float32).chunk(2)
                w2 = dense_weight(module.w2[e], s2, torch.float32)
                out |= {f"{name}.{e}.w1": w1, f"{name}.{e}.w3": w3, f"{name}.{e}.w2": w2}
    return out


def assert_rounded(ours: Tensor, weight: Tensor, to: str, name: str, on_grid: bool = True) -> None:
    """Half a step of the format that `name` has in the target; of INT8 `on_grid`, no more in all than that."""
    routed = ".experts." in name
    groups = 1 if to != "w4a16" or not routed else weight.shape[1] // 32
    steps = 127 if to == "w8a8" or not routed else 7
    by_group = weight.view(len(weight), groups, -1)
    step = (by_group.abs().amax(-1, keepdim=True) / steps).expand_as(by_group).reshape(weight.shape)
    if steps == 127 and on_grid and not torch.equal(ours.float(), weight.bfloat16().float()):
        usual = ((weight / step).round() * step - weight).square().sum(1)
        assert ((ours.float() - weight).square().sum(1) <= usual * 1.001).all(), name
        return
    slack = 1.001 if groups == 1 else 1.06  # of groups the scale is a BF16 number: up to 2^-9 of the largest, 7 steps
    assert ((ours.float() - weight).abs() <= step / 2 * slack).all(), name
