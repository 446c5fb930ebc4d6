"""upwell convert's layout vllm-ascend, every tensor of it, by a reader written from that loader's rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vllm_ascend_reader
from conversions import CONFIG, assert_rounded, save_official
from safetensors.torch import load_file, save_file

from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.recipes import Target
from upwell.checkpoint.sniff import sniff
from upwell.cli import main
from upwell.formats.fp4 import dequantize_fp4
from upwell.formats.fp8 import dequantize_fp8, quantize_fp8

STAGES, TARGETS, RANK = 3, 2, 24


@pytest.fixture(scope="module")
def dspark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As DeepSeek-V4-Flash-0731: three stages under `mtp`, made of MTP blocks, without their e_proj and h_proj."""
    path = save_official(tmp_path_factory.mktemp("dspark"), CONFIG.with_mtp(STAGES))
    hidden, vocab = CONFIG.hidden_size, CONFIG.vocab_size
    tensors = load_file(path / "model.safetensors")
    mine = ("e_proj", "h_proj", "enorm", "hnorm", "norm", "hc_head")
    for name in [n for n in tensors if n.startswith("mtp.") and n.split(".", 2)[2].startswith(mine)]:
        if not name.startswith(f"mtp.{STAGES - 1}.") or name.split(".")[2] in mine[:4]:
            del tensors[name]
    weight, scale = quantize_fp8(torch.randn(hidden, TARGETS * hidden))
    last = f"mtp.{STAGES - 1}"
    tensors |= {
        "mtp.0.main_proj.weight": weight, "mtp.0.main_proj.scale": scale.view(torch.float8_e8m0fnu),
        "mtp.0.main_norm.weight": torch.randn(hidden).bfloat16(),
        f"{last}.markov_head.markov_w1.weight": torch.randn(vocab, RANK).bfloat16(),
        f"{last}.markov_head.markov_w2.weight": torch.randn(vocab, RANK).bfloat16(),
        f"{last}.confidence_head.proj.weight": torch.randn(1, hidden + RANK).bfloat16(),
    }  # fmt: skip
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | {
        "num_nextn_predict_layers": 1, "dspark_block_size": 5, "dspark_target_layer_ids": [1, 2],
        "dspark_markov_rank": RANK, "dspark_noise_token_id": 7,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("to", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("recipe", ["upwell", "vllm-ascend", "msmodelslim"])
def test_vllm_ascends_layout_by_its_own_rules(
    official: Path, weights: dict[str, torch.Tensor], tmp_path: Path, recipe: str, to: Target
) -> None:
    convert(Conversion(official, tmp_path / "out", to, "vllm-ascend", recipe, shards=2))
    read = vllm_ascend_reader.read(tmp_path / "out")
    for name, weight in weights.items():
        ours = read[vllm_ascend_reader.runtime_name(f"{name}.weight")]
        assert_rounded(ours, weight, to, name, recipe == "upwell")
        assert recipe != "upwell" or to != "w8a8" or ".experts." not in name or torch.equal(ours, weight), name
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    quantized = {n.split(".", 2)[2] for n, t in description.items() if n.startswith("layers.1.attn") and t[0] == "W"}
    bare = {name for name in quantized if name.endswith(".weight")}
    wide = {"attn.wq_b.weight", "attn.wo_b.weight", "attn.indexer.wq_b.weight"}
    expected = {
        "upwell": wide, "vllm-ascend": wide,
        "msmodelslim": {"attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv.weight", "attn.indexer.wq_b.weight"},
    }[recipe]
    assert bare == (set() if to == "w4a16" else expected)
    kinds = {"w8a8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC, W8A8_DYNAMIC", "w4a16": "W4A16"}
    assert sniff(tmp_path / "out").name == f"quantized for vllm-ascend ({kinds[to]})"


def test_every_tensor_that_is_not_quantized_is_the_sources(official: Path, tmp_path: Path) -> None:
    convert(Conversion(official, tmp_path / "out", "w4a8", "vllm-ascend"))
    read = vllm_ascend_reader.read(tmp_path / "out")
    compare_all(official, read)


def compare_all(source: Path, read: dict[str, torch.Tensor]) -> None:
    """Each of the source's tensors by its own decoding: nothing is missing, nothing else is there but MTP's copies."""
    tensors = load_file(source / "model.safetensors")
    seen = {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"} & read.keys()
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            continue
        runtime = vllm_ascend_reader.runtime_name(name)
        scale = tensors.get(name.removesuffix("weight") + "scale")
        seen.add(runtime)
        if scale is None:
            assert torch.equal(read[runtime].float(), tensor.float()), name
        else:
            decode = dequantize_fp8 if tensor.dtype == torch.float8_e4m3fn else dequantize_fp4
            exact = decode(tensor.view(torch.uint8) if tensor.dtype == torch.int8 else tensor, scale)
            assert_rounded(read[runtime], exact, "w4a8", name)
    assert seen == read.keys()


@pytest.mark.parametrize("to", ["w8a8", "w4a8"])
def test_a_dspark_drafter_goes_with_its_model(dspark: Path, tmp_path: Path, to: Target) -> None:
    made = convert(Conversion(dspark, tmp_path / "out", to, "vllm-ascend", shards=3))
    assert made["files"] == 3 and "DSpark" in made["kind"]
    read = vllm_ascend_reader.read(tmp_path / "out")
    compare_all(dspark, read)
    source = load_file(dspark / "model.safetensors")
    wo_a = dequantize_fp8(source["mtp.1.attn.wo_a.weight"], source["mtp.1.attn.wo_a.scale"])
    assert torch.equal(read["mtp.1.self_attn.wo_a.weight"], wo_a)  # left as it is
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["mtp.0.main_proj.weight"] == "W8A8_DYNAMIC"
    assert {k for n, k in description.items() if "_head" in n or "norm" in n or ".wo_a." in n} == {"FLOAT"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dspark_block_size"] == 5 and config["dspark_noise_token_id"] == 7


def test_what_of_dspark_is_refused(dspark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(dspark), str(tmp_path / "a"), "--to", "w8a8"]) == 2
    assert "can be converted for vllm-ascend only" in capsys.readouterr().err
    config = json.loads((dspark / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").symlink_to(dspark / "model.safetensors")
    (broken / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dspark_markov_rank"}))
    assert main(["convert", str(broken), str(tmp_path / "b"), "--to", "w8a8", "--layout", "vllm-ascend"]) == 2
    assert "dspark_markov_rank" in capsys.readouterr().err
    (broken / "config.json").write_text(json.dumps(config | {"dspark_markov_rank": RANK + 1}))
    assert main(["convert", str(broken), str(tmp_path / "c"), "--to", "w8a8", "--layout", "vllm-ascend"]) == 2
    assert "markov_w1" in capsys.readouterr().err
