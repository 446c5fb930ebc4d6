"""Packed weights stay packed: the resident memory of a process that loads a layer of V4-Flash's geometry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from upwell.checkpoint.geometry import Slot, fp4_packed_shape, fp4_scale_shape, fp8_scale_shape, slots
from upwell.config import ModelConfig

FLASH = ModelConfig.preset("v4-flash").with_mtp(0)
# One CSA layer of the real widths. 24 of the 256 experts and a small vocabulary keep the file at half a gigabyte.
LAYER = replace(
    FLASH, num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=0, n_routed_experts=24, vocab_size=512
)
SMALL = replace(
    LAYER, hidden_size=128, q_lora_rank=128, head_dim=128, num_attention_heads=8, o_lora_rank=128,
    moe_intermediate_size=128, index_n_heads=2,
)  # fmt: skip

CHILD = """
import json, resource, sys, torch
from upwell.checkpoint import load_model
torch.set_num_threads(1)
model = load_model(sys.argv[1])
with torch.inference_mode():
    finite = bool(model(torch.tensor([[7]])).isfinite().all())
    for expert in model.layers[0].ffn.experts.packed:  # a token visits 6; all are to be counted
        for weight, scale in expert.values():
            weight.view(torch.uint8).amax(), scale.amax()
try:  # ru_maxrss starts from the parent's size on Linux, VmHWM doesn't
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak, "finite": finite, "dtype": str(model.layers[0].attn.wo_a.weight.dtype)}))
"""


def test_a_flash_layer_takes_its_packed_size(tmp_path: Path) -> None:
    size = write_random_checkpoint(LAYER, tmp_path / "layer")
    write_random_checkpoint(SMALL, tmp_path / "small")
    dense = sum(slot.bf16_bytes for slot in slots(LAYER))
    assert dense > 3 * size
    overhead = peak_of(tmp_path / "small")["peak"]  # Python, torch, and the same code run once
    layer = peak_of(tmp_path / "layer")
    assert layer["finite"] and layer["dtype"] == "torch.float8_e4m3fn"
    taken = layer["peak"] - overhead
    assert 0.8 * size < taken < 1.25 * size, f"{taken / size:.2f} of the packed size"


def peak_of(path: Path) -> dict[str, object]:
    """Peak resident memory, mapped pages included, of a process that loads `path` and runs one token."""
    # glibc would keep freed blocks of up to 32 MiB; what the allocator hoards isn't what the weights take.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_random_checkpoint(config: ModelConfig, path: Path) -> int:
    """A checkpoint in the official format with arbitrary, finite values. Returns the bytes of its tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_official()))
    tensors = [tensor for slot in slots(config) for tensor in stored_as(slot)]
    tensors.sort(key=lambda t: -{"F32": 4, "BF16": 2}.get(t[1], 1))
    header, at = {}, 0
    for name, dtype, shape, data in tensors:
        end = at + prod(shape) * len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, shape, data in tensors:
            file.write(data * prod(shape))
    return at


def stored_as(slot: Slot) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and the bytes of one item, repeated throughout."""
    for e in range(slot.count):
        name = slot.name.format(e)
        scale = name.removesuffix("weight") + "scale"
        if slot.kind == "matrix":
            yield name, "F8_E4M3", slot.shape, b"\x31"
            yield scale, "F8_E8M0", fp8_scale_shape(slot.shape), b"\x74"
        elif slot.kind == "expert":
            yield name, "I8", fp4_packed_shape(slot.shape), bytes([0x2B + e % 4])
            yield scale, "F8_E8M0", fp4_scale_shape(slot.shape), b"\x74"
        elif slot.kind == "float":
            yield name, "F32", slot.shape, b"\x00\x00\x80\x3d"  # 0.0625
        else:
            yield name, "BF16", slot.shape, b"\x80\x3d"


def test_a_damaged_giant_is_refused_within_a_small_address_space(tmp_path: Path) -> None:
    """V4-Flash's config over a cut-off shard of 1 GB (sparse): refused with 1 GiB of address space."""
    write_random_checkpoint(SMALL, tmp_path / "x")
    (tmp_path / "x/config.json").write_text(json.dumps(FLASH.to_official()))
    shard = tmp_path / "x/model.safetensors"
    text = json.dumps({"embed.weight": {"dtype": "BF16", "shape": [129280, 4096], "data_offsets": [0, 1059061760]}})
    shard.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with shard.open("r+b") as file:
        file.truncate(10**9)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from pathlib import Path; from upwell.checkpoint.match import plan_checkpoint\n"
        "from upwell.errors import CheckpointError\n"
        "try: plan_checkpoint(Path(sys.argv[1]))\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert "tensor embed.weight is cut off: it ends at byte 1,059,06" in done.stdout, done.stderr
