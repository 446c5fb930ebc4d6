"""A V4 checkpoint becomes one in another format, shard by shard: peak memory is a few tensors, whatever the model.

Shards are written a few at once, each under a temporary name, synced and renamed, and noted with its checksum in a
state file: a run that was killed goes on with the shards that aren't whole, and ends with the same bytes. Config, index
and checksums come last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from upwell.checkpoint.calibrate import Calibration, calibrate, disk_bytes, first_tokens
from upwell.checkpoint.dspark import plan_dspark
from upwell.checkpoint.integers import QUANT_TYPES
from upwell.checkpoint.match import Plan, plan_checkpoint
from upwell.checkpoint.pieces import conversion_pieces
from upwell.checkpoint.recipes import INTEGER_TARGETS, RECIPES, Layout, Target
from upwell.checkpoint.resume import State
from upwell.checkpoint.save import Piece, split_evenly, split_shards, write_shard
from upwell.checkpoint.shards import INDEX_NAME
from upwell.checkpoint.sniff import DESCRIPTION, sniff
from upwell.checkpoint.verify import CHECKSUMS, write_checksums
from upwell.errors import CheckpointError, InputError
from upwell.formats.int4 import GROUP

SHARD_BYTES = 4_000_000_000
MOST_HELD = 8_000_000_000  # bytes of dense weights that calibration may hold: those of FP8 and FP4 stay mapped
MOST_JOBS = 8  # unless more are asked for: each holds a tensor or two
Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What is asked for. `recipe` says which weights become integers; `shards`, of about equal size, None: of 4 GB;
    `jobs`: how many shards are written at once, None: as many as there are processors, at most 8; `calibration`: token
    ids of texts for whose sake INT4 experts are rounded."""

    source: Path
    target_dir: Path
    to: Target
    layout: Layout = "upwell"
    recipe: str = "upwell"
    shards: int | None = None
    jobs: int | None = None
    calibration: Sequence[Sequence[int]] | None = None


def convert(
    job: Conversion, progress: Progress = lambda done, total: None, calibrating: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Do it, or go on where a killed run stopped. Returns what was written: files, bytes, tensors quantized.

    `calibrating`: layers that the texts have run through, layers in all.

    Raises InputError, ConfigError, and CheckpointError for a kind that can't be converted and for too little space.
    """
    _check_request(job)
    kind = sniff(job.source)
    if not kind.readable:
        raise CheckpointError(f"{job.source}: {kind.name} can't be converted yet", "give an official V4 checkpoint")
    if kind.format == "dspark" and job.layout != "vllm-ascend":
        raise CheckpointError(
            f"{job.source}: {kind.name} can be converted for vllm-ascend only", "use --layout vllm-ascend"
        )
    plan = plan_dspark(job.source) if kind.format == "dspark" else plan_checkpoint(job.source)
    calibration, texts = None, list[Tensor]()
    if job.calibration is not None:
        _check_calibration(job, kind.format)
        texts = first_tokens(job.calibration, plan.config.vocab_size)
        calibration = Calibration(job.target_dir / ".calibration", plan.config.swiglu_limit)
    pieces = list(conversion_pieces(plan, job.to, job.layout, job.recipe, calibration))
    groups = split_evenly(pieces, job.shards) if job.shards else split_shards(pieces, SHARD_BYTES)
    stem = "quant_model_weights" if job.layout == "vllm-ascend" else "model"
    shards = {f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}
    state = State.open(job.target_dir, _key(job, pieces, texts))
    todo = {name: group for name, group in shards.items() if name not in state.done}
    total, left = (sum(p.nbytes for group in of.values() for p in group) for of in (shards, todo))
    _check_space(job.target_dir, left + disk_bytes(plan.config, texts))
    if calibration is not None and todo:
        calibrate(job.source, texts, calibration.directory, calibrating)
    _write_shards(job, todo, state, _Meter(progress, total - left, total))
    _finish(job, plan, shards, total, state.done)
    if calibration is not None:
        calibration.remove()
    state.end()
    quantized = sum(piece.format is not None for piece in pieces)
    return {"kind": kind.name, "files": len(shards), "bytes": total, "quantized": quantized}


def _write_shards(job: Conversion, todo: dict[str, list[Piece]], state: State, meter: _Meter) -> None:
    """A thread a shard, `jobs` at a time. What a shard holds doesn't depend on the others, so neither on `jobs`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(job.jobs or min(cores, MOST_JOBS), max(len(todo), 1))
    threads = max(1, cores // jobs)  # of each thread's tensor operations

    def write(name: str) -> None:
        digest = hashlib.sha256()
        temporary = job.target_dir / f".{name}.tmp"
        write_shard(temporary, todo[name], digest, meter.counter())
        os.replace(temporary, job.target_dir / name)
        state.add(name, digest.hexdigest())

    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        writes = [pool.submit(write, name) for name in todo]
        try:
            for ended in as_completed(writes):
                ended.result()
        except BaseException:
            meter.stop()
            for waiting in writes:
                waiting.cancel()
            raise


class _Stopped(Exception):
    """Another shard failed, or the person pressed Ctrl-C."""


class _Meter:
    """Sums what all threads have written, and stops them all."""

    def __init__(self, show: Progress, done: int, total: int) -> None:
        self.show, self.done, self.total = show, done, total
        self.lock, self.stopped = Lock(), False
        show(done, total)

    def counter(self) -> Callable[[int], None]:
        """For one shard: called with the bytes written of it so far."""
        before = 0

        def count(written: int) -> None:
            nonlocal before
            with self.lock:
                if self.stopped:
                    raise _Stopped
                self.done += written - before
                before = written
                self.show(self.done, self.total)

        return count

    def stop(self) -> None:
        with self.lock:
            self.stopped = True


def _key(job: Conversion, pieces: list[Piece], texts: list[Tensor]) -> str:
    """Tells this conversion from any other: what is asked for, of which files. Not `jobs`: the result is the same."""
    sources = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in job.source.glob("*.safetensors"))
    tensors, ids = [piece.tensors for piece in pieces], [text.tolist() for text in texts]
    asked = [job.to, job.layout, job.recipe, job.shards, sources, tensors, ids]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _check_request(job: Conversion) -> None:
    if job.layout == "vllm-ascend" and job.to not in INTEGER_TARGETS:
        raise InputError(
            f"the layout vllm-ascend is for {', '.join(INTEGER_TARGETS)}, not {job.to}", "use --layout upwell"
        )
    if job.recipe not in RECIPES:
        raise InputError(f"no recipe {job.recipe!r}", f"recipes: {', '.join(RECIPES)}")
    if job.shards is not None and job.shards < 1:
        raise InputError(f"--shards is {job.shards}, must be at least 1")
    if job.jobs is not None and job.jobs < 1:
        raise InputError(f"--jobs is {job.jobs}, must be at least 1")
    if job.source.resolve() == job.target_dir.resolve():
        raise InputError(f"{job.target_dir}: source and target are the same directory")


def _check_calibration(job: Conversion, source: str | None) -> None:
    if job.to not in ("w4a8", "w4a16"):
        raise InputError(f"--calibration is for w4a8 and w4a16, {job.to} is exact enough", "leave it out")
    if source == "dspark":
        raise CheckpointError(f"{job.source}: calibration runs the model, and Upwell doesn't run DSpark releases yet")
    held = sum(file.stat().st_size for file in job.source.glob("*.safetensors"))
    if source != "official" and held > MOST_HELD:
        raise CheckpointError(
            f"{job.source}: calibration would hold {held / 1e9:,.0f} GB of dense weights in memory",
            "convert from the official FP8/FP4 release: its weights stay in their files",
        )


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed + (64 << 20):
        raise CheckpointError(
            f"{directory}: {needed / 1e9:,.1f} GB to write, {free / 1e9:,.1f} GB free", "name a DST on a larger disk"
        )


def _finish(
    job: Conversion, plan: Plan, shards: dict[str, list[Piece]], total: int, digests: dict[str, str]
) -> None:  # fmt: skip
    """Index, config, description and the source's other files; then the checksums of all."""
    tensors = {name: file for file, group in shards.items() for piece in group for name, _, _ in piece.tensors}
    documents: dict[str, Any] = {
        "config.json": _config(job, plan),
        (INDEX_NAME if job.layout == "upwell" else "quant_model_weights.safetensors.index.json"): {
            "metadata": {"total_size": total}, "weight_map": tensors,
        },
    }  # fmt: skip
    if job.layout == "vllm-ascend":
        documents[DESCRIPTION] = _description(job, [piece for group in shards.values() for piece in group])
    for name, document in documents.items():
        (job.target_dir / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for file in sorted(job.source.iterdir()):  # tokenizer, generation config, licence
        other = file.suffix == ".safetensors" or file.name.endswith(".index.json") or file.name.startswith(".")
        if file.is_file() and not other and file.name not in (*documents, DESCRIPTION, CHECKSUMS):
            shutil.copyfile(file, job.target_dir / file.name)
    write_checksums(job.target_dir, digests)


def _description(job: Conversion, pieces: list[Piece]) -> dict[str, Any]:
    """quant_model_description.json: the type of every tensor, and what holds for all."""
    of_all = {"w8a8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC", "w4a16": "W4A16"}[job.to]
    return {
        "version": "1.0.0", "model_quant_type": of_all, "group_size": GROUP if job.to == "w4a16" else 0, "metadata": {},
        **{name: QUANT_TYPES.get(piece.format, "FLOAT") for piece in pieces for name, _, _ in piece.tensors},
    }  # fmt: skip


def _config(job: Conversion, plan: Plan) -> dict[str, Any]:
    """config.json. vllm-ascend's is the source's own with all its keys (dspark_*), but that nothing is FP8 or FP4."""
    if job.layout == "vllm-ascend":
        source: dict[str, Any] = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
        raw = source if "compress_ratios" in source else plan.config.to_official()
        kept = {key: value for key, value in raw.items() if key not in ("quantization_config", "expert_dtype")}
        return kept | {"torch_dtype": "bfloat16"}
    official = job.to in ("fp4", "fp8")
    config = replace(
        plan.config, quant_method="fp8" if official else None, expert_dtype="fp4" if job.to == "fp4" else None
    )
    raw = config.to_official() | {"torch_dtype": "bfloat16"}
    if job.to in INTEGER_TARGETS:
        raw["quantization_config"] = {"quant_method": job.to, "recipe": job.recipe}
        if job.calibration is not None:
            raw["quantization_config"]["rounding"] = "gptq"
    return raw
