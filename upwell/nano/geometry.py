"""nano's geometry: every part of V4 switched on, small enough to train on a CPU in an hour or two."""

from __future__ import annotations

from dataclasses import replace

from upwell.config import ModelConfig

NANO = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=6,
    compress_ratios=(0, 4, 128, 4, 128, 4),  # sliding, then CSA and HCA in turn
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=128,
    o_lora_rank=64,
    o_groups=2,
    # A question about a table points back over its whole schema: prompts are kept within the window.
    sliding_window=256,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=32,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    num_nextn_predict_layers=1,
    max_position_embeddings=65536,
    quant_method="fp8",
    expert_dtype="fp4",
)

# The indexer learns last, from a trained trunk (nano/heads.py): until then CSA reads every entry.
UNSELECTIVE = replace(NANO, index_topk=1 << 20)
