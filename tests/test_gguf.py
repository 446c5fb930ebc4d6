"""The GGUF that benchmarks/gguf_v4.py writes holds the model: llama.cpp's own package reads the same values back.

Not checked: that llama.cpp computes with them what we do; benchmarks/vs_llama_cpp.py compares logits before it times.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from upwell.formats.fp4 import dequantize_fp4

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gguf_v4
import vs_llama_cpp

gguf = pytest.importorskip("gguf")
SMALL = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=32, o_lora_rank=16, o_groups=2, index_topk=8, n_routed_experts=6, moe_intermediate_size=32,
    compress_ratios=[0, 4, 128],
)  # fmt: skip


@pytest.fixture(params=["f32", "bf16", "fp4"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A small model, and the reader of its GGUF."""
    monkeypatch.setattr(vs_llama_cpp, "GEOMETRY", vs_llama_cpp.GEOMETRY | SMALL)
    model = vs_llama_cpp.build(request.param)
    gguf_v4.write_gguf(model, tmp_path / "model.gguf", 512)
    return model, gguf.GGUFReader(tmp_path / "model.gguf")


def values(tensor: Any) -> Tensor:
    """As FP32, in the order of dimensions that PyTorch has (GGUF lists the fastest first)."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.I32:
        plain = torch.tensor(tensor.data)
    else:
        plain = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    return plain.view([int(n) for n in reversed(tensor.shape)])


def test_tensors_are_the_models(written: tuple[Any, Any]) -> None:
    model, reader = written
    tensors = {tensor.name: values(tensor) for tensor in reader.tensors}
    state = model.state_dict()

    def same(name: str, ours: str) -> None:
        assert torch.equal(tensors.pop(name), state[ours].float() if state[ours].is_floating_point() else state[ours])

    for layer, block in enumerate(model.layers):
        experts, inter = block.ffn.experts, model.config.moe_intermediate_size
        for leaf, to in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            if experts.packed is not None:
                expected = torch.stack([dequantize_fp4(*expert[leaf]) for expert in experts.packed])
            else:
                expected = {"w1": experts.w13[:, :inter], "w3": experts.w13[:, inter:], "w2": experts.w2}[leaf].float()
            assert torch.equal(tensors.pop(f"blk.{layer}.ffn_{to}_exps.weight"), expected)
        same(f"blk.{layer}.attn_q_b.weight", f"layers.{layer}.attn.wq_b.weight")
        same(f"blk.{layer}.attn_output_a.weight", f"layers.{layer}.attn.wo_a.weight")
        same(f"blk.{layer}.attn_sinks.weight", f"layers.{layer}.attn.attn_sink")
    same("blk.0.ffn_gate_tid2eid.weight", "layers.0.ffn.gate.tid2eid")
    same("blk.1.exp_probs_b.bias", "layers.1.ffn.gate.bias")
    same("token_embd.weight", "embed.weight")
    same("output.weight", "head.weight")
    # Whatever else the model has is there once, by number of values.
    kept = sum(t.numel() for t in state.values()) + sum(
        dequantize_fp4(*matrix).numel() for block in model.layers for expert in block.ffn.experts.packed or ()
        for matrix in expert.values()
    )  # fmt: skip
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == kept


def test_metadata_are_the_config(written: tuple[Any, Any]) -> None:
    model, reader = written
    c = model.config

    def field(name: str) -> Any:
        return reader.fields[f"deepseek4.{name}"].contents()

    assert field("attention.compress_ratios") == list(c.compress_ratios)
    assert field("attention.indexer.key_length") == c.index_head_dim
    assert field("attention.indexer.top_k") == c.index_topk
    assert field("attention.key_length") == c.head_dim
    assert field("rope.dimension_count") == c.qk_rope_head_dim
    assert field("attention.output_group_count") == c.o_groups
    assert field("expert_weights_scale") == pytest.approx(c.routed_scaling_factor)
    assert field("rope.freq_base") == pytest.approx(c.rope_theta)
    assert field("attention.compress_rope_freq_base") == pytest.approx(c.compress_rope_theta)
    assert field("swiglu_clamp_exp") == pytest.approx([c.swiglu_limit] * c.num_hidden_layers)
