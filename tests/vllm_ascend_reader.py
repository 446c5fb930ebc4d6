"""Reads a checkpoint as vllm-ascend's loader does, for tests: written from its rules, not from upwell's writer.

Rules (vllm-project/vllm-ascend at 182b75ea: quantization/modelslim_config.py, quantization/method_adapters.py,
quantization/methods/w8a8_dynamic.py, w4a8.py, w4a16.py, models/deepseek_v4/mtp.py, dspark.py; and the DSpark loader
that came with its converter, examples/quantization/deepseek_v4 at 21e63796): a layer is quantized as
quant_model_description.json says of `<name>.weight`; the key is found under the model's own names after renaming; the
shards of gate_up_proj must agree, and so must all of a layer's experts; config.json has no quantization_config.

W8A8_DYNAMIC has weight INT8 [out, in], weight_scale and weight_offset [out, 1]. W4A8_DYNAMIC, for routed experts only
and by row only (group_size 0), has weight INT8 [out/2, in], which is transposed and read as INT4 in INT32, lowest
nibble first; scale_bias [out, 1], of down_proj [out, 16], of which a tensor-parallel rank takes its part and sums it.
W4A16, for routed experts only, has weight_packed INT32 [out, in/8], weight_scale BF16 [out, in/group_size] and
weight_shape. MTP is a model of its own: it takes names with `mtp.0.`, its embedding and head among them. A DSpark
drafter (config.json has dspark_block_size) takes the target's embedding and head; its wo_a is FP8 with a `.scale`,
which its loader decodes; main_* belong to the first stage, norm, hc_head_* and markov_head to the last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

PREFIXES = {"layers.": "model.layers.", "embed.": "model.embed_tokens.", "head.": "lm_head."}
PARTS = {
    ".attn.": ".self_attn.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj.", ".ffn.": ".mlp.",
    ".ffn_norm.": ".post_attention_layernorm.", ".attn_norm.": ".input_layernorm.",
}  # fmt: skip
COMPANIONS = ("weight_scale", "weight_offset", "scale_bias", "weight_shape")


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
    assert "hc_head_fn" in described  # without it the loader doesn't rename this model's keys
    tensors = _tensors(directory)
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(COMPANIONS):
            continue
        kind = described[name]
        if kind == "FLOAT":
            weights[name] = tensor
            continue
        base = name.removesuffix("weight_packed").removesuffix("weight")
        assert {described[f"{base}{part}"] for part in COMPANIONS if f"{base}{part}" in tensors} == {kind}
        decode = {"W8A8_DYNAMIC": _w8a8, "W4A8_DYNAMIC": _w4a8, "W4A16": _w4a16}[kind]
        weights[f"{base}weight"] = decode(base, tensors, description)
    _check_kinds({name.replace("weight_packed", "weight"): kind for name, kind in described.items()}, weights)
    if "dspark_block_size" in config:
        _read_dspark(weights, config)
    elif config["num_nextn_predict_layers"]:
        _check_mtp(weights)
    return weights


def _tensors(directory: Path) -> dict[str, Tensor]:
    index = json.loads((directory / "quant_model_weights.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with safe_open(directory / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (not a dict)
                assert index[name] == file
                tensors[runtime_name(name)] = shard.get_tensor(name)
    assert set(tensors) == {runtime_name(name) for name in index}
    return tensors


def _w8a8(base: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> Tensor:
    weight = tensors[f"{base}weight"]
    assert weight.dtype == torch.int8
    return weight.float() * _row_scale(base, tensors, weight.shape[0])


def _row_scale(base: str, tensors: dict[str, Tensor], rows: int) -> Tensor:
    scale, offset = (tensors[f"{base}{part}"] for part in ("weight_scale", "weight_offset"))
    assert scale.shape == offset.shape == (rows, 1) and scale.dtype == offset.dtype == torch.float32
    assert not offset.any()
    return scale


def _w4a8(base: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> Tensor:
    assert ".experts." in base and description["group_size"] == 0
    stored = tensors[f"{base}weight"]
    assert stored.dtype == torch.int8
    on_device = stored.T.contiguous().view(torch.int32)  # [in, out/8]
    codes = torch.stack([(on_device >> (4 * i)) & 15 for i in range(8)], dim=-1).flatten(1)
    codes = torch.where(codes > 7, codes - 16, codes).T  # [out, in]
    scale = _row_scale(base, tensors, codes.shape[0])
    bias = tensors[f"{base}scale_bias"]
    is_down = ".down_proj." in base
    assert bias.dtype == torch.float32 and bias.shape == (codes.shape[0], 16 if is_down else 1)
    for ranks in (1, 4) if is_down else (1,):
        for of_rank, part in zip(bias.chunk(ranks, 1), codes.chunk(ranks, 1), strict=True):
            expected = 8 * (part.double() * scale.double()).sum(1)
            assert torch.allclose(of_rank.double().sum(1), expected, rtol=1e-5, atol=1e-4 * float(scale.max()))
    return codes.float() * scale


def _w4a16(base: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> Tensor:
    packed, scale, shape = (tensors[f"{base}{part}"] for part in ("weight_packed", "weight_scale", "weight_shape"))
    assert ".experts." in base and packed.dtype == shape.dtype == torch.int32 and scale.dtype == torch.bfloat16
    codes = torch.zeros(packed.shape[0], packed.shape[1] * 8, dtype=torch.int32)
    for i in range(8):
        codes[:, i::8] = ((packed >> (4 * i)) & 15) - 8
    assert codes.shape == tuple(shape.tolist())
    assert scale.shape == (codes.shape[0], codes.shape[1] // description["group_size"])
    return codes.float() * scale.float().repeat_interleave(description["group_size"], 1)


def _check_kinds(described: dict[str, str], weights: dict[str, Tensor]) -> None:
    for name in weights:
        if name.endswith(".gate_proj.weight"):
            assert described[name] == described[name.replace(".gate_proj.", ".up_proj.")], "packed gate_up_proj"
        head, is_expert, _ = name.partition(".experts.")
        if is_expert:
            assert described[name] == described[f"{head}.experts.0.gate_proj.weight"], "one kind for a layer's experts"
        elif name.endswith(".weight"):
            assert described[name] in ("FLOAT", "W8A8_DYNAMIC"), "no such linear method"


def _check_mtp(weights: dict[str, Tensor]) -> None:
    assert torch.equal(weights["mtp.0.emb.tok_emb.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(weights["mtp.0.head.weight"], weights["lm_head.weight"])


def _read_dspark(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Decodes wo_a of each stage in place, and checks what the loader requires."""
    stages = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("mtp."))
    for stage in range(stages):
        base = f"mtp.{stage}.self_attn.wo_a"
        scale, weight = weights.pop(f"{base}.scale"), weights[f"{base}.weight"]
        assert weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.float8_e8m0fnu
        blocks = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        weights[f"{base}.weight"] = weight.float() * blocks[: weight.shape[0], : weight.shape[1]]
    last, hidden = f"mtp.{stages - 1}", config["hidden_size"]
    targets, rank = len(config["dspark_target_layer_ids"]), config["dspark_markov_rank"]
    required = {
        "mtp.0.main_proj.weight": (hidden, targets * hidden), "mtp.0.main_norm.weight": (hidden,),
        f"{last}.norm.weight": (hidden,), f"{last}.hc_head_fn": (config["hc_mult"], config["hc_mult"] * hidden),
        f"{last}.hc_head_base": (config["hc_mult"],), f"{last}.hc_head_scale": (1,),
        f"{last}.markov_head.markov_w1.weight": (config["vocab_size"], rank),
        f"{last}.markov_head.markov_w2.weight": (config["vocab_size"], rank),
        f"{last}.confidence_head.proj.weight": (1, hidden + rank),
    }  # fmt: skip
    for name, shape in required.items():
        assert weights[name].shape == shape, name
    assert not any(name.startswith("mtp.") and (".emb." in name or name.endswith(".head.weight")) for name in weights)
