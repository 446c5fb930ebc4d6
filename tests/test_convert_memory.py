"""Conversion holds a tensor or two, whatever the checkpoint's size, and refuses what isn't a number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversions import CONFIG, save_official
from safetensors.torch import load_file, save_file

from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.geometry import slots
from upwell.config import ModelConfig
from upwell.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from convert import write_official

# Run by itself: the most memory it had beyond what it began with.
RUN = """
import resource, sys
from pathlib import Path
from upwell.checkpoint.convert import Conversion, convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], jobs=2, shards=4))
print(peak() - before)
"""


@pytest.mark.parametrize("to", ["w4a8", "bf16"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, to: str) -> None:
    raw = CONFIG.to_official() | {
        "hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 96, "vocab_size": 8192,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    config = ModelConfig.from_dict(raw)
    size = write_official(tmp_path / "source", config)
    largest = max(slot.bf16_bytes // slot.count for slot in slots(config))
    ended = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "source"), str(tmp_path / "out"), to],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert size > 12 * largest
    assert int(ended.stdout) < 3 * largest + (48 << 20)  # the rest: first uses of torch, headers, buffers


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    source = save_official(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["layers.1.ffn.experts.2.w2.scale"].view(torch.uint8)[3, 0] = 255
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.2\.w2\.weight: .* aren't finite"):
        convert(Conversion(source, tmp_path / "out", "w4a8"))
