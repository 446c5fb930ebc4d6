"""Tensor names: the model's parameters, the official checkpoint's, and transformers'. Translation is a table.

Official names are the model's own but for two spellings: hyper-connections are written with an underscore
(`layers.0.hc_attn_fn` for `layers.0.hc_attn.fn`), and experts are single tensors (`ffn.experts.7.w1.weight`) where
dense weights are stacked in the model (`ffn.experts.w13`, w1's rows first).

transformers has names of its own in memory; its `save_pretrained` (5.23) undoes part of its renamings and so writes a
mixture: `model.layers.0.attn.wq_a.weight` beside `model.embed_tokens.weight` and `head.weight`, and `norm` for each
kv_norm, also in a model that was loaded from its own names. `canonical_name` reads all of them.
"""

from __future__ import annotations

import re

_HC = re.compile(r"\b(hc_attn|hc_ffn|hc_head)[._](fn|base|scale)$")
_OFFICIAL_PARTS = ("attn.", "ffn.", "attn_norm.", "ffn_norm.", "hc_attn_", "hc_ffn_")

# (official, transformers) of the part after `layers.N.`, by prefix
_HF_LAYER = (
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.norm.", "self_attn.compressor.indexer.kv_norm."),
    ("attn.indexer.compressor.wkv.", "self_attn.compressor.indexer.kv_proj."),
    ("attn.indexer.compressor.wgate.", "self_attn.compressor.indexer.gate_proj."),
    ("attn.indexer.wq_b.", "self_attn.compressor.indexer.q_b_proj."),
    ("attn.indexer.weights_proj.", "self_attn.compressor.indexer.scorer.weights_proj."),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.norm.", "self_attn.compressor.kv_norm."),
    ("attn.compressor.wkv.", "self_attn.compressor.kv_proj."),
    ("attn.compressor.wgate.", "self_attn.compressor.gate_proj."),
    ("attn.wq_a.", "self_attn.q_a_proj."),
    ("attn.wq_b.", "self_attn.q_b_proj."),
    ("attn.q_norm.", "self_attn.q_a_norm."),
    ("attn.wkv.", "self_attn.kv_proj."),
    ("attn.kv_norm.", "self_attn.kv_norm."),
    ("attn.wo_a.", "self_attn.o_a_proj."),
    ("attn.wo_b.", "self_attn.o_b_proj."),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.", "mlp.gate."),
    ("ffn.shared_experts.w1.", "mlp.shared_experts.gate_proj."),
    ("ffn.shared_experts.w2.", "mlp.shared_experts.down_proj."),
    ("ffn.shared_experts.w3.", "mlp.shared_experts.up_proj."),
    ("ffn.experts.w13", "mlp.experts.gate_up_proj"),
    ("ffn.experts.w2", "mlp.experts.down_proj"),
)
_HF_SAVED = (
    ("attn.kv_norm.", "self_attn.norm."),
    ("attn.kv_norm.", "attn.norm."),
    ("attn.compressor.norm.", "self_attn.compressor.norm."),
    ("attn.indexer.compressor.norm.", "self_attn.compressor.indexer.norm."),
)
_HF_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_FROM_HF_TOP = {hf.removeprefix("model."): official for official, hf in _HF_TOP.items()}


def official_name(name: str) -> str:
    """The official spelling of a model parameter that isn't a stacked expert weight."""
    return _HC.sub(r"\1_\2", name)


def from_official(name: str) -> str:
    """The model's parameter for an official tensor name that isn't an expert's."""
    return _HC.sub(r"\1.\2", name)


def hf_name(name: str) -> str:
    """transformers' name (in memory) of an official or model name; stacked experts as `ffn.experts.w13` and `.w2`.

    KeyError for what transformers doesn't have: MTP.
    """
    name = official_name(name)
    if name in _HF_TOP:
        return _HF_TOP[name]
    head, number, rest = [*name.split(".", 2), "", ""][:3]
    if head == "layers":
        for official, hf in _HF_LAYER:
            if rest.startswith(official):
                return f"model.layers.{number}.{hf}{rest[len(official):]}"
    raise KeyError(name)


def is_hf_name(name: str) -> bool:
    """Only transformers' checkpoints have the `model.` prefix or `lm_head`."""
    return name.startswith(("model.", "lm_head."))


def canonical_name(name: str) -> str:
    """The official name of a checkpoint's tensor in any spelling; an unknown name comes back nearly unchanged."""
    bare = name.removeprefix("model.")
    if bare.endswith(".weight_scale_inv"):
        bare = bare.removesuffix(".weight_scale_inv") + ".scale"
    if not bare.startswith("layers."):
        return _FROM_HF_TOP.get(bare, bare)
    head, number, rest = [*bare.split(".", 2), "", ""][:3]
    if rest.startswith(_OFFICIAL_PARTS) and not rest.startswith("attn.norm."):
        return f"{head}.{number}.{rest}"
    for official, hf in (*_HF_SAVED, *_HF_LAYER):
        if rest.startswith(hf):
            return f"{head}.{number}.{official}{rest[len(hf):]}"
    return bare
