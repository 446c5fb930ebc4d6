"""`upwell inspect`: the published counts, the paper's cache, the release's sizes; and no torch on the way."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upwell.checkpoint.geometry import slots
from upwell.checkpoint.inspect import LENGTHS, cache_bytes, describe, inspect_target
from upwell.checkpoint.names import from_official
from upwell.cli import inspect as command
from upwell.config import BLOCK_TOKENS, PRESETS, ModelConfig
from upwell.errors import CheckpointError, ConfigError
from upwell.model import KVCache, Transformer

GIB = 2**30


@pytest.mark.parametrize(
    ("preset", "total", "experts", "active", "active_without_embedding"),
    [("v4-flash", 284.332, 277.025, 13.80, 13.27), ("v4-pro", 1572.997, 1547.396, 49.78, 48.85)],
)
def test_parameter_counts_are_the_published_ones(
    preset: str, total: float, experts: float, active: float, active_without_embedding: float
) -> None:
    parameters = inspect_target(preset)["parameters"]
    assert parameters["total"] / 1e9 == pytest.approx(total, abs=5e-4)
    assert parameters["experts"] / 1e9 == pytest.approx(experts, abs=5e-4)
    assert parameters["active"] / 1e9 == pytest.approx(active, abs=5e-3)
    assert parameters["active_without_embedding"] / 1e9 == pytest.approx(active_without_embedding, abs=5e-3)
    assert parameters["total_with_mtp"] > parameters["total"]


def test_layers_by_kind() -> None:
    flash, pro = inspect_target("v4-flash")["layers"], inspect_target("v4-pro")["layers"]
    assert [flash[k] for k in ("total", "sliding", "csa", "hca", "hash_routed", "mtp")] == [43, 2, 21, 20, 3, 1]
    assert [pro[k] for k in ("total", "sliding", "csa", "hca", "hash_routed", "mtp")] == [61, 0, 30, 31, 3, 1]


def test_official_bytes_are_those_of_the_release() -> None:
    # metadata.total_size of DeepSeek-V4-Flash's index, and its number of tensors
    assert inspect_target("v4-flash")["weight_bytes"]["official"] == 159_609_485_896
    flash = list(slots(ModelConfig.preset("v4-flash")))
    assert sum(s.count * (2 if s.kind in ("matrix", "expert") else 1) for s in flash) == 69_187
    # V4-Pro's figure is of its files, headers (about 110 bytes a tensor) included.
    assert inspect_target("v4-pro")["weight_bytes"]["official"] == pytest.approx(864_721_029_744, rel=1e-4)


def test_cache_is_the_papers() -> None:
    flash, pro = inspect_target("v4-flash")["cache"], inspect_target("v4-pro")["cache"]
    assert flash["elements_per_token"] == 3440
    assert flash["bytes_per_token"] == 6880
    assert round(flash["sequences"]["1M"]["bytes_per_token"]) == 6885
    assert flash["sequences"]["1M"]["total"] / GIB == pytest.approx(6.72, abs=5e-3)
    assert round(pro["sequences"]["1M"]["bytes_per_token"]) == 9856
    assert pro["sequences"]["1M"]["total"] / GIB == pytest.approx(9.62, abs=6e-3)
    assert flash["sequences"]["4k"]["compressor_states"] / 2**20 == pytest.approx(11.6, abs=0.05)
    assert pro["sequences"]["4k"]["compressor_states"] / 2**20 == pytest.approx(17.8, abs=0.05)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tokens", LENGTHS.values())
def test_cache_arithmetic_equals_the_real_cache(preset: str, tokens: int) -> None:
    config = ModelConfig.preset(preset)
    cache = KVCache(config, tokens // BLOCK_TOKENS, 1, torch.bfloat16, "meta")
    counted = cache_bytes(config, tokens)
    assert cache.nbytes == counted["total"] + counted["compressor_states"] + counted["mtp_windows"]


@pytest.mark.parametrize("preset", PRESETS)
def test_geometry_equals_the_models_parameters(preset: str) -> None:
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        model = Transformer(config)
    real = {name: tuple(p.shape) for name, p in model.named_parameters()}
    real |= {name: tuple(b.shape) for name, b in model.named_buffers() if "freqs" not in name}
    counted: dict[str, tuple[int, ...]] = {}
    for slot in slots(config):
        if slot.kind != "expert":
            counted[from_official(slot.name)] = slot.shape
        elif slot.name.endswith("w2.weight"):
            counted[slot.name.replace(".{}.w2.weight", ".w2")] = (slot.count, *slot.shape)
        elif slot.name.endswith("w1.weight"):
            rows, cols = slot.shape
            counted[slot.name.replace(".{}.w1.weight", ".w13")] = (slot.count, 2 * rows, cols)
    assert counted == real


def test_bytes_without_mtp_are_less() -> None:
    config = ModelConfig.preset("v4-flash")
    weights = describe(config)["weight_bytes"]
    assert weights["official_without_mtp"] == describe(config.with_mtp(0))["weight_bytes"]["official"]
    assert weights["bf16"] > 3 * weights["official"]


def test_imports_no_torch() -> None:
    code = (
        "import sys; from upwell.checkpoint.inspect import inspect_target; "
        "inspect_target('v4-pro'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["inspect", *arguments])


def test_command_prints_json_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parse("v4-flash", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == inspect_target("v4-flash")
    assert command.run(parse("v4-flash")) == 0
    text = capsys.readouterr().out
    for expected in ("2 sliding, 21 CSA, 20 HCA", "284.332 B", "13.800 B", "148.65 GiB", "6,880 bytes", "6.72 GiB"):
        assert expected in text


def test_a_directory_with_a_config_alone_is_described(tmp_path: Path) -> None:
    config = replace(ModelConfig.preset("v4-flash"), num_hidden_layers=2, compress_ratios=(4, 128))
    (tmp_path / "config.json").write_text(json.dumps(config.to_official()))
    assert inspect_target(str(tmp_path))["layers"]["total"] == 2


def test_errors_name_the_target(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"v4-flesh: no such directory, and no preset.*v4-flash"):
        inspect_target("v4-flesh")
    with pytest.raises(CheckpointError, match="is empty"):
        inspect_target(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"config\.json: model_type is 'llama'"):
        inspect_target(str(tmp_path))
