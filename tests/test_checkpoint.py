"""Checkpoints: round trips in every format, transformers on the other side, damage named before it costs memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from upwell.checkpoint import load_model, save_checkpoint
from upwell.checkpoint.match import plan_checkpoint
from upwell.checkpoint.names import canonical_name, from_official, hf_name, official_name
from upwell.checkpoint.save import hf_config
from upwell.config import PRESETS, ModelConfig, Yarn
from upwell.engine import LLM
from upwell.errors import CheckpointError, ConfigError, InputError, UpwellError
from upwell.formats.fp4 import dequantize_fp4, quantize_fp4
from upwell.formats.fp8 import dequantize_fp8, quantize_fp8
from upwell.model import Transformer
from upwell.model.init import init_weights

# Selection keeps every entry at these lengths: a checkpoint test must not hang on the indexer's near-ties.
CONFIG = ModelConfig(
    vocab_size=200, hidden_size=96, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4), num_attention_heads=4,
    head_dim=48, qk_rope_head_dim=8, q_lora_rank=32, o_lora_rank=16, o_groups=2, sliding_window=16, index_n_heads=4,
    index_head_dim=16, index_topk=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
    num_hash_layers=1, routed_scaling_factor=1.5, swiglu_limit=10.0, yarn=Yarn(16, 64), max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = init_weights(Transformer(CONFIG), seed=3, std=0.15)
    with torch.no_grad():  # values that a mixed-up name would show
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name or name.endswith(("attn_sink", "ape", "base", "scale")):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("gate.bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()))
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, 150), generator=torch.Generator().manual_seed(1))


def same_tensors(a: Transformer, b: Transformer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        v.dtype == right[k].dtype and torch.equal(v.view(torch.uint8), right[k].view(torch.uint8))
        for k, v in left.items()
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# --- names and configs


def test_names_translate_there_and_back(model: Transformer) -> None:
    for name in model.state_dict():
        assert from_official(official_name(name)) == name
        if not name.startswith("mtp."):
            assert canonical_name(hf_name(name)) == official_name(name)
    with pytest.raises(KeyError):
        hf_name("mtp.0.enorm.weight")


@pytest.mark.parametrize("config", [CONFIG, *map(ModelConfig.preset, PRESETS)], ids=["small", *PRESETS])
def test_config_survives_both_spellings(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config.to_official()) == config
    plain = replace(config, quant_method=None, expert_dtype=None, num_nextn_predict_layers=0)
    assert ModelConfig.from_dict(hf_config(config)) == plain


# --- round trips


def test_official_quantized_comes_back_bit_for_bit(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "a")
    once = load_model(tmp_path / "a")
    save_checkpoint(once, tmp_path / "b", max_shard_bytes=50_000)
    twice = load_model(tmp_path / "b")
    assert same_tensors(once, twice)
    for module, other in zip(once.modules(), twice.modules(), strict=True):
        if hasattr(module, "packed"):
            for mine, theirs in zip(module.packed, other.packed, strict=True):
                assert all(torch.equal(a, b) for k in mine for a, b in zip(mine[k], theirs[k], strict=True))
    save_checkpoint(twice, tmp_path / "c")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()


def test_official_quantized_has_the_releases_formats(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # the field's own reader
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        packed, scale = (file.get_tensor(f"layers.1.ffn.experts.5.w3.{leaf}") for leaf in ("weight", "scale"))
        codes, block_scale = (file.get_tensor(f"layers.1.attn.wo_a.{leaf}") for leaf in ("weight", "scale"))
    expected = {
        "embed.weight": "BF16", "head.weight": "BF16", "norm.weight": "BF16", "hc_head_fn": "F32",
        "layers.0.attn.wq_b.weight": "F8_E4M3", "layers.0.attn.wq_b.scale": "F8_E8M0",
        "layers.0.attn.attn_sink": "F32", "layers.0.ffn.gate.tid2eid": "I64", "layers.1.ffn.gate.bias": "F32",
        "layers.1.ffn.gate.weight": "BF16", "layers.1.attn.compressor.ape": "F32",
        "layers.1.attn.compressor.wkv.weight": "BF16", "layers.1.attn.indexer.wq_b.weight": "F8_E4M3",
        "layers.1.attn.indexer.weights_proj.weight": "BF16", "layers.1.hc_ffn_base": "F32",
        "layers.0.ffn.experts.7.w2.weight": "I8", "layers.0.ffn.experts.7.w2.scale": "F8_E8M0",
        "layers.0.ffn.shared_experts.w1.weight": "F8_E4M3", "mtp.0.e_proj.weight": "F8_E4M3",
        "mtp.0.enorm.weight": "BF16", "mtp.0.hc_head_scale": "F32",
    }  # fmt: skip
    assert {name: dtypes[name] for name in expected} == expected
    w3 = model.layers[1].ffn.experts.w13[5, CONFIG.moe_intermediate_size :]
    assert torch.equal(dequantize_fp4(packed, scale), dequantize_fp4(*quantize_fp4(w3)))
    wo_a = model.layers[1].attn.wo_a.weight
    assert torch.equal(dequantize_fp8(codes, block_scale), dequantize_fp8(*quantize_fp8(wo_a)))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["expert_dtype"] == "fp4" and raw["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_official_plain_is_lossless(
    model: Transformer, ids: torch.Tensor, tmp_path: Path, max_shard_bytes: int
) -> None:
    save_checkpoint(model, tmp_path, quantize=False, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**6)
    loaded = load_model(tmp_path)
    assert loaded.config == CONFIG and loaded.dtype == torch.float32
    assert same_tensors(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
        streams = model.streams(ids)
        assert torch.equal(loaded.draft(ids, streams)[0], model.draft(ids, streams)[0])


def test_packed_weights_compute_what_their_decoded_values_do(
    model: Transformer, ids: torch.Tensor, tmp_path: Path
) -> None:
    save_checkpoint(model, tmp_path / "packed")
    packed = load_model(tmp_path / "packed", dtype=torch.float32)
    save_checkpoint(packed, tmp_path / "plain", quantize=False)
    plain = load_model(tmp_path / "plain")
    assert packed.layers[0].attn.wo_a.weight.dtype == torch.float8_e4m3fn
    assert packed.layers[0].ffn.experts.packed is not None and packed.layers[0].ffn.experts.w13.numel() == 0
    assert plain.layers[0].ffn.experts.packed is None
    with torch.no_grad():
        assert relative(packed(ids), plain(ids)) < 1e-5


def test_official_numerics_round_inputs_of_quantized_linears_but_wo_a(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path)
    official = load_model(tmp_path, numerics="official")
    attn, ffn = official.layers[1].attn, official.layers[1].ffn
    assert attn.wq_a.quantize_input and attn.wo_b.quantize_input and attn.indexer.wq_b.quantize_input
    assert ffn.experts.quantize_input and ffn.shared_experts.w2.quantize_input
    assert not attn.wo_a.quantize_input and not attn.compressor.wkv.quantize_input and not official.head.quantize_input
    assert ffn.gate.weight.dtype == torch.float32
    assert load_model(tmp_path).layers[1].ffn.gate.weight.dtype == torch.bfloat16
    assert not load_model(tmp_path).layers[1].attn.wq_a.quantize_input


def test_fp8_experts_of_base_models_stay_packed(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "fp4")
    tensors = load_file(tmp_path / "fp4/model.safetensors")
    for name in [n for n in tensors if ".experts." in n and n.endswith(".weight")]:
        scale_name = name.removesuffix("weight") + "scale"
        codes, scale = quantize_fp8(dequantize_fp4(tensors[name], tensors[scale_name]))
        tensors[name], tensors[scale_name] = codes, scale.view(torch.float8_e8m0fnu)
    (tmp_path / "fp8").mkdir()
    save_file(tensors, tmp_path / "fp8/model.safetensors")
    (tmp_path / "fp8/config.json").write_bytes((tmp_path / "fp4/config.json").read_bytes())
    base = load_model(tmp_path / "fp8")
    assert base.layers[0].ffn.experts.packed[0]["w1"][0].dtype == torch.float8_e4m3fn
    save_checkpoint(base, tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors")["layers.0.ffn.experts.0.w1.weight"].dtype == (
        torch.float8_e4m3fn
    )


def test_dtype_converts_all_but_what_is_always_fp32(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, quantize=False)
    half = load_model(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        always = name.endswith(("norm.weight", "attn_sink", "ape")) or ".hc_" in f".{name}"
        assert parameter.dtype == (torch.float32 if always else torch.bfloat16), name
    assert half.layers[1].ffn.gate.bias.dtype == torch.float32
    with pytest.raises(InputError, match="float16"):
        load_model(tmp_path, dtype=torch.float16)


def test_writing_to_a_loaded_weight_leaves_the_file_alone(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, quantize=False)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        load_model(tmp_path).embed.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_saving_over_a_loaded_checkpoint_is_safe_and_leaves_no_old_shards(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path, quantize=False, max_shard_bytes=60_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = load_model(tmp_path)
    save_checkpoint(loaded, tmp_path, quantize=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert same_tensors(load_model(tmp_path), model)


def test_a_failed_save_changes_nothing(model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(model, tmp_path, quantize=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(_: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("upwell.checkpoint.save.quantize_fp4", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_ragged_fp4_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    odd = init_weights(Transformer(replace(CONFIG, moe_intermediate_size=40)), seed=0)
    with pytest.raises(CheckpointError, match=r"layers.0.ffn.experts.0.w2.weight: 40 columns.*32"):
        save_checkpoint(odd, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- transformers on the other side


@pytest.mark.parametrize("format", ["transformers", "official"])
def test_transformers_loads_what_is_written(model: Transformer, ids: torch.Tensor, tmp_path: Path, format: str) -> None:
    from transformers import DeepseekV4ForCausalLM

    save_checkpoint(model, tmp_path, format=format, quantize=False, max_shard_bytes=300_000)
    theirs, info = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert relative(model(ids), theirs.eval()(ids).logits) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_save_pretrained_writes_is_loaded(
    model: Transformer, ids: torch.Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import DeepseekV4ForCausalLM

    save_checkpoint(model, tmp_path / "ours", format="transformers")
    theirs = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    loaded = load_model(tmp_path / "theirs")
    assert loaded.dtype == dtype and len(loaded.mtp) == 0
    by_name = theirs.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(by_name[hf_name(name)].to(tensor.dtype), tensor), name
    with torch.no_grad():
        assert relative(load_model(tmp_path / "theirs", dtype=torch.float32)(ids), theirs.float()(ids).logits) < 1e-4


def test_transformers_names_come_back(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "f32", format="transformers")
    loaded, expected = load_model(tmp_path / "f32").state_dict(), model.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    assert expected.keys() - loaded.keys() == {name for name in expected if name.startswith("mtp.")}
    save_checkpoint(model, tmp_path / "packed")
    packed = load_model(tmp_path / "packed")
    save_checkpoint(packed, tmp_path / "decoded", format="transformers")
    stack = load_model(tmp_path / "decoded").layers[0].ffn.experts.w13
    weight, scale = packed.layers[0].ffn.experts.packed[2]["w1"]
    assert torch.equal(stack[2, : CONFIG.moe_intermediate_size], dequantize_fp4(weight, scale, torch.bfloat16))


# --- damage


Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def good(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    save_checkpoint(model, path / "sharded", max_shard_bytes=100_000)
    save_checkpoint(model, path / "single")
    return path


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refused(path: Path, error: type[UpwellError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    return message


def edited(good: Path, tmp_path: Path, edit: Edit) -> str:
    path = copy_of(good / "single", tmp_path / "edited")
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")
    return refused(path)


def test_missing_shard(good: Path, tmp_path: Path) -> None:
    path = copy_of(good / "sharded", tmp_path / "x")
    shard = sorted(path.glob("*.safetensors"))[2]
    shard.unlink()
    message = refused(path)
    assert str(shard) in message and "missing" in message


def test_truncated_shard(good: Path, tmp_path: Path) -> None:
    path = copy_of(good / "sharded", tmp_path / "x")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    message = refused(path)
    assert str(shard) in message and "is cut off" in message and "tensor " in message
    shard.write_bytes(shard.read_bytes()[:100])
    assert "truncated" in refused(path)
    shard.write_bytes(b"")
    assert "truncated: 0 bytes" in refused(path)
    shard.write_bytes(b"<html>not found</html>" * 10)
    assert str(shard) in refused(path)


def test_damaged_index(good: Path, tmp_path: Path) -> None:
    path = copy_of(good / "sharded", tmp_path / "x")
    index = path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first = next(iter(raw["weight_map"]))
    raw["weight_map"][first] = "elsewhere.safetensors"
    index.write_text(json.dumps(raw))
    assert f"{path / 'elsewhere.safetensors'}: shard is missing" in refused(path)
    raw["weight_map"][first] = "../../etc/passwd"
    index.write_text(json.dumps(raw))
    assert str(index) in refused(path)
    index.write_text("{")
    assert f"{index}: can't be read as JSON" in refused(path)
    index.unlink()
    assert "neither model.safetensors.index.json nor model.safetensors" in refused(path)


def test_unknown_missing_and_misshapen_tensors(good: Path, tmp_path: Path) -> None:
    def unknown(t: dict[str, torch.Tensor]) -> None:
        t["layers.1.attn.wq_c.weight"] = torch.zeros(2)

    def missing(t: dict[str, torch.Tensor]) -> None:
        del t["layers.2.ffn.experts.3.w2.weight"]

    def unscaled(t: dict[str, torch.Tensor]) -> None:
        del t["layers.2.attn.wkv.scale"]

    def misshapen(t: dict[str, torch.Tensor]) -> None:
        t["layers.3.attn.wkv.weight"] = t["layers.3.attn.wkv.weight"][:-1].clone()

    def mistyped(t: dict[str, torch.Tensor]) -> None:
        t["layers.0.attn_norm.weight"] = t["layers.0.attn_norm.weight"].half()

    for name, edit, words in (
        ("layers.1.attn.wq_c.weight", unknown, "isn't part of a V4"),
        ("layers.2.ffn.experts.3.w2.weight", missing, "is missing"),
        ("layers.2.attn.wkv.scale", unscaled, "is missing"),
        ("layers.3.attn.wkv.weight", misshapen, "has shape [47, 96], config.json implies [48, 96]"),
        ("layers.0.attn_norm.weight", mistyped, "is of dtype F16, expected F32 or BF16"),
    ):
        (tmp_path / name).mkdir()
        message = edited(good, tmp_path / name, edit)
        assert name in message and words in message


def test_config_of_another_model(good: Path, tmp_path: Path) -> None:
    path = copy_of(good / "single", tmp_path / "x")
    config = path / "config.json"
    config.write_text(json.dumps(replace(CONFIG, hidden_size=128).to_official()))
    assert "model.safetensors: tensor embed.weight has shape [200, 96], config.json implies [200, 128]" in refused(path)
    config.write_text(json.dumps(CONFIG.to_official() | {"model_type": "deepseek_v3"}))
    assert f"{config}: model_type is 'deepseek_v3'" in refused(path, ConfigError)
    config.write_text(json.dumps(CONFIG.to_official() | {"model_type": "deepseek_v41"}))
    assert "deepseek_v41" in refused(path, ConfigError)
    config.unlink()
    assert f"{config}: no such file" in refused(path, ConfigError)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    assert "is empty" in refused(tmp_path)
    assert "no such directory" in refused(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_official()))
    assert "isn't a directory" in refused(tmp_path / "config.json")
    assert "holds no checkpoint" in refused(tmp_path)


def test_relatives_of_v4_are_recognised(good: Path, tmp_path: Path) -> None:
    def dspark(t: dict[str, torch.Tensor]) -> None:
        for name in [n for n in t if n.startswith("mtp.0.") and n.split(".")[2] in ("enorm", "hnorm", "e_proj")]:
            del t[name]
        t["mtp.0.main_proj.weight"] = torch.zeros(4, 4)
        t["mtp.2.norm.weight"] = torch.zeros(4)

    def engram(t: dict[str, torch.Tensor]) -> None:
        t["layers.1.engram.embed.weight"] = torch.zeros(4, 4)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    message = edited(good, tmp_path / "a", dspark)
    assert "mtp.0.main_proj.weight" in message and "DSpark" in message
    assert "V4.1" in edited(good, tmp_path / "b", engram)


def test_damage_is_found_before_anything_is_allocated(good: Path, tmp_path: Path) -> None:
    """A config that implies 280 billion parameters over a small file: refused at once, without torch."""
    path = copy_of(good / "single", tmp_path / "x")
    (path / "config.json").write_text(json.dumps(ModelConfig.preset("v4-flash").to_official()))
    with pytest.raises(CheckpointError, match=r"embed\.weight has shape"):
        plan_checkpoint(path)
    code = f"import sys; from pathlib import Path; from upwell.checkpoint.match import plan_checkpoint\ntry: plan_checkpoint(Path({str(path)!r}))\nexcept Exception as e: sys.exit('torch' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_large_bf16_matrices_stay_as_they_are_in_an_fp32_model_on_a_cpu(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(2, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    save_checkpoint(model, tmp_path / "fp32", quantize=False)
    half = load_model(tmp_path / "fp32", dtype=torch.bfloat16)
    for official in (True, False):
        place = tmp_path / str(official)
        save_checkpoint(half, place, "official" if official else "transformers", quantize=False)
        widened = load_model(place, dtype=torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr("upwell.checkpoint.load._LARGE", 1)
            kept = load_model(place, dtype=torch.float32)
        experts = kept.layers[1].ffn.experts
        assert experts.w13.dtype == experts.w2.dtype == kept.head.weight.dtype == torch.bfloat16
        with torch.no_grad():
            assert relative(kept(ids), widened(ids)) < 1e-5


def test_an_llm_on_a_cpu_computes_in_fp32_whatever_the_checkpoint_is_in(model: Transformer, tmp_path: Path) -> None:
    """BF16 would go by plain PyTorch, an order of magnitude slower than the kernels."""
    save_checkpoint(model, tmp_path / "fp32", quantize=False)
    save_checkpoint(load_model(tmp_path / "fp32", dtype=torch.bfloat16), tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert LLM(tmp_path, device="cpu").model.dtype == torch.float32
