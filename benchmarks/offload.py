"""Decode with experts paged in from disk, in less memory than the model takes, against what the disk allows.

    python benchmarks/offload.py DIR [--limit 4GiB] [--expert-memory 1GiB 1536MiB 2GiB] [--json OUT]

DIR gets a checkpoint at V4-Flash's layer geometry (hidden 4096, 256 experts, official FP4/FP8 formats), about 10 GiB,
in the order in which safetensors writes; it is made once and deleted at the end unless --keep. A process with
RLIMIT_DATA of --limit then loads it with `offload experts=disk` and decodes single tokens; every second round without
reading ahead. After each round it reads again what the round read, in the same pieces, as many at once, and does
nothing else. The better of the speeds before and after a round, over the bytes of the experts that were not in memory,
is what the disk allows. (The same experts, as a virtual disk may give some faster than others; before and after, as it
may lend speed for a while.) Peak resident memory is the kernel's count (VmHWM).
The weights are random, so which experts a token takes is no text's: hit rates are of this benchmark alone.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import mmap
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

BAR = 0.70  # of what disk bandwidth and hit rate allow
RATIOS = (0, 4, 128)  # a layer of each attention, the first with hash routing
SPARE = 8  # slots that the disk's speed is measured with
VOCAB = 9216  # the head's share of a layer is then as in Flash: 129,280 rows for 43 layers


# The checkpoint.


def make(directory: Path) -> int:
    """Writes it where it isn't there yet; returns the bytes of its tensors."""
    import torch
    from flash_geometry import Pool

    from upwell.checkpoint.geometry import slots
    from upwell.checkpoint.shards import INDEX_NAME, read_shards
    from upwell.config import ModelConfig

    if not (directory / INDEX_NAME).exists():
        directory.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(
            ModelConfig.preset("v4-flash").with_mtp(0), num_hidden_layers=len(RATIOS), compress_ratios=RATIOS,
            num_hash_layers=1, vocab_size=VOCAB,
        )  # fmt: skip
        tensors = [tensor for slot in slots(config) for tensor in stored_as(slot)]
        files = {f"model-{i + 1:05d}.safetensors": f"layers.{i}." for i in range(len(RATIOS))}
        files["model-00000.safetensors"] = ""
        weight_map: dict[str, str] = {}
        pool = Pool()
        torch.manual_seed(0)
        for file, prefix in files.items():
            mine = [t for t in tensors if t[0] not in weight_map and t[0].startswith(prefix)]
            write(directory / file, sorted(mine, key=lambda t: (-WIDTH[t[1]][0], t[1], t[0])), pool, config)
            weight_map |= {name: file for name, *_ in mine}
        (directory / "config.json").write_text(json.dumps(config.to_official()))
        (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in read_shards(directory).values())


WIDTH: dict[str, tuple[int, str]] = {
    "I64": (8, "int64"), "F32": (4, "float32"), "BF16": (2, "bfloat16"), "I8": (1, "uint8"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E8M0": (1, "uint8"),
}  # fmt: skip


def stored_as(slot: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of what the official format stores."""
    from upwell.checkpoint.geometry import fp4_packed_shape, fp4_scale_shape, fp8_scale_shape

    out = []
    for e in range(slot.count):
        name = slot.name.format(e)
        scale = name.removesuffix("weight") + "scale"
        if slot.kind == "matrix":
            out += [(name, "F8_E4M3", slot.shape), (scale, "F8_E8M0", fp8_scale_shape(slot.shape))]
        elif slot.kind == "expert":
            out += [(name, "I8", fp4_packed_shape(slot.shape)), (scale, "F8_E8M0", fp4_scale_shape(slot.shape))]
        else:
            out.append((name, {"float": "F32", "table": "I64"}.get(slot.kind, "BF16"), slot.shape))
    return out


def write(file: Path, tensors: list[tuple[str, str, tuple[int, ...]]], pool: Any, config: Any) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + prod(shape) * WIDTH[dtype][0]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in tensors:
            stream.write(values(name, dtype, shape, pool, config))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def values(name: str, dtype: str, shape: tuple[int, ...], pool: Any, config: Any) -> Any:
    """Random values of a spread that keeps activations sane (as in flash_geometry.py), as bytes."""
    import torch

    if name.endswith("tid2eid"):
        tensor = torch.rand(shape[0], config.n_routed_experts).topk(shape[1]).indices
    elif dtype == "F8_E8M0":
        tensor = pool.scales(shape, -8 if ".experts." in name else -13).to(torch.uint8)
    elif name.endswith(("norm.weight", "scale")):
        tensor = torch.ones(shape)
    elif name.endswith(("base", "bias", "attn_sink", "ape")):
        tensor = torch.zeros(shape)
    elif name.startswith("embed"):
        tensor = torch.randn(shape)
    else:
        tensor = pool.take(shape, getattr(torch, WIDTH[dtype][1]))
    return tensor.to(getattr(torch, WIDTH[dtype][1])).contiguous().view(torch.uint8).numpy().data


# The process under the limit.


def child(directory: Path, limit: int, memory: str, rounds: int, steps: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch

    from upwell.engine import LLM, SamplingParams

    torch.set_grad_enabled(False)
    began = time.perf_counter()
    llm = LLM(directory, dtype=torch.float32, device="cpu", offload="experts=disk", expert_memory=memory,
              max_num_seqs=1, cache_tokens=2048, enable_prefix_caching=False)  # fmt: skip
    loaded = time.perf_counter() - began
    pages: Any = llm.model.pages
    ahead, speed, samples, before_round = pages.expect, Disk(pages), [], 0.0
    for k in range(-1, 2 * rounds):
        pages.expect = (lambda layer, experts: None) if k % 2 else ahead
        params = SamplingParams(temperature=1.0, seed=k + 1, max_tokens=steps + 2, ignore_eos=True)
        llm.engine.add(llm.engine.request([6 + k, 6, 7, 8], params, lambda delta: None))
        for _ in range(2):
            llm.engine.step()
        speed.read.clear()
        before, begin, tokens = dataclasses.replace(pages.counts), time.perf_counter(), 0
        while llm.engine.has_work:
            llm.engine.step()
            tokens += 1
        seconds, after = time.perf_counter() - begin, dataclasses.replace(pages.counts)
        counted = {name: value - getattr(before, name) for name, value in dataclasses.asdict(after).items()}
        disk = before_round, speed.measure()
        if k >= 0:  # the first round fills the slots
            samples.append({"ahead": k % 2 == 0, "tokens": tokens, "seconds": seconds, **counted, "disk_bytes_s": disk})
        before_round = disk[1]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "expert_memory": memory, "slots": pages.slots, "slot_bytes": pages.slot_bytes, "load_s": loaded,
        "peak_resident": int(status["VmHWM"].split()[0]) * 1024,
        "data": int(status["VmData"].split()[0]) * 1024, "samples": samples,
    }  # fmt: skip


class Disk:
    """Notes what the pager reads, in `read`, and reads it again."""

    def __init__(self, pages: Any) -> None:
        import threading

        from upwell.checkpoint.expert_reads import Readers

        self.read: list[Any] = []
        self.lock, self.left, self.slot_bytes = threading.Lock(), 0, pages.slot_bytes
        self.done = threading.Condition(self.lock)
        memory = mmap.mmap(-1, SPARE * self.slot_bytes)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.readers = Readers(memoryview(memory), self.lock, self._finished)
        submit = pages._readers.submit

        def noted(key: int, extent: Any, at: int, urgent: bool) -> Any:
            self.read.append(extent)
            return submit(key, extent, at, urgent)

        pages._readers.submit = noted

    def _finished(self, load: Any) -> None:
        assert load.error is None, load.error
        self.left -= 1
        self.done.notify_all()

    def measure(self) -> float:
        """Bytes a second."""
        begin = time.perf_counter()
        with self.lock:
            self.left = len(self.read)
            for key, extent in enumerate(self.read):
                self.readers.submit(key, extent, key % SPARE * self.slot_bytes, urgent=True)
            while self.left:
                self.done.wait()
        return sum(run.length for e in self.read for run in e.runs) / (time.perf_counter() - begin)


# What it comes to.


def summary(run: dict[str, Any], ahead: bool) -> dict[str, Any]:
    """Medians over the rounds with or without reading ahead. `allowed`: tokens a second if the disk did nothing but
    read what was missed."""
    rows = []
    for sample in (s for s in run["samples"] if s["ahead"] == ahead):
        missed = (sample["requests"] - sample["hits"]) * run["slot_bytes"]
        disk = max(sample["disk_bytes_s"])
        allowed = disk * sample["tokens"] / missed
        rate = sample["tokens"] / sample["seconds"]
        rows.append({"rate": rate, "allowed": allowed, "share": rate / allowed,
                     "hit_rate": sample["hits"] / sample["requests"], "disk_bytes_s": disk,
                     "guesses_right": sample["needed"] / max(1, sample["expected"])})  # fmt: skip
    out: dict[str, Any] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    out["share_all"] = sorted(row["share"] for row in rows)
    out["rate_all"] = sorted(row["rate"] for row in rows)
    return out


def cached(directory: Path) -> int:
    """Bytes of the shards in the page cache."""
    libc, page, total = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 0
    for file in directory.glob("*.safetensors"):
        size = file.stat().st_size
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            seen = (ctypes.c_ubyte * -(-size // page))()
            start = ctypes.c_char.from_buffer(mapped)
            libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), seen)
            total += page * sum(x & 1 for x in bytes(seen))
            del start
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--limit", default="4GiB", help="RLIMIT_DATA of the process (default: 4GiB)")
    parser.add_argument("--expert-memory", nargs="+", default=["1GiB", "1536MiB", "2GiB"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="tokens a round (default: 24)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", metavar="MEMORY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    from upwell.checkpoint.offload import parse_size

    limit = parse_size(args.limit)
    if args.child:
        print(json.dumps(child(args.directory, limit, args.child, args.rounds, args.steps)))
        return
    size = make(args.directory)
    print(f"{size / 2**30:.2f} GiB of tensors, limit {limit / 2**30:.2f} GiB", flush=True)
    runs = []
    try:
        for memory in args.expert_memory:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", memory], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            run = json.loads(done.stdout)
            run |= {"read_ahead": summary(run, True), "not_ahead": summary(run, False)}
            run["page_cache"] = cached(args.directory)
            runs.append(run)
            show(run, limit)
    finally:
        if not args.keep:
            shutil.rmtree(args.directory)
    if args.json is not None:
        args.json.write_text(json.dumps(record(size, limit, runs), indent=1) + "\n", encoding="utf-8")


def show(run: dict[str, Any], limit: int) -> None:
    print(f"experts in {run['expert_memory']}, {run['slots']} of them: peak {run['peak_resident'] / 2**30:.2f} of "
          f"{limit / 2**30:.2f} GiB, {run['page_cache'] / 2**20:.0f} MiB of the shards in the page cache")  # fmt: skip
    for name in ("read_ahead", "not_ahead"):
        s = run[name]
        rates, shares = s["rate_all"], s["share_all"]
        print(f"  {name}: {s['rate']:.2f} tok/s ({rates[0]:.2f} .. {rates[-1]:.2f}), hit rate {s['hit_rate']:.2f}, "
              f"disk {s['disk_bytes_s'] / 1e9:.2f} GB/s allows {s['allowed']:.2f} tok/s: {s['share']:.0%} "
              f"({shares[0]:.0%} .. {shares[-1]:.0%}), guesses right {s['guesses_right']:.2f}", flush=True)  # fmt: skip


def record(size: int, limit: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    import upwell
    from upwell.bench.record import _commit, cpu_name
    from upwell.ops import native

    return {
        "benchmark": "offload", "command": sys.argv, "date": time.strftime("%Y-%m-%d"),
        "build": {"upwell": upwell.__version__, "commit": _commit(), "torch": torch.__version__,
                  "python": platform.python_version(), "kernels": native.describe()},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                    "load_average": os.getloadavg(), "system": platform.platform()},
        "checkpoint_bytes": size, "limit_bytes": limit, "bar": BAR, "runs": runs,
    }  # fmt: skip


if __name__ == "__main__":
    main()
