"""A V4 checkpoint becomes one in another format, shard by shard: peak memory is a few tensors, whatever the model.

Each shard is written under a temporary name, synced and renamed, and noted with its checksum in a state file: a run
that was killed goes on after the last whole shard, and ends with the same bytes. Config, index and checksums come last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upwell.checkpoint.geometry import Slot, fp4_packed_shape, fp4_scale_shape, fp8_scale_shape, slots
from upwell.checkpoint.load import DTYPES
from upwell.checkpoint.match import Plan, Weight, plan_checkpoint
from upwell.checkpoint.recipes import RECIPES, Layout, Target
from upwell.checkpoint.save import Piece, Specs, split_shards, write_shard
from upwell.checkpoint.shards import INDEX_NAME, Stored
from upwell.checkpoint.sniff import DESCRIPTION, sniff
from upwell.checkpoint.verify import CHECKSUMS, write_checksums
from upwell.errors import CheckpointError, InputError
from upwell.formats.fp4 import GROUP, quantize_fp4
from upwell.formats.fp8 import quantize_fp8
from upwell.formats.int8 import quantize_int8
from upwell.ops.linear import dense_weight

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
    pieces = list(_pieces(job, plan))
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
    quantized = sum(len(piece.tensors) > 1 for piece in pieces)
    return {"kind": kind.name, "files": len(names), "bytes": total, "quantized": quantized}


def _check_request(job: Conversion) -> None:
    if job.layout == "vllm-ascend" and job.to != "w8a8":
        raise InputError(f"the layout vllm-ascend is for w8a8, not {job.to}", "use --layout upwell")
    if job.recipe not in RECIPES:
        raise InputError(f"no recipe {job.recipe!r}", f"recipes: {', '.join(RECIPES)}")
    if job.shards is not None and job.shards < 1:
        raise InputError(f"--shards is {job.shards}, must be at least 1")
    if job.source.resolve() == job.target_dir.resolve():
        raise InputError(f"{job.target_dir}: source and target are the same directory")


class _Reader:
    """Reads stored tensors into memory of their own, so that what is held is what is being converted."""

    def tensor(self, stored: Stored) -> Tensor:
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            view = raw.numpy().data
            at = 0
            while at < len(view):
                got = stream.readinto(view[at:])
                if not got:
                    raise CheckpointError(f"{stored}: the file ended while it was read")
                at += got
        dtype = torch.int8 if stored.dtype == "I8" else DTYPES[stored.dtype]
        return raw.view(dtype).view(stored.shape)

    def dense(self, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor, scale = weight
        stored = self.tensor(tensor)
        if scale is None:
            return stored.to(dtype)
        if tensor.dtype == "I8" and scale.dtype != "F32":
            stored = stored.view(torch.uint8)  # FP4, two a byte
        return dense_weight(stored, self.tensor(scale), dtype)


def _pieces(job: Conversion, plan: Plan) -> Iterator[Piece]:
    """The target's tensors in official order, each made when it is written."""
    reader = _Reader()
    single = {slot.name: weight for slot, weight in plan.single}
    for slot in slots(plan.config):
        if slot.kind != "expert":
            weight = single[slot.name]
            matrix = slot.kind == "matrix"
            yield _matrix(job, slot, slot.name, reader, weight) if matrix else _plain(slot, reader, weight)
            continue
        layer, _, leaf = slot.name.removesuffix(".weight").partition(".{}.")
        for e in range(slot.count):
            name = slot.name.format(e)
            if layer in plan.stacked:
                yield _matrix(job, slot, name, reader, _row_of(plan.stacked[layer], leaf, e))
            else:
                yield _matrix(job, slot, name, reader, plan.experts[layer][leaf][e])


def _row_of(stacks: tuple[Stored, Stored], leaf: str, expert: int) -> Weight:
    """One expert's w1, w3 (halves of w13 [E, 2I, D]) or w2 of transformers' stacks, as a tensor in the file."""
    stack = stacks[1] if leaf == "w2" else stacks[0]
    rows, cols = stack.shape[1:]
    size = stack.nbytes // stack.shape[0]
    start = stack.start + expert * size
    if leaf == "w2":
        return replace(stack, shape=(rows, cols), start=start, end=start + size), None
    half = size // 2
    start += half if leaf == "w3" else 0
    return replace(stack, shape=(rows // 2, cols), start=start, end=start + half), None


def _plain(slot: Slot, reader: _Reader, weight: Weight) -> Piece:
    as_stored = {"table": (torch.int64, "I64"), "float": (torch.float32, "F32")}
    dtype, code = as_stored.get(slot.kind, (torch.bfloat16, "BF16"))
    return Piece(((slot.name, code, slot.shape),), lambda: (reader.tensor(weight[0]).to(dtype),))


def _matrix(job: Conversion, slot: Slot, name: str, reader: _Reader, weight: Weight) -> Piece:
    """A matrix or one expert's weight in the target's format."""
    base, (rows, cols) = name.removesuffix("weight"), slot.shape
    specs: Specs
    if job.to == "w8a8" and RECIPES[job.recipe].search(name):
        if job.layout == "vllm-ascend":
            column = ("F32", (rows, 1))
            specs = ((name, "I8", slot.shape), (f"{base}weight_scale", *column), (f"{base}weight_offset", *column))
            return Piece(specs, lambda: _with_offset(*quantize_int8(reader.dense(weight))))
        return Piece(((name, "I8", slot.shape), (f"{base}scale", "F32", (rows,))),
                     lambda: quantize_int8(reader.dense(weight)))  # fmt: skip
    if job.to in ("bf16", "w8a8"):
        return Piece(((name, "BF16", slot.shape),), lambda: (reader.dense(weight, torch.bfloat16),))
    if job.to == "fp4" and slot.kind == "expert":
        if cols % GROUP:
            raise CheckpointError(f"{name}: {cols} columns aren't a multiple of FP4's group of {GROUP}", "use --to fp8")
        specs = ((name, "I8", fp4_packed_shape(slot.shape)), (f"{base}scale", "F8_E8M0", fp4_scale_shape(slot.shape)))
        return Piece(specs, lambda: _kept(reader, weight, ("I8", "U8")) or quantize_fp4(reader.dense(weight)))
    specs = ((name, "F8_E4M3", slot.shape), (f"{base}scale", "F8_E8M0", fp8_scale_shape(slot.shape)))
    return Piece(specs, lambda: _kept(reader, weight, ("F8_E4M3",)) or quantize_fp8(reader.dense(weight)))


def _kept(reader: _Reader, weight: Weight, dtypes: tuple[str, ...]) -> tuple[Tensor, ...] | None:
    """The packed weight and its scale as they are, where they are in the wanted format already."""
    tensor, scale = weight
    if scale is None or tensor.dtype not in dtypes or scale.dtype == "F32":
        return None
    return reader.tensor(tensor), reader.tensor(scale)


def _with_offset(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """vllm-ascend's three tensors: scale and offset [out, 1] FP32; a symmetric format's offset is zero."""
    return weight, scale.unsqueeze(1), torch.zeros(len(scale), 1)


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
    packed = {name for _, piece in made if len(piece.tensors) > 1 for name, _, _ in piece.tensors}
    documents: dict[str, Any] = {
        "config.json": _config(job, plan),
        (INDEX_NAME if job.layout == "upwell" else "quant_model_weights.safetensors.index.json"): {
            "metadata": {"total_size": total}, "weight_map": tensors,
        },
    }  # fmt: skip
    if job.layout == "vllm-ascend":
        types = {n: "W8A8_DYNAMIC" if n in packed else "FLOAT" for n in tensors}
        documents[DESCRIPTION] = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": 0, **types}
    for name, document in documents.items():
        (job.target_dir / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for file in sorted(job.source.iterdir()):  # tokenizer, generation config, licence
        other = file.suffix == ".safetensors" or file.name.endswith(".index.json") or file.name.startswith(".")
        if file.is_file() and not other and file.name not in (*documents, DESCRIPTION, CHECKSUMS):
            shutil.copyfile(file, job.target_dir / file.name)
    write_checksums(job.target_dir, digests)
    (job.target_dir / STATE).unlink()


def _config(job: Conversion, plan: Plan) -> dict[str, Any]:
    official = job.to in ("fp4", "fp8")
    config = replace(
        plan.config, quant_method="fp8" if official else None, expert_dtype="fp4" if job.to == "fp4" else None
    )
    raw = config.to_official() | {"torch_dtype": "bfloat16"}
    if job.to == "w8a8" and job.layout == "upwell":
        raw["quantization_config"] = {"quant_method": "w8a8", "recipe": job.recipe}
    return raw
