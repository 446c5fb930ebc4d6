"""A Transformer becomes a checkpoint directory, in the official names and formats or in transformers'.

Weights are encoded and written one at a time, so the peak is one tensor, not the model. Every file is written under
a temporary name and renamed when all are complete, the index last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from upwell.checkpoint.geometry import Slot, fp4_packed_shape, fp4_scale_shape, fp8_scale_shape, is_mtp, slots
from upwell.checkpoint.names import from_official, hf_name
from upwell.checkpoint.shards import INDEX_NAME, ITEM_BYTES, SINGLE_NAME
from upwell.config import ModelConfig
from upwell.errors import CheckpointError, InputError
from upwell.formats.fp4 import GROUP, quantize_fp4
from upwell.formats.fp8 import quantize_fp8
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.ops.linear import dense_weight

Format = Literal["official", "transformers"]

_FLOAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_SHARD_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save_checkpoint(
    model: Transformer,
    path: str | os.PathLike[str],
    format: Format = "official",
    quantize: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and safetensors shards (with an index where there are several) to directory `path`.

    official, quantize: FP8 matrices and FP4 experts as in DeepSeek's releases, BF16 and FP32 for the rest; weights
    that are packed in `model` are written as they are. Without `quantize`: everything decoded, in the model's dtype.
    transformers: its names, always decoded, without the MTP blocks, which it doesn't have.
    Raises CheckpointError if a dimension doesn't fit the formats, before anything is written.
    """
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: isn't a directory", "name a directory to write to")
    config = model.config
    if format == "official":
        pieces = list(_official_pieces(model, quantize))
        has_fp4 = any(name.endswith(".w1.weight") and dtype == "I8" for p in pieces for name, dtype, _ in p.tensors)
        config = replace(
            config, quant_method="fp8" if quantize else None, expert_dtype="fp4" if quantize and has_fp4 else None
        )
        raw_config = config.to_official() | {"torch_dtype": str(torch.bfloat16 if quantize else model.dtype)[6:]}
    else:
        pieces = list(_hf_pieces(model))
        raw_config = hf_config(config) | {"dtype": str(model.dtype)[6:]}
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory, raw_config, split_shards(pieces, max_shard_bytes))


Specs = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, safetensors dtype and shape of each tensor."""


class Digest(Protocol):
    """A hashlib object."""

    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together (a packed weight and its scale): name, dtype and shape, and how to make them.
    `format`: what a conversion made of a weight, by name; None where nothing was quantized."""

    tensors: Specs
    make: Callable[[], tuple[Tensor, ...]]
    format: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in self.tensors)


def _official_pieces(model: Transformer, quantize: bool) -> Iterator[Piece]:
    for slot in slots(model.config):
        if slot.kind == "expert":
            for e in range(slot.count):
                yield _weight_piece(slot, slot.name.format(e), _expert_weight(model, slot, e), model.dtype, quantize)
        elif slot.kind == "matrix":
            module = model.get_submodule(slot.name.removesuffix(".weight"))
            assert isinstance(module, Linear)
            yield _weight_piece(slot, slot.name, (module.weight, module.scale), model.dtype, quantize)
        else:
            yield _dense_piece(slot, slot.name, model, torch.bfloat16 if quantize else model.dtype)


def _dense_piece(slot: Slot, name: str, model: Transformer, dtype: torch.dtype) -> Piece:
    tensor = _tensor(model, slot)
    if slot.kind == "table":
        return Piece(((name, "I64", slot.shape),), lambda: (tensor,))
    wanted = torch.float32 if slot.kind == "float" else dtype
    return Piece(((name, _FLOAT_NAMES[wanted], slot.shape),), lambda: (tensor.to(wanted),))


def _weight_piece(
    slot: Slot, name: str, source: tuple[Tensor, Tensor | None], dtype: torch.dtype, quantize: bool
) -> Piece:
    """A matrix or one expert's weight: as packed, packed now, or decoded."""
    weight, scale = source
    if not quantize:
        return Piece(((name, _FLOAT_NAMES[dtype], slot.shape),), lambda: (dense_weight(weight, scale, dtype),))
    scale_name = name.removesuffix("weight") + "scale"
    packed_so = scale is not None and not scale.is_floating_point()  # INT8 and INT4 aren't official: encode anew
    if weight.dtype == torch.float8_e4m3fn or (not packed_so and slot.kind == "matrix"):
        specs = ((name, "F8_E4M3", slot.shape), (scale_name, "F8_E8M0", fp8_scale_shape(slot.shape)))
        encode = quantize_fp8
    else:
        if slot.shape[-1] % GROUP:
            raise CheckpointError(
                f"{name}: {slot.shape[-1]} columns aren't a multiple of FP4's group of {GROUP}",
                "save with quantize=False",
            )
        packed, scales = fp4_packed_shape(slot.shape), fp4_scale_shape(slot.shape)
        specs = ((name, "I8", packed), (scale_name, "F8_E8M0", scales))
        encode = quantize_fp4
    if packed_so:
        assert scale is not None
        kept = (weight, scale)
        return Piece(specs, lambda: kept)
    return Piece(specs, lambda: encode(dense_weight(weight.detach(), scale, torch.float32)))


def _hf_pieces(model: Transformer) -> Iterator[Piece]:
    dtype = model.dtype
    for slot in slots(model.config):
        if is_mtp(slot.name):
            continue
        if slot.kind == "matrix":
            module = model.get_submodule(slot.name.removesuffix(".weight"))
            assert isinstance(module, Linear)
            yield _weight_piece(slot, hf_name(slot.name), (module.weight, module.scale), dtype, False)
        elif slot.kind != "expert":
            yield _dense_piece(slot, hf_name(slot.name), model, dtype)
        elif slot.name.endswith(".w1.weight"):
            yield from _hf_expert_pieces(model, slot)


def _hf_expert_pieces(model: Transformer, w1: Slot) -> Iterator[Piece]:
    """The stacks of one layer: gate_up_proj [E, 2I, D] and down_proj [E, D, I]."""
    layer = w1.name.partition(".{}.")[0]
    dtype, inter, hidden = model.dtype, *w1.shape

    def stack(*leaves: str) -> tuple[Tensor]:
        parts = [replace(w1, name=f"{layer}.{{}}.{leaf}.weight") for leaf in leaves]
        rows = [
            torch.cat([dense_weight(*_expert_weight(model, part, e), dtype) for part in parts])
            for e in range(w1.count)
        ]
        return (torch.stack(rows),)

    name = _FLOAT_NAMES[dtype]
    yield Piece(((hf_name(f"{layer}.w13"), name, (w1.count, 2 * inter, hidden)),), lambda: stack("w1", "w3"))
    yield Piece(((hf_name(f"{layer}.w2"), name, (w1.count, hidden, inter)),), lambda: stack("w2"))


def _expert_weight(model: Transformer, slot: Slot, expert: int) -> tuple[Tensor, Tensor | None]:
    layer, _, leaf = slot.name.removesuffix(".weight").partition(".{}.")
    module = model.get_submodule(layer)
    assert isinstance(module, Experts)
    if module.packed is not None:
        return module.packed[expert][leaf]
    inter = module.w13.shape[1] // 2
    rows = {"w1": slice(0, inter), "w3": slice(inter, 2 * inter), "w2": slice(None)}[leaf]
    stack, scales = (module.w2, module.w2_scale) if leaf == "w2" else (module.w13, module.w13_scale)
    return stack[expert, rows], None if scales is None else scales[expert, rows]


def _tensor(model: Transformer, slot: Slot) -> Tensor:
    path, _, leaf = from_official(slot.name).rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, (Tensor, nn.Parameter))
    return tensor


def split_shards(pieces: list[Piece], max_bytes: int) -> list[list[Piece]]:
    """Split in order, each shard at most `max_bytes` unless one piece alone is larger."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def split_evenly(pieces: list[Piece], count: int) -> list[list[Piece]]:
    """Split in order into `count` shards of about equal size. InputError where there are fewer pieces."""
    if count > len(pieces):
        raise InputError(f"--shards is {count}, the checkpoint has {len(pieces)} parts", "ask for fewer")
    total = sum(piece.nbytes for piece in pieces)
    shards: list[list[Piece]] = [[]]
    size = 0
    for i, piece in enumerate(pieces):
        missing = count - len(shards)
        full = size + piece.nbytes / 2 > total * len(shards) / count
        if shards[-1] and missing and (full or len(pieces) - i == missing):
            shards.append([])
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _write(directory: Path, raw_config: dict[str, Any], shards: list[list[Piece]]) -> None:
    count = len(shards)
    names = [SINGLE_NAME] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    documents = {"config.json": raw_config}
    if count > 1:
        total = sum(piece.nbytes for shard in shards for piece in shard)
        weight_map = {n: f for f, shard in zip(names, shards, strict=True) for p in shard for n, _, _ in p.tensors}
        documents[INDEX_NAME] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    written: list[str] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            written.append(name)
            write_shard(_temporary(directory, name), shard)
        for name, document in documents.items():
            written.append(name)
            _temporary(directory, name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        for name in written:
            os.replace(_temporary(directory, name), directory / name)
    finally:
        for name in written:
            _temporary(directory, name).unlink(missing_ok=True)
    for old in directory.iterdir():  # what an earlier checkpoint in this place had and this one hasn't
        if old.name not in written and (old.name == INDEX_NAME or _SHARD_FILE.fullmatch(old.name)):
            old.unlink()


def _temporary(directory: Path, name: str) -> Path:
    return directory / f".{name}.{os.getpid()}.tmp"


def write_shard(
    file: Path, pieces: list[Piece], digest: Digest | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Write one safetensors file, synced. `digest` takes all its bytes; `progress` the data bytes written so far."""
    # Wide items first: every tensor then starts at a multiple of its item, and can be mapped without a copy.
    pieces = sorted(pieces, key=lambda p: -max(ITEM_BYTES[dtype] for _, dtype, _ in p.tensors))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        for name, dtype, shape in piece.tensors:
            end = at + prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        head = len(text).to_bytes(8, "little") + text
        stream.write(head)
        if digest is not None:
            digest.update(head)
        at = 0
        for piece, tensors in zip(pieces, _made_ahead(pieces), strict=True):
            for (name, dtype, shape), tensor in zip(piece.tensors, tensors, strict=True):
                if tensor.nbytes != prod(shape) * ITEM_BYTES[dtype]:
                    raise AssertionError(f"{name} became {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
                raw = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
                stream.write(raw.numpy().data)
                if digest is not None:
                    digest.update(raw.numpy().data)
                at += raw.numel()
            if progress is not None:
                progress(at)
        stream.flush()
        os.fsync(stream.fileno())


def _made_ahead(pieces: list[Piece]) -> Iterator[tuple[Tensor, ...]]:
    """What each piece makes, the next one while this one is being written."""
    threads = torch.get_num_threads()  # a new thread has as many as there are processors
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as maker:
        following = maker.submit(pieces[0].make)
        for piece in pieces[1:]:
            tensors = following.result()
            following = maker.submit(piece.make)
            yield tensors
        yield following.result()


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json in transformers' spelling; `ModelConfig.from_dict` reads it back (without MTP and quantization)."""
    kinds = {
        0: "sliding_attention",
        config.csa_ratio: "compressed_sparse_attention",
        config.hca_ratio: "heavily_compressed_attention",
    }
    raw = replace(config, quant_method=None, expert_dtype=None, num_nextn_predict_layers=0).to_official()
    for key in ("compress_ratios", "num_hash_layers", "rope_scaling", "compress_rate_csa", "compress_rate_hca"):
        raw.pop(key, None)
    raw["layer_types"] = [kinds[ratio] for ratio in config.compress_ratios]
    raw["mlp_layer_types"] = ["hash_moe" if config.is_hash_layer(i) else "moe" for i in range(config.num_hidden_layers)]
    raw["compress_rates"] = {kinds[config.csa_ratio]: config.csa_ratio, kinds[config.hca_ratio]: config.hca_ratio}
    factor = _rotary_factor(config.qk_rope_head_dim, config.head_dim)
    raw["partial_rotary_factor"] = factor
    main: dict[str, Any] = {
        "rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": factor,
    }  # fmt: skip
    compress = main | {"rope_theta": config.compress_rope_theta}
    if config.yarn is not None:
        yarn = config.yarn
        # attention_factor: V4 doesn't scale cos and sin, transformers' YaRN would.
        compress |= {
            "rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
            "original_max_position_embeddings": yarn.original_max_position_embeddings, "attention_factor": 1.0,
        }  # fmt: skip
    raw["rope_parameters"] = {"main": main, "compress": compress}
    return raw


def _rotary_factor(rope_dim: int, head_dim: int) -> float:
    """transformers recovers the dim as int(head_dim * factor), which must not fall one short by rounding."""
    factor = rope_dim / head_dim
    return factor if int(head_dim * factor) == rope_dim else (rope_dim + 0.5) / head_dim
