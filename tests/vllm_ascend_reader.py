"""Reads a checkpoint as vllm-ascend's loader does, for tests: written from its rules, not from upwell's writer.

Rules (vllm-project/vllm-ascend at 182b75ea: quantization/modelslim_config.py, quantization/methods/w8a8_dynamic.py):
a layer is quantized as quant_model_description.json says of `<name>.weight`; the key is found under the model's own
names after renaming; the shards of gate_up_proj must agree; W8A8_DYNAMIC has weight INT8 [out, in], weight_scale and
weight_offset [out, 1]; config.json has no quantization_config.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PREFIXES = {"layers.": "model.layers.", "embed.": "model.embed_tokens.", "head.": "lm_head."}
PARTS = {
    ".attn.": ".self_attn.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj.", ".ffn.": ".mlp.",
    ".ffn_norm.": ".post_attention_layernorm.", ".attn_norm.": ".input_layernorm.",
}  # fmt: skip


def runtime_name(name: str) -> str:
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    for old, new in PARTS.items():
        name = name.replace(old, new)
    return name


def read(directory: Path) -> dict[str, Tensor]:
    """Every weight by its runtime name, dequantized to FP32. Raises AssertionError where the loader would fail."""
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "deepseek_v4" and "quantization_config" not in config
    description = json.loads((directory / "quant_model_description.json").read_text())
    described = {runtime_name(name): kind for name, kind in description.items()}
    index = json.loads((directory / "quant_model_weights.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with safe_open(directory / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (not a dict)
                assert index[name] == file
                tensors[runtime_name(name)] = shard.get_tensor(name)
    assert set(tensors) == {runtime_name(name) for name in index}
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(("weight_scale", "weight_offset")):
            continue
        kind = described[name]
        if kind == "FLOAT":
            weights[name] = tensor
            continue
        assert kind == "W8A8_DYNAMIC" and tensor.dtype == torch.int8 and name.endswith(".weight")
        scale, offset = (tensors[f"{name}_{part}"] for part in ("scale", "offset"))
        assert scale.shape == offset.shape == (tensor.shape[0], 1) and scale.dtype == offset.dtype == torch.float32
        assert not offset.any()
        assert described[f"{name}_scale"] == described[f"{name}_offset"] == kind
        weights[name] = tensor.float() * scale
    for name in weights:
        if name.endswith(".gate_proj.weight"):
            assert described[name] == described[name.replace(".gate_proj.", ".up_proj.")], "packed gate_up_proj"
    return weights
