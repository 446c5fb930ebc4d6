"""A V4 checkpoint becomes one in another format, shard by shard: peak memory is a few tensors, whatever the model.

Each shard is written under a temporary name, synced and renamed, and noted with its checksum in a state file: a run
that was killed goes on after the last whole shard, and ends with the same bytes. Config, index and checksums come last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upwell.checkpoint.integers import QUANT_TYPES
from upwell.checkpoint.match import Plan, plan_checkpoint
from upwell.checkpoint.pieces import conversion_pieces
from upwell.checkpoint.recipes import INTEGER_TARGETS, RECIPES, Layout, Target
from upwell.checkpoint.save import Piece, split_shards, write_shard
from upwell.checkpoint.shards import INDEX_NAME
from upwell.checkpoint.sniff import DESCRIPTION, sniff
from upwell.checkpoint.verify import CHECKSUMS, write_checksums
from upwell.errors import CheckpointError, InputError
from upwell.formats.int4 import GROUP

STATE = ".upwell-convert.json"
SHARD_BYTES = 4_000_000_000
Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What is asked for. `recipe` says which weights become INT8; `shards` of equal size, or None: of about 4 GB."""

    source: Path
    target_dir: Path
    to: Target
    layout: Layout = "upwell"
    recipe: str = "vllm-ascend"
    shards: int | None = None


def convert(job: Conversion, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Do it, or go on where a killed run stopped. Returns what was written: files, bytes, tensors quantized.

    Raises InputError, ConfigError, and CheckpointError for a kind that can't be converted and for too little space.
    """
    _check_request(job)
    kind = sniff(job.source)
    if not kind.readable:
        raise CheckpointError(f"{job.source}: {kind.name} can't be converted yet", "give an official V4 checkpoint")
    plan = plan_checkpoint(job.source)
    pieces = list(conversion_pieces(plan, job.to, job.layout, job.recipe))
    total = sum(piece.nbytes for piece in pieces)
    limit = -(-total // job.shards) if job.shards else SHARD_BYTES
    groups = split_shards(pieces, limit)
    stem = "quant_model_weights" if job.layout == "vllm-ascend" else "model"
    names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    state = _State.open(job, pieces)
    sizes = {name: sum(piece.nbytes for piece in group) for name, group in zip(names, groups, strict=True)}
    left = sum(size for name, size in sizes.items() if name not in state.done)
    _check_space(job.target_dir, left)
    written = total - left
    progress(written, total)
    for name, group in zip(names, groups, strict=True):
        if name in state.done:
            continue
        digest = hashlib.sha256()
        temporary = job.target_dir / f".{name}.tmp"

        def advance(count: int, before: int = written) -> None:
            progress(before + count, total)

        write_shard(temporary, group, digest, advance)
        os.replace(temporary, job.target_dir / name)
        state.add(name, digest.hexdigest())
        written += sizes[name]
    _finish(job, plan, names, groups, total, state.done)
    quantized = sum(piece.format is not None for piece in pieces)
    return {"kind": kind.name, "files": len(names), "bytes": total, "quantized": quantized}


def _check_request(job: Conversion) -> None:
    if job.layout == "vllm-ascend" and job.to not in INTEGER_TARGETS:
        raise InputError(
            f"the layout vllm-ascend is for {', '.join(INTEGER_TARGETS)}, not {job.to}", "use --layout upwell"
        )
    if job.recipe not in RECIPES:
        raise InputError(f"no recipe {job.recipe!r}", f"recipes: {', '.join(RECIPES)}")
    if job.shards is not None and job.shards < 1:
        raise InputError(f"--shards is {job.shards}, must be at least 1")
    if job.source.resolve() == job.target_dir.resolve():
        raise InputError(f"{job.target_dir}: source and target are the same directory")


@dataclass
class _State:
    """Which shards of this very conversion are complete, with their checksums; a file in the target directory."""

    file: Path
    key: str
    done: dict[str, str]

    @staticmethod
    def open(job: Conversion, pieces: list[Piece]) -> _State:
        """Begin or go on. Raises InputError if the directory holds anything else."""
        sources = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in job.source.glob("*.safetensors"))
        asked = [job.to, job.layout, job.recipe, job.shards, sources, [piece.tensors for piece in pieces]]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        file = job.target_dir / STATE
        if job.target_dir.exists() and not job.target_dir.is_dir():
            raise InputError(f"{job.target_dir}: isn't a directory", "name a directory to write to")
        job.target_dir.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["key"] != key:
                raise InputError(f"{job.target_dir}: another conversion stopped here", "remove it, or name another DST")
            done = {name: digest for name, digest in known["done"].items() if (job.target_dir / name).is_file()}
            return _State(file, key, done)
        if any(job.target_dir.iterdir()):
            raise InputError(f"{job.target_dir}: isn't empty", "name a new directory")
        state = _State(file, key, {})
        state._write()
        return state

    def add(self, name: str, digest: str) -> None:
        self.done[name] = digest
        self._write()

    def _write(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({"key": self.key, "done": self.done}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.file)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed + (64 << 20):
        raise CheckpointError(
            f"{directory}: {needed / 1e9:,.1f} GB to write, {free / 1e9:,.1f} GB free", "name a DST on a larger disk"
        )


def _finish(
    job: Conversion, plan: Plan, names: list[str], groups: list[list[Piece]], total: int, digests: dict[str, str]
) -> None:
    """Index, config, description and the source's other files; then the checksums of all; the state goes last."""
    made = [(file, piece) for file, group in zip(names, groups, strict=True) for piece in group]
    tensors = {name: file for file, piece in made for name, _, _ in piece.tensors}
    documents: dict[str, Any] = {
        "config.json": _config(job, plan),
        (INDEX_NAME if job.layout == "upwell" else "quant_model_weights.safetensors.index.json"): {
            "metadata": {"total_size": total}, "weight_map": tensors,
        },
    }  # fmt: skip
    if job.layout == "vllm-ascend":
        documents[DESCRIPTION] = _description(job, [piece for _, piece in made])
    for name, document in documents.items():
        (job.target_dir / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for file in sorted(job.source.iterdir()):  # tokenizer, generation config, licence
        other = file.suffix == ".safetensors" or file.name.endswith(".index.json") or file.name.startswith(".")
        if file.is_file() and not other and file.name not in (*documents, DESCRIPTION, CHECKSUMS):
            shutil.copyfile(file, job.target_dir / file.name)
    write_checksums(job.target_dir, digests)
    (job.target_dir / STATE).unlink()


def _description(job: Conversion, pieces: list[Piece]) -> dict[str, Any]:
    """quant_model_description.json: the type of every tensor, and what holds for all."""
    of_all = {"w8a8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC", "w4a16": "W4A16"}[job.to]
    return {
        "version": "1.0.0", "model_quant_type": of_all, "group_size": GROUP if job.to == "w4a16" else 0, "metadata": {},
        **{name: QUANT_TYPES.get(piece.format, "FLOAT") for piece in pieces for name, _, _ in piece.tensors},
    }  # fmt: skip


def _config(job: Conversion, plan: Plan) -> dict[str, Any]:
    official = job.to in ("fp4", "fp8")
    config = replace(
        plan.config, quant_method="fp8" if official else None, expert_dtype="fp4" if job.to == "fp4" else None
    )
    raw = config.to_official() | {"torch_dtype": "bfloat16"}
    if job.to in INTEGER_TARGETS and job.layout == "upwell":
        raw["quantization_config"] = {"quant_method": job.to, "recipe": job.recipe}
    return raw
