"""safetensors on disk: which tensors a directory holds, where their bytes are, and whether the files are whole.

Only headers are read, without torch, so a damaged checkpoint is refused in milliseconds. The layout: 8 bytes
little-endian header length, a JSON header (name -> dtype, shape, data_offsets), then the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from upwell.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes are file[start:end]."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"


def read_shards(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory by its name there. Raises CheckpointError, naming file and tensor."""
    index = directory / INDEX_NAME
    if not index.exists():
        return read_header(_lone_file(directory))
    weight_map = _weight_map(index)
    stored: dict[str, Stored] = {}
    for file_name in sorted(set(weight_map.values())):
        file = directory / file_name
        if not file.is_file():
            raise CheckpointError(
                f"{file}: shard is missing, {INDEX_NAME} names it", "download the checkpoint again, all its shards"
            )
        for name, tensor in read_header(file).items():
            if name in stored:
                raise CheckpointError(f"{tensor} is in {stored[name].file.name} too")
            stored[name] = tensor
    for name, file_name in weight_map.items():
        if name not in stored or stored[name].file.name != Path(file_name).name:
            raise CheckpointError(f"{directory / file_name}: tensor {name} is missing, {INDEX_NAME} names it there")
    return stored


def _lone_file(directory: Path) -> Path:
    single = directory / SINGLE_NAME
    if single.is_file():
        return single
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{directory}: has {others[0]} but neither {INDEX_NAME} nor {SINGLE_NAME}",
            "copy the index of the checkpoint too",
        )
    raise CheckpointError(
        f"{directory}: holds no checkpoint: neither {INDEX_NAME} nor {SINGLE_NAME}",
        "name the directory with config.json and the *.safetensors files",
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{index}: can't be read as JSON: {error}") from None
    except (KeyError, TypeError):
        raise CheckpointError(f"{index}: has no weight_map") from None
    good = isinstance(weight_map, dict) and all(isinstance(f, str) and Path(f).name == f for f in weight_map.values())
    if not good or not weight_map:
        raise CheckpointError(f"{index}: weight_map doesn't map tensors to file names of its directory")
    return {str(name): str(file) for name, file in weight_map.items()}


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises CheckpointError if it is cut off or isn't one."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or size < 8 + min(length, _MAX_HEADER):
                raise CheckpointError(f"{file}: truncated: {size:,} bytes, its header alone needs {8 + length:,}")
            if length > _MAX_HEADER:
                raise CheckpointError(f"{file}: isn't a safetensors file")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise CheckpointError(f"{file}: isn't a safetensors file: its header isn't JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: isn't a safetensors file: its header isn't a JSON object")
    header.pop("__metadata__", None)
    base = 8 + length
    stored = {name: _entry(file, name, raw, base) for name, raw in header.items()}
    for tensor in sorted(stored.values(), key=lambda t: t.end):
        if tensor.end > size:
            raise CheckpointError(
                f"{tensor} is cut off: it ends at byte {tensor.end:,}, the file at {size:,}",
                "download this shard again",
            )
    return stored


def _entry(file: Path, name: str, raw: Any, base: int) -> Stored:
    try:
        start, end = (int(n) for n in raw["data_offsets"])
        shape = tuple(int(n) for n in raw["shape"])
        dtype = str(raw["dtype"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: tensor {name} has a damaged header entry") from None
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{file}: tensor {name} is of the unknown dtype {dtype}")
    if start < 0 or any(n < 0 for n in shape) or end - start != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: tensor {name} has {end - start:,} bytes, but {dtype} {list(shape)} takes "
            f"{prod(shape) * ITEM_BYTES[dtype]:,}"
        )
    return Stored(file, name, dtype, shape, base + start, base + end)


def bytes_by_dtype(tensors: Iterable[Stored]) -> dict[str, int]:
    total: dict[str, int] = {}
    for tensor in tensors:
        total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.nbytes
    return total
