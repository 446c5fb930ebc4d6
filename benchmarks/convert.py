"""upwell convert at V4-Flash's geometry: speed against the disk's, memory's and plain PyTorch's; peak memory.

    python benchmarks/convert.py [--layers 2] [--experts 256] [--directory DIR] [--jobs N] [--json OUT]

Writes a checkpoint in the official formats with Flash's widths, random weights and fewer layers (2: 9.2 GB) to DIR,
and converts it to W8A8 and W4A8, each in a process of its own, with nothing of the source in the page cache. In the
same run and directory: reading and writing files (synced), copying memory, and the plain PyTorch way (read a shard,
dequantize, quantize, write it, one after another), on a few of the source's shards before, between and after. Needs
25 GB of disk for 2 layers; everything made is removed. Without a quiet machine the figures mean little.

A speed is bytes read and written over the seconds they took. The disk's is that of reading as many bytes as the source
has and writing as many as the target has, one after the other, at the rates measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from upwell.bench.record import cpu_name
from upwell.checkpoint.geometry import Slot, fp4_packed_shape, fp4_scale_shape, fp8_scale_shape, slots
from upwell.checkpoint.save import Piece, split_shards, write_shard
from upwell.checkpoint.shards import INDEX_NAME
from upwell.config import ModelConfig
from upwell.formats.fp4 import quantize_fp4
from upwell.ops.requantize import requantize

BARS = {"of the slower of disk and memory copy": 0.60, "over plain PyTorch": 2.0}
SHARD_BYTES = 1 << 30
POOL = 1 << 26


class Pool:
    """Random bytes made once, from which every tensor takes some."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        raw = torch.randint(0, 256, (POOL,), dtype=torch.uint8, generator=generator)
        noise = torch.randn(POOL // 4, generator=generator) * 0.02
        self.bytes = {
            "I8": raw, "F8_E4M3": torch.where((raw & 0x7F) == 0x7F, raw ^ 1, raw), "F8_E8M0": raw % 4 + 116,
            "BF16": noise.bfloat16().repeat(2).view(torch.uint8), "F32": noise.view(torch.uint8),
            "I64": torch.randint(0, 6, (POOL // 8,), generator=generator).view(torch.uint8),
        }  # fmt: skip
        self.at = 0

    def take(self, dtype: str, nbytes: int) -> Tensor:
        out, done = torch.empty(nbytes, dtype=torch.uint8), 0
        while done < nbytes:
            n = min(nbytes - done, POOL - self.at)
            out[done : done + n] = self.bytes[dtype][self.at : self.at + n]
            done, self.at = done + n, (self.at + n + 7919 * 64) % (POOL - 8192) // 8 * 8
        return out


def write_official(directory: Path, config: ModelConfig, shard_bytes: int = SHARD_BYTES) -> int:
    """A checkpoint as released, of random weights; returns its bytes."""
    pool, item = Pool(), {"I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4, "I64": 8}

    def piece(name: str, slot: Slot) -> Piece:
        base, shape = name.removesuffix("weight"), slot.shape
        specs: tuple[tuple[str, str, tuple[int, ...]], ...] = ((name, "BF16", shape),)
        if slot.kind == "expert":
            specs = ((name, "I8", fp4_packed_shape(shape)), (f"{base}scale", "F8_E8M0", fp4_scale_shape(shape)))
        elif slot.kind == "matrix":
            specs = ((name, "F8_E4M3", shape), (f"{base}scale", "F8_E8M0", fp8_scale_shape(shape)))
        elif slot.kind in ("float", "table"):
            specs = ((name, "F32" if slot.kind == "float" else "I64", shape),)
        return Piece(specs, lambda: tuple(pool.take(dtype, prod(of) * item[dtype]) for _, dtype, of in specs))

    def pieces() -> Iterator[Piece]:
        for slot in slots(config):
            yield from (piece(slot.name.format(e), slot) for e in range(slot.count))

    shards = split_shards(list(pieces()), shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    directory.mkdir(parents=True)
    for name, shard in zip(names, shards, strict=True):
        write_shard(directory / name, shard)
    weight_map = {n: file for file, shard in zip(names, shards, strict=True) for p in shard for n, _, _ in p.tensors}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config.to_official()))
    return sum(p.nbytes for shard in shards for p in shard)


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rates(directory: Path, source: Path) -> dict[str, float]:
    """GB a second: reading a source shard that isn't cached, writing a synced file, copying memory."""
    shard = sorted(source.glob("*.safetensors"))[1]
    forget(source)
    buffer = bytearray(64 << 20)
    begun = time.perf_counter()
    with shard.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    read = shard.stat().st_size / (time.perf_counter() - begun)
    probe, count = directory / "probe", 16
    begun = time.perf_counter()
    with probe.open("wb", buffering=0) as stream:
        for _ in range(count):
            stream.write(buffer)
        os.fsync(stream.fileno())
    written = count * len(buffer) / (time.perf_counter() - begun)
    probe.unlink()
    a, b = torch.ones(1 << 28, dtype=torch.uint8), torch.ones(1 << 28, dtype=torch.uint8)
    begun = time.perf_counter()
    for _ in range(4):
        b.copy_(a)
    return {"read": read / 1e9, "write": written / 1e9, "copy": 4 * a.numel() / (time.perf_counter() - begun) / 1e9}


FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def plain_pytorch(shard: Path, out: Path) -> dict[str, float]:
    """One shard to W8A8 as one would write it down: read, dequantize, quantize by row, write, sync."""
    begun = time.perf_counter()
    tensors, made = load_file(shard), {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale"):
            continue
        if scale is None:
            made[name] = tensor
            continue
        factor = scale.float()
        if tensor.dtype == torch.int8:
            raw = tensor.view(torch.uint8)
            codes = torch.stack((raw & 0xF, raw >> 4), dim=-1).flatten(-2)
            dense = FP4_VALUES[codes.long()] * factor.repeat_interleave(32, -1)
        else:
            rows, cols = tensor.shape
            dense = tensor.float() * factor.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
        dense = dense.bfloat16()
        step = dense.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        made[name] = torch.round(dense / step).clamp(-128, 127).to(torch.int8)
        made[f"{name}_scale"], made[f"{name}_offset"] = step, torch.zeros_like(step)
    save_file(made, out)
    with out.open("rb") as stream:
        os.fsync(stream.fileno())
    seconds, moved = time.perf_counter() - begun, shard.stat().st_size + out.stat().st_size
    out.unlink()
    return {"seconds": seconds, "gb": moved / 1e9, "gb_per_s": moved / seconds / 1e9}


def ours(source: Path, out: Path, to: str, jobs: int | None) -> dict[str, float]:
    """`upwell convert` in a process of its own; its peak memory is what the system says of it."""
    forget(source)
    command = [sys.executable, "-m", "upwell.cli", "convert", str(source), str(out), "--to", to]
    command += ["--jobs", str(jobs)] if jobs else []
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    seconds = time.perf_counter() - begun
    moved = size(source) + size(out)
    record = {"seconds": seconds, "gb": moved / 1e9, "gb_per_s": moved / seconds / 1e9, "written_gb": size(out) / 1e9,
              "processor_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}  # fmt: skip
    shutil.rmtree(out)
    return record


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def parts() -> dict[str, float]:
    """GB a second of one thread at what a conversion does to a byte besides the disk's work."""
    packed, scale = quantize_fp4(torch.randn(4096, 2048))
    begun, rounds = time.perf_counter(), 10
    for _ in range(rounds):
        codes = requantize(packed, scale, 8).codes
    rate = rounds * (packed.nbytes + codes.nbytes) / (time.perf_counter() - begun)
    block = os.urandom(1 << 26)
    begun = time.perf_counter()
    hashlib.sha256(block).digest()
    return {"fp4 to int8": rate / 1e9, "sha256 of what is written": len(block) / (time.perf_counter() - begun) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--plain-shards", type=int, default=3, help="of the source's, for the plain way")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    flash = ModelConfig.preset("v4-flash")
    config = dataclasses.replace(
        flash, num_hidden_layers=arguments.layers, compress_ratios=flash.compress_ratios[2 : 2 + arguments.layers],
        n_routed_experts=arguments.experts, num_nextn_predict_layers=0, num_hash_layers=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        record = measure(Path(folder), config, arguments)
    report(record)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(folder: Path, config: ModelConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    source = folder / "source"
    write_official(source, config)
    largest = max(prod(slot.shape) * 2 for slot in slots(config) if slot.kind == "plain")
    shards = sorted(source.glob("*.safetensors"))[1 : 1 + arguments.plain_shards]
    rates, plain, runs = [], [], {}
    # Interleaved, so that whatever else the machine does weighs on all alike.
    targets = iter(("w8a8", "w4a8"))
    for i, shard in enumerate(shards):
        rates.append(disk_rates(folder, source))
        forget(source)
        plain.append(plain_pytorch(shard, folder / "plain.safetensors"))
        if (to := next(targets, None)) is not None:
            runs[to] = ours(source, folder / f"out-{i}", to, arguments.jobs)
    rates.append(disk_rates(folder, source))
    mean = {key: len(rates) / sum(1 / rate[key] for rate in rates) for key in rates[0]}
    for run in runs.values():
        read = size(source) / 1e9
        disk = run["gb"] / (read / mean["read"] + run["written_gb"] / mean["write"])
        run["disk_gb_per_s"] = disk
        run["of_slower"] = run["gb_per_s"] / min(disk, mean["copy"])
    plain_rate = sum(p["gb"] for p in plain) / sum(p["seconds"] for p in plain)
    return {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
        "source": {"gb": size(source) / 1e9, "layers": config.num_hidden_layers, "experts": config.n_routed_experts},
        "jobs": arguments.jobs, "rates_gb_per_s": mean, "rates": rates, "one_thread_gb_per_s": parts(), "ours": runs,
        "plain": plain, "plain_gb_per_s": plain_rate, "over_plain": runs["w8a8"]["gb_per_s"] / plain_rate,
        "memory": {"largest_tensor_mib": largest / 2**20, "bar_mib": 3 * largest / 2**20 + 1024}, "bars": BARS,
    }  # fmt: skip


def report(record: dict[str, Any]) -> None:
    rates = record["rates_gb_per_s"]
    print(f"{record['cpu']}, source {record['source']['gb']:.2f} GB. GB/s: disk reads {rates['read']:.2f}, writes "
          f"{rates['write']:.2f}, memory copies {rates['copy']:.2f}, plain PyTorch {record['plain_gb_per_s']:.3f}")
    print("one thread, GB/s: " + ", ".join(f"{k} {v:.2f}" for k, v in record["one_thread_gb_per_s"].items()))
    for to, run in record["ours"].items():
        print(f"{to}: {run['seconds']:.0f} s ({run['processor_s']:.0f} s of processors), {run['gb_per_s']:.3f} GB/s, "
              f"{run['of_slower']:.0%} of the slower of disk ({run['disk_gb_per_s']:.3f}) and memory copy; peak "
              f"{run['peak_mib']:,.0f} MiB (bar {record['memory']['bar_mib']:,.0f})")  # fmt: skip
    print(f"W8A8 over plain PyTorch: {record['over_plain']:.1f}x")


if __name__ == "__main__":
    main()
