"""A checkpoint's tensors held against what its config implies, before anything is allocated. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from upwell.checkpoint.geometry import Slot, fp4_packed_shape, fp4_scale_shape, fp8_scale_shape, is_mtp, slots
from upwell.checkpoint.names import canonical_name, is_hf_name
from upwell.checkpoint.shards import Stored, read_shards
from upwell.config import ModelConfig
from upwell.errors import CheckpointError

_DENSE = ("F32", "BF16")
_FP4 = ("I8", "U8")
_SCALE = ("F8_E8M0", "U8")
INTEGER_SCALE = ("F32", "BF16")  # INT8's and INT4's
DSPARK = re.compile(r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\.")
V41 = re.compile(r"(^|[._])(engram|vision|visual)")

Weight = tuple[Stored, Stored | None]  # a tensor, and its scale where it is packed


@dataclass
class Plan:
    """Where each of the model's tensors comes from. An expert slot has one weight an expert, or the layer's stack."""

    config: ModelConfig
    drafter: tuple[Slot, ...] = ()  # DSpark's, after the config's own slots
    single: list[tuple[Slot, Weight]] = field(default_factory=list)
    experts: dict[str, dict[str, list[Weight]]] = field(default_factory=dict)  # `layers.0.ffn.experts` -> w1 -> [E]
    stacked: dict[str, tuple[Stored, Stored]] = field(default_factory=dict)  # `layers.0.ffn.experts` -> w13, w2


def plan_checkpoint(directory: Path) -> Plan:
    """Read config and headers of a checkpoint directory and match them. Reads no weights."""
    return match(read_config(directory), read_shards(directory), directory)


def read_config(directory: Path) -> ModelConfig:
    """The config of a checkpoint directory; CheckpointError if that isn't one, ConfigError if it isn't V4's."""
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such directory", "name a directory with config.json and *.safetensors")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: isn't a directory", "name the directory, not one of its files")
    if not any(directory.iterdir()):
        raise CheckpointError(f"{directory}: is empty", "download the checkpoint: config.json and *.safetensors")
    return ModelConfig.from_file(directory / "config.json")


def match(
    config: ModelConfig, stored: dict[str, Stored], directory: Path, drafter: tuple[Slot, ...] = ()
) -> Plan:  # fmt: skip
    """Find every tensor of `config` (and of a DSpark drafter) among `stored`, with the right shape and dtype, and
    nothing else.

    Raises CheckpointError naming file and tensor. transformers' checkpoints have no MTP; the plan's config says so.
    """
    by_name = _by_canonical_name(stored)
    if not drafter:
        _refuse_relatives(by_name)
    if any(is_hf_name(name) for name in stored):
        config = config.with_mtp(0)
        by_name = {name: tensor for name, tensor in by_name.items() if not is_mtp(name)}
    plan = Plan(config, drafter)
    for slot in (*slots(config), *drafter):
        if slot.kind == "expert":
            _match_experts(plan, slot, by_name, directory)
        else:
            plan.single.append((slot, _take(slot.name, slot, by_name, directory)))
    _check_stacks(plan)
    if by_name:
        stray = next(iter(by_name.values()))
        raise CheckpointError(
            f"{stray} isn't part of a V4 with this config.json ({len(by_name)} such tensors)",
            "check that config.json and the shards are of the same model",
        )
    return plan


def _by_canonical_name(stored: dict[str, Stored]) -> dict[str, Stored]:
    by_name: dict[str, Stored] = {}
    for name, tensor in stored.items():
        canonical = canonical_name(name)
        if canonical in by_name:
            raise CheckpointError(f"{tensor} is the same parameter as {by_name[canonical].name}")
        by_name[canonical] = tensor
    return by_name


def _refuse_relatives(by_name: dict[str, Stored]) -> None:
    """Releases that look like V4 and aren't: those with a DSpark drafter, and V4.1."""
    for name, tensor in by_name.items():
        if DSPARK.match(name) or (name.startswith("mtp.1.") and "mtp.0.enorm.weight" not in by_name):
            raise CheckpointError(
                f"{tensor} belongs to a DSpark drafter, as DeepSeek-V4-Flash-0731 has, not to V4's MTP",
                "use a release of DeepSeek-V4 with the MTP block mtp.0 (enorm, hnorm, e_proj, h_proj)",
            )
        if V41.search(name):
            raise CheckpointError(
                f"{tensor} belongs to a later architecture (V4.1's Engram, or vision)",
                "Upwell runs DeepSeek V4 checkpoints only",
            )


def _take(name: str, slot: Slot, by_name: dict[str, Stored], directory: Path) -> Weight:
    """Remove tensor `name` (and its scale) from `by_name`, checked against `slot`."""
    tensor = by_name.pop(name, None)
    if tensor is None:
        raise CheckpointError(
            f"{directory}: tensor {name} {list(slot.shape)} is missing",
            "check that config.json and the shards are of the same model",
        )
    if slot.kind in ("matrix", "expert") and tensor.dtype == "F8_E4M3":
        _check(tensor, slot.shape, ("F8_E4M3",))
        return tensor, _take_scale(name, fp8_scale_shape(slot.shape), by_name, directory)
    if slot.kind in ("matrix", "expert") and tensor.dtype == "I8" and tensor.shape == slot.shape:
        return tensor, _take_scale(name, slot.shape[:1], by_name, directory, ("F32",))
    if slot.kind in ("matrix", "expert") and _is_int4(name, tensor, by_name):
        _check(tensor, fp4_packed_shape(slot.shape), ("U8",))
        rows, cols = slot.shape
        groups = by_name[_scale_name(name)].shape[1:]
        by_group = len(groups) == 1 and groups[0] > 0 and cols % groups[0] == 0
        return tensor, _take_scale(name, (rows, *groups) if by_group else (rows,), by_name, directory, INTEGER_SCALE)
    if slot.kind == "expert" and tensor.dtype in _FP4:
        _check(tensor, fp4_packed_shape(slot.shape), _FP4)
        return tensor, _take_scale(name, fp4_scale_shape(slot.shape), by_name, directory)
    _check(tensor, slot.shape, ("I64",) if slot.kind == "table" else _DENSE)
    return tensor, None


def _is_int4(name: str, tensor: Stored, by_name: dict[str, Stored]) -> bool:
    """Two codes a byte as FP4, whose scales are bytes."""
    scale = by_name.get(_scale_name(name))
    return tensor.dtype == "U8" and scale is not None and scale.dtype in INTEGER_SCALE


def _scale_name(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "scale"


def _take_scale(
    weight_name: str, shape: tuple[int, ...], by_name: dict[str, Stored], directory: Path,
    dtypes: tuple[str, ...] = _SCALE,
) -> Stored:  # fmt: skip
    name = _scale_name(weight_name)
    scale = by_name.pop(name, None)
    if scale is None:
        raise CheckpointError(f"{directory}: tensor {name} is missing, the scale of a quantized weight")
    _check(scale, shape, dtypes)
    return scale


def _check(tensor: Stored, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"{tensor} is of dtype {tensor.dtype}, expected {' or '.join(dtypes)}")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor} has shape {list(tensor.shape)}, config.json implies {list(shape)}",
            "check that config.json and the shards are of the same model",
        )


def _match_experts(plan: Plan, slot: Slot, by_name: dict[str, Stored], directory: Path) -> None:
    layer, _, leaf = slot.name.partition(".{}.")
    if f"{layer}.w13" in by_name or layer in plan.stacked:
        if layer not in plan.stacked:
            w13, w2 = by_name.pop(f"{layer}.w13"), by_name.pop(f"{layer}.w2", None)
            if w2 is None:
                raise CheckpointError(f"{directory}: the stack w2 of {layer} is missing, {w13.name} is there")
            plan.stacked[layer] = (w13, w2)
        return
    weights = [_take(slot.name.format(e), slot, by_name, directory) for e in range(slot.count)]
    plan.experts.setdefault(layer, {})[leaf.removesuffix(".weight")] = weights
    first = weights[0][0]
    for tensor, scale in weights:
        if tensor.dtype != first.dtype:
            raise CheckpointError(f"{tensor} is of dtype {tensor.dtype}, expert 0 is of {first.dtype}")
        if scale is not None and weights[0][1] is not None and scale.shape != weights[0][1].shape:
            raise CheckpointError(f"{scale} has shape {list(scale.shape)}, expert 0's {list(weights[0][1].shape)}")


def _check_stacks(plan: Plan) -> None:
    config = plan.config
    experts, inter, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    for w13, w2 in plan.stacked.values():
        _check(w13, (experts, 2 * inter, hidden), _DENSE)
        _check(w2, (experts, hidden, inter), _DENSE)
    for parts in plan.experts.values():
        tensors = [parts[leaf][0][0] for leaf in ("w1", "w2", "w3")]
        for tensor in tensors[1:]:
            if tensor.dtype != tensors[0].dtype:
                raise CheckpointError(f"{tensor} is of dtype {tensor.dtype}, w1 is of {tensors[0].dtype}")
