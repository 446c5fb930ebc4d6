"""upwell convert and verify: values, the layouts by an independent reader, resuming, and what is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm_ascend_reader
from models import fill
from safetensors.torch import load_file, save_file

from upwell import LLM, SamplingParams, load_model
from upwell.checkpoint import save_checkpoint
from upwell.checkpoint.convert import STATE, Conversion, convert
from upwell.checkpoint.recipes import Target
from upwell.checkpoint.sniff import sniff
from upwell.checkpoint.verify import verify
from upwell.cli import main
from upwell.config import ModelConfig
from upwell.errors import CheckpointError, InputError
from upwell.model import Transformer
from upwell.ops.linear import dense_weight

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_attention_heads=4,
    head_dim=32, qk_rope_head_dim=16, q_lora_rank=48, o_lora_rank=24, o_groups=2, sliding_window=16, index_n_heads=4,
    index_head_dim=32, index_topk=5, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
    num_hash_layers=1, routed_scaling_factor=1.5, swiglu_limit=10.0, num_nextn_predict_layers=1,
    max_position_embeddings=4096,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 matrices and FP4 experts, as released."""
    model = Transformer(CONFIG).eval()
    fill(model, 3, CONFIG.n_routed_experts)
    path = tmp_path_factory.mktemp("official")
    save_checkpoint(model, path, quantize=True)
    (path / "tokenizer_config.json").write_text("{}")
    return path


def dense(model: Transformer) -> dict[str, torch.Tensor]:
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


@pytest.fixture(scope="module")
def weights(official: Path) -> dict[str, torch.Tensor]:
    return dense(load_model(official, dtype=torch.float32))


def test_bf16_is_exact(official: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    made = convert(Conversion(official, tmp_path / "out", "bf16", shards=3))
    assert made["files"] >= 3 and "official FP8 with FP4 experts" in made["kind"]
    ours = dense(load_model(tmp_path / "out", dtype=torch.float32))
    assert ours.keys() == weights.keys() and len(ours) > 60
    assert all(torch.equal(ours[name], weights[name]) for name in weights)  # FP8 and FP4 times powers of two fit BF16
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and not (tmp_path / "out" / STATE).exists()
    assert verify(tmp_path / "out") == made["files"] + 3


def test_transformers_names_are_read_too(tmp_path: Path) -> None:
    model = Transformer(CONFIG.with_mtp(0)).eval()
    fill(model, 5, CONFIG.n_routed_experts)
    save_checkpoint(model, tmp_path / "hf", format="transformers")
    made = convert(Conversion(tmp_path / "hf", tmp_path / "out", "w8a8"))
    assert "transformers' names" in made["kind"]
    source, ours = dense(model), dense(load_model(tmp_path / "out", dtype=torch.float32))
    assert ours.keys() == source.keys()
    for name, weight in source.items():
        step = weight.abs().amax(-1, keepdim=True) / 127
        assert ((ours[name] - weight).abs() <= (step / 2 + weight.abs() * 2**-8) * 1.001).all(), name


def test_w8a8_rounds_each_row_to_127_steps_and_runs(
    official: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    convert(Conversion(official, tmp_path / "out", "w8a8"))
    model = load_model(tmp_path / "out", dtype=torch.float32)
    assert model.layers[1].attn.wq_b.weight.dtype == torch.int8 and model.layers[1].attn.wkv.scale is None
    ours = dense(model)
    for name, weight in weights.items():
        step = weight.abs().amax(-1, keepdim=True) / 127
        assert ((ours[name] - weight).abs() <= step / 2 * 1.001).all(), name
    ids = list(range(2, 40))
    output = LLM.from_model(model, cache_tokens=512).generate({"prompt_token_ids": ids}, GREEDY)[0].token_ids
    with torch.no_grad():
        assert output == model(torch.tensor([ids + output]))[0, len(ids) - 1 : -1].argmax(-1).tolist()
        logits = [load_model(p, dtype=torch.float32)(torch.arange(2, 60)[None]) for p in (official, tmp_path / "out")]
    error = (logits[0] - logits[1]).pow(2).mean().sqrt() / logits[0].std()
    assert 0 < error < 0.1


@pytest.mark.parametrize("to", ["w4a8", "w4a16"])
def test_int4_experts_round_to_7_steps_and_run(
    official: Path, weights: dict[str, torch.Tensor], tmp_path: Path, to: Target
) -> None:
    convert(Conversion(official, tmp_path / "out", to))
    assert sniff(tmp_path / "out").name == f"DeepSeek-V4 in {to.upper()}, Upwell's layout"
    model = load_model(tmp_path / "out", dtype=torch.float32)
    routed, wide = model.layers[1].ffn.experts, model.layers[1].attn.wq_b
    assert routed.w13.dtype == torch.uint8 and routed.w13.shape == (6, 64, 32)
    assert wide.weight.dtype == (torch.int8 if to == "w4a8" else torch.float32)
    ours = dense(model)
    assert ours.keys() == weights.keys()
    for name, weight in weights.items():
        assert_rounded(ours[name], weight, to, name)
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        logits = [load_model(path, dtype=torch.float32)(ids) for path in (official, tmp_path / "out")]
    error = float((logits[0] - logits[1]).pow(2).mean().sqrt() / logits[0].std())
    assert 0 < error < 0.6  # 15 steps move some choices of the router too
    llm = LLM.from_model(model, cache_tokens=512)
    output = llm.generate({"prompt_token_ids": ids[0].tolist()}, GREEDY)[0].token_ids
    with torch.no_grad():
        whole = model(torch.cat((ids, torch.tensor([output])), 1))
    assert output == whole[0, 57:-1].argmax(-1).tolist()


def assert_rounded(ours: torch.Tensor, weight: torch.Tensor, to: str, name: str) -> None:
    """Half a step of the format that `name` has in the target."""
    routed = ".experts." in name
    groups = 1 if to != "w4a16" or not routed else weight.shape[1] // 32
    steps = 127 if to == "w8a8" or not routed else 7
    by_group = weight.view(len(weight), groups, -1)
    step = (by_group.abs().amax(-1, keepdim=True) / steps).expand_as(by_group).reshape(weight.shape)
    slack = 1.001 if groups == 1 else 1.06  # of groups the scale is a BF16 number: up to 2^-9 of the largest, 7 steps
    assert ((ours.float() - weight).abs() <= step / 2 * slack).all(), name


@pytest.mark.parametrize("to", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("recipe", ["vllm-ascend", "msmodelslim"])
def test_vllm_ascends_layout_by_its_own_rules(
    official: Path, weights: dict[str, torch.Tensor], tmp_path: Path, recipe: str, to: Target
) -> None:
    convert(Conversion(official, tmp_path / "out", to, "vllm-ascend", recipe, shards=2))
    read = vllm_ascend_reader.read(tmp_path / "out")
    for name, weight in weights.items():
        assert_rounded(read[vllm_ascend_reader.runtime_name(f"{name}.weight")], weight, to, name)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    quantized = {n.split(".", 2)[2] for n, t in description.items() if n.startswith("layers.1.attn") and t[0] == "W"}
    bare = {name for name in quantized if name.endswith(".weight")}
    expected = {
        "vllm-ascend": {"attn.wq_b.weight", "attn.wo_b.weight", "attn.indexer.wq_b.weight"},
        "msmodelslim": {"attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv.weight", "attn.indexer.wq_b.weight"},
    }[recipe]
    assert bare == (set() if to == "w4a16" else expected)
    kinds = {"w8a8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC, W8A8_DYNAMIC", "w4a16": "W4A16"}
    assert sniff(tmp_path / "out").name == f"quantized for vllm-ascend ({kinds[to]})"


def test_a_killed_run_goes_on_and_ends_the_same(official: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    convert(Conversion(official, whole, "w8a8", shards=4))
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom upwell.checkpoint.convert import Conversion, convert\n"
        "def stop(done, total):\n    if done > total * 0.6: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert(Conversion(Path({str(official)!r}), Path({str(broken)!r}), 'w8a8', shards=4), stop)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", script], env=environment)
    assert ended.returncode == -signal.SIGKILL
    kept = sorted(broken.glob("model-*.safetensors"))
    assert kept and (broken / STATE).is_file() and not (broken / "config.json").exists()
    before = {file: file.stat().st_mtime_ns for file in kept}
    with pytest.raises(InputError, match="another conversion stopped here"):
        convert(Conversion(official, broken, "bf16", shards=4))
    convert(Conversion(official, broken, "w8a8", shards=4))
    assert {file: file.stat().st_mtime_ns for file in kept} == before  # whole shards aren't made again
    ours = {file.name: file.read_bytes() for file in broken.iterdir()}
    assert ours == {file.name: file.read_bytes() for file in whole.iterdir()}


def test_verify_names_what_is_damaged(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(official), str(tmp_path / "out"), "--to", "fp8"]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    shard = next((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (tmp_path / "out" / "config.json").unlink()
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{shard.name} is damaged" in error and "config.json is missing" in error


def test_what_is_refused(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(official), str(tmp_path / "a"), "--to", "bf16", "--layout", "vllm-ascend"]) == 2
    assert main(["convert", str(official), str(official), "--to", "bf16"]) == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(["convert", str(official), str(tmp_path / "full"), "--to", "bf16"]) == 2
    assert "isn't empty" in capsys.readouterr().err


def test_disk_space_is_checked_first(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"GB to write, 0\.0 GB free"):
        convert(Conversion(official, tmp_path / "out", "bf16"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_kinds_are_known_by_name(official: Path, tmp_path: Path) -> None:
    def variant(name: str, *extra: str, **config: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", **config}))
        tensors = {n: torch.zeros(2, 2) for n in ("layers.0.attn.wq_a.weight", *extra)}
        save_file(tensors, folder / "model.safetensors")
        if not config:
            with pytest.raises(CheckpointError, match="can't be converted yet"):
                convert(Conversion(folder, folder.with_suffix(".out"), "bf16"))
        return sniff(folder).name

    assert variant("dspark", "mtp.0.main_proj.weight") == "DeepSeek-V4 with DSpark drafting (Flash-0731, Pro-0813)"
    assert variant("v41", "layers.3.engram.table") == "DeepSeek-V4.1 (Engram) or V4 Vision"
    assert variant("later", model_type="deepseek_v41") == "a later DeepSeek (deepseek_v41)"
    assert variant("awq", quantization_config={"quant_method": "awq"}) == "DeepSeek-V4 quantized by awq"
    assert variant("plain", dtype="bfloat16") == "DeepSeek-V4, dense"
    assert sniff(official).name == "DeepSeek-V4, official FP8 with FP4 experts"
    assert load_file(next(official.glob("*.safetensors")))  # the fixture is a real checkpoint
