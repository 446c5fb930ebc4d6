"""A model of ours as GGUF, architecture deepseek4, as llama.cpp's conversion/deepseek.py would write the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {  # official name in a layer -> GGUF
    "hc_attn_fn": "hc_attn_fn", "hc_attn_base": "hc_attn_base", "hc_attn_scale": "hc_attn_scale",
    "hc_ffn_fn": "hc_ffn_fn", "hc_ffn_base": "hc_ffn_base", "hc_ffn_scale": "hc_ffn_scale",
    "attn.attn_sink": "attn_sinks", "attn.wq_a.weight": "attn_q_a", "attn.wq_b.weight": "attn_q_b",
    "attn.q_norm.weight": "attn_q_a_norm", "attn.wkv.weight": "attn_kv", "attn.kv_norm.weight": "attn_kv_a_norm",
    "attn.wo_a.weight": "attn_output_a", "attn.wo_b.weight": "attn_output_b",
    "attn.compressor.ape": "attn_compressor_ape", "attn.compressor.wkv.weight": "attn_compressor_kv",
    "attn.compressor.wgate.weight": "attn_compressor_gate", "attn.compressor.norm.weight": "attn_compressor_norm",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b", "attn.indexer.weights_proj.weight": "indexer.proj",
    "attn.indexer.compressor.ape": "indexer_compressor_ape",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm",
    "attn_norm.weight": "attn_norm", "ffn_norm.weight": "ffn_norm", "ffn.gate.weight": "ffn_gate_inp",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid", "ffn.shared_experts.w1.weight": "ffn_gate_shexp",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp", "ffn.shared_experts.w3.weight": "ffn_up_shexp",
}  # fmt: skip
TOP = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight",
       "hc_head_fn": "output_hc_fn.weight", "hc_head_base": "output_hc_base.weight",
       "hc_head_scale": "output_hc_scale.weight"}  # fmt: skip


def mxfp4(weight: Any, scale: Any) -> Any:
    """Our FP4 [rows, cols/2] as GGUF's blocks [rows, cols/32 * 17]: a scale byte, then 16 bytes whose low nibbles are
    the group's first half and whose high nibbles are its second."""
    import torch

    rows = weight.shape[0]
    codes = torch.stack((weight & 15, weight >> 4), -1).view(rows, -1, 32)
    packed = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat((scale.unsqueeze(-1), packed), -1).view(rows, -1).numpy()


def write_gguf(model: Any, path: Path, context: int) -> None:
    """The model without MTP, for contexts of so many tokens; no tokenizer."""
    import gguf
    import torch

    from upwell.checkpoint.names import official_name

    c = model.config
    writer = gguf.GGUFWriter(str(path), "deepseek4")
    for key, value in {
        "vocab_size": c.vocab_size, "context_length": context, "embedding_length": c.hidden_size,
        "embedding_length_out": c.hidden_size * c.hc_mult, "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "rope.dimension_count": c.qk_rope_head_dim, "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window, "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok, "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_count": c.n_shared_experts, "expert_gating_func": 4,
        "attention.indexer.head_count": c.index_n_heads, "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk, "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank, "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters, "hash_layer_count": c.num_hash_layers,
    }.items():  # fmt: skip
        writer.add_uint32(f"deepseek4.{key}", value)
    for key, number in {
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "expert_weights_scale": c.routed_scaling_factor,
        "rope.freq_base": c.rope_theta, "attention.compress_rope_freq_base": c.compress_rope_theta,
        "hyper_connection.epsilon": c.hc_eps,
    }.items():  # fmt: skip
        writer.add_float32(f"deepseek4.{key}", number)
    writer.add_bool("deepseek4.expert_weights_norm", True)
    writer.add_array("deepseek4.attention.compress_ratios", list(c.compress_ratios))
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        writer.add_array(f"deepseek4.{key}", [c.swiglu_limit] * c.num_hidden_layers)
    writer.add_string("tokenizer.ggml.model", "none")

    def add(name: str, tensor: Any) -> None:
        if tensor.dtype == torch.bfloat16 and tensor.dim() > 1:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            plain = tensor.int() if not tensor.is_floating_point() else tensor.float()
            writer.add_tensor(name, plain.contiguous().numpy())

    for ours, tensor in model.state_dict().items():
        name = official_name(ours)
        if name in TOP:
            add(TOP[name], tensor)
            continue
        _, layer, rest = name.split(".", 2)
        if rest in NAMES:
            add(f"blk.{layer}.{NAMES[rest]}.weight", tensor)
        elif rest == "ffn.gate.bias":
            add(f"blk.{layer}.exp_probs_b.bias", tensor)
    inter = c.moe_intermediate_size
    for layer, block in enumerate(model.layers):
        experts = block.ffn.experts
        for leaf, to in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            name = f"blk.{layer}.ffn_{to}_exps.weight"
            if experts.packed is not None:
                import numpy as np

                data = np.stack([mxfp4(*expert[leaf]) for expert in experts.packed])
                writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
            else:
                add(name, {"w1": experts.w13[:, :inter], "w3": experts.w13[:, inter:], "w2": experts.w2}[leaf].detach())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
