"""What a rank keeps in memory of a checkpoint whose experts are nearly all of it."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Threads
from safetensors.torch import save_file

from upwell.checkpoint.geometry import fp4_packed_shape, fp4_scale_shape, fp8_scale_shape, slots
from upwell.checkpoint.load import load_part
from upwell.config import ModelConfig
from upwell.nano.geometry import NANO

CONFIG = replace(
    NANO, num_hidden_layers=2, compress_ratios=(0, 4), num_nextn_predict_layers=0, hidden_size=512,
    moe_intermediate_size=1024, n_routed_experts=64,
)  # fmt: skip
_DTYPES = {"float": torch.float32, "table": torch.int64}


def write(config: ModelConfig, directory: Path) -> int:
    """A checkpoint in the official formats, its weights all zero; returns the bytes of its routed experts."""
    tensors: dict[str, torch.Tensor] = {}
    expert_bytes = 0
    for slot in slots(config):
        for i in range(slot.count):
            name = slot.name.format(i)
            scale = name.removesuffix("weight") + "scale"
            if slot.kind == "matrix":
                tensors[name] = torch.zeros(slot.shape, dtype=torch.float8_e4m3fn)
                tensors[scale] = torch.zeros(fp8_scale_shape(slot.shape), dtype=torch.uint8)
            elif slot.kind == "expert":
                tensors[name] = torch.zeros(fp4_packed_shape(slot.shape), dtype=torch.uint8)
                tensors[scale] = torch.zeros(fp4_scale_shape(slot.shape), dtype=torch.uint8)
                expert_bytes += tensors[name].nbytes + tensors[scale].nbytes
            else:
                tensors[name] = torch.zeros(slot.shape, dtype=_DTYPES.get(slot.kind, torch.bfloat16))
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config.to_official()))
    return expert_bytes


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    return 1024 * sum(
        int(n) for n in re.findall(r"Rss(?:Anon|File):\s+(\d+) kB", Path("/proc/self/status").read_text())
    )


@pytest.mark.parametrize("way", [(4, 1), (4, 4)], ids=["tp4", "tp4-ep4"])
def test_a_rank_of_four_keeps_a_quarter_of_the_experts(way: tuple[int, int], tmp_path: Path) -> None:
    expert_bytes = write(CONFIG, tmp_path)
    assert expert_bytes > 100 << 20
    team = Threads(*way)

    def load(rank: int) -> tuple[int, Any]:
        gc.collect()
        before = resident()
        model = load_part(tmp_path, lambda config: team.ranks(rank, config), torch.float32)
        for module in model.modules():
            for expert in getattr(module, "packed", None) or []:
                for weight, scale in expert.values():
                    assert int(weight.sum()) == int(scale.sum()) == 0  # every page of them is read
        return resident() - before, model

    load(0)  # what is made once
    grown, model = load(3)
    dense = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert expert_bytes / 4 < grown < expert_bytes / 4 + dense + (12 << 20)
    assert dense < expert_bytes / 4
