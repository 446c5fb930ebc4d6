"""upwell convert and verify: values, the layouts by an independent reader, resuming, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conversions import CONFIG, assert_rounded, dense
from models import fill
from safetensors.torch import load_file, save_file

from upwell import LLM, SamplingParams, load_model
from upwell.checkpoint import save_checkpoint
from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.recipes import Target
from upwell.checkpoint.resume import STATE
from upwell.checkpoint.sniff import sniff
from upwell.checkpoint.verify import verify
from upwell.cli import main
from upwell.errors import CheckpointError
from upwell.model import Transformer

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)


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


@pytest.mark.parametrize("recipe", ["upwell", "vllm-ascend"])
def test_w8a8_rounds_each_row_to_127_steps_and_runs(
    official: Path, weights: dict[str, torch.Tensor], tmp_path: Path, recipe: str
) -> None:
    convert(Conversion(official, tmp_path / "out", "w8a8", recipe=recipe))
    model = load_model(tmp_path / "out", dtype=torch.float32)
    assert model.layers[1].attn.wq_b.weight.dtype == torch.int8 and model.layers[1].attn.wkv.scale is None
    ours = dense(model)
    for name, weight in weights.items():
        step = weight.abs().amax(-1, keepdim=True) / 127
        usual = ((weight / step).round() * step - weight).square().sum()
        assert (ours[name] - weight).square().sum() <= usual * 1.001, name
        assert recipe == "upwell" or ((ours[name] - weight).abs() <= step / 2 * 1.001).all(), name
        if ".experts." in name:  # from FP4
            assert torch.equal(ours[name], weight) == (recipe == "upwell"), name
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


def test_kinds_are_known_by_name(official: Path, tmp_path: Path) -> None:
    def variant(name: str, *extra: str, **config: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", **config}))
        tensors = {n: torch.zeros(2, 2) for n in ("layers.0.attn.wq_a.weight", *extra)}
        save_file(tensors, folder / "model.safetensors")
        if not config:
            reason = "for vllm-ascend only" if name == "dspark" else "can't be converted yet"
            with pytest.raises(CheckpointError, match=reason):
                convert(Conversion(folder, folder.with_suffix(".out"), "bf16"))
        return sniff(folder).name

    assert variant("dspark", "mtp.0.main_proj.weight") == "DeepSeek-V4 with DSpark drafting (Flash-0731, Pro-0813)"
    assert variant("v41", "layers.3.engram.table") == "DeepSeek-V4.1 (Engram) or V4 Vision"
    assert variant("later", model_type="deepseek_v41") == "a later DeepSeek (deepseek_v41)"
    assert variant("awq", quantization_config={"quant_method": "awq"}) == "DeepSeek-V4 quantized by awq"
    assert variant("plain", dtype="bfloat16") == "DeepSeek-V4, dense"
    assert sniff(official).name == "DeepSeek-V4, official FP8 with FP4 experts"
    assert load_file(next(official.glob("*.safetensors")))  # the fixture is a real checkpoint
