"""What a checkpoint or a preset is: layers, parameters, bytes of weights and cache. Arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upwell.checkpoint.geometry import Slot, is_mtp, slots
from upwell.checkpoint.match import match, read_config
from upwell.checkpoint.shards import INDEX_NAME, bytes_by_dtype, read_shards
from upwell.config import PRESETS, ModelConfig
from upwell.errors import CheckpointError

LENGTHS = {"4k": 4096, "128k": 131072, "1M": 1048576}
CACHE_ITEM_BYTES = 2  # BF16
_STATE_ITEM_BYTES = 4  # compressor states are FP32


def inspect_target(target: str) -> dict[str, Any]:
    """Facts of a preset's name, or of a checkpoint directory, as JSON-ready values; all sizes in bytes.

    A directory with config.json alone is described too; one with shards is checked as loading would check it.
    Raises ConfigError or CheckpointError. Reads headers only.
    """
    if target in PRESETS:
        return {"target": target} | describe(ModelConfig.preset(target))
    directory = Path(target)
    if not directory.exists():
        raise CheckpointError(
            f"{target}: no such directory, and no preset", f"presets: {', '.join(PRESETS)}"
        )
    config = read_config(directory)
    if not any(directory.glob("*.safetensors")) and not (directory / INDEX_NAME).exists():
        return {"target": target} | describe(config)
    stored = read_shards(directory)
    config = match(config, stored, directory).config
    facts = {"target": target} | describe(config)
    facts["weight_bytes"]["stored"] = sum(t.nbytes for t in stored.values())
    facts["stored_bytes_by_dtype"] = bytes_by_dtype(stored.values())
    return facts


def describe(config: ModelConfig) -> dict[str, Any]:
    """The facts that a config alone implies."""
    everything = list(slots(config))
    main = [slot for slot in everything if not is_mtp(slot.name)]
    embedding = config.vocab_size * config.hidden_size
    active, active_with_mtp = _active(main, config), _active(everything, config)
    ratios = config.compress_ratios
    return {
        "layers": {
            "total": config.num_hidden_layers,
            "sliding": ratios.count(0),
            "csa": ratios.count(config.csa_ratio),
            "hca": ratios.count(config.hca_ratio),
            "hash_routed": min(config.num_hash_layers, config.num_hidden_layers),
            "mtp": config.num_nextn_predict_layers,
            "ratios": list(ratios),
        },
        "geometry": {
            name: getattr(config, name)
            for name in ("hidden_size", "vocab_size", "num_attention_heads", "head_dim", "n_routed_experts",
                         "num_experts_per_tok", "moe_intermediate_size", "sliding_window", "index_topk",
                         "hc_mult", "max_position_embeddings")
        },
        "parameters": {
            "total": _parameters(main),
            "experts": _parameters(slot for slot in main if slot.kind == "expert"),
            "active": active,
            "active_without_embedding": active - embedding,
            "total_with_mtp": _parameters(everything),
            "active_with_mtp": active_with_mtp,
            "active_with_mtp_without_embedding": active_with_mtp - embedding,
        },
        "weight_bytes": {
            "official": sum(slot.official_bytes for slot in everything),
            "official_without_mtp": sum(slot.official_bytes for slot in main),
            "bf16": sum(slot.bf16_bytes for slot in everything),
            "bf16_without_mtp": sum(slot.bf16_bytes for slot in main),
        },
        "cache": {
            "dtype": "bf16",
            "elements_per_token": _growth(config),
            "bytes_per_token": _growth(config) * CACHE_ITEM_BYTES,
            "sequences": {name: cache_bytes(config, tokens) for name, tokens in LENGTHS.items()},
        },
    }  # fmt: skip


def cache_bytes(config: ModelConfig, tokens: int) -> dict[str, int | float]:
    """Bytes one sequence of `tokens` takes in upwell.model.cache.KVCache with BF16, by part.

    `total` is windows, entries and indexer keys, as the paper counts; the compressors' FP32 states and the MTP
    blocks' windows, of fixed size, are listed beside it.
    """
    ratios = config.compress_ratios
    csa, hca = ratios.count(config.csa_ratio), ratios.count(config.hca_ratio)
    csa_entries, hca_entries = tokens // config.csa_ratio, tokens // config.hca_ratio
    window = config.sliding_window * config.head_dim * CACHE_ITEM_BYTES
    windows = len(ratios) * window
    entries = (csa * csa_entries + hca * hca_entries) * config.head_dim * CACHE_ITEM_BYTES
    keys = csa * csa_entries * config.index_head_dim * CACHE_ITEM_BYTES
    # kv and gate of the open window; in CSA of the window before too, twice as wide (halves a and b).
    csa_state = 2 * 2 * config.csa_ratio * 2 * (config.head_dim + config.index_head_dim)
    hca_state = 2 * config.hca_ratio * config.head_dim
    total = windows + entries + keys
    return {
        "tokens": tokens,
        "total": total,
        "bytes_per_token": round(total / tokens, 2),
        "windows": windows,
        "entries": entries,
        "index_keys": keys,
        "compressor_states": (csa * csa_state + hca * hca_state) * _STATE_ITEM_BYTES,
        "mtp_windows": config.num_nextn_predict_layers * window,
    }


def _growth(config: ModelConfig) -> int | float:
    """Cached elements that one more token adds, over all layers (on average: entries come one a window)."""
    block = config.csa_ratio * config.hca_ratio
    csa = config.compress_ratios.count(config.csa_ratio) * (config.head_dim + config.index_head_dim) * config.hca_ratio
    hca = config.compress_ratios.count(config.hca_ratio) * config.head_dim * config.csa_ratio
    growth = (csa + hca) / block
    return int(growth) if growth.is_integer() else growth


def _parameters(selected: Iterable[Slot]) -> int:
    """Trained numbers: routing tables are not."""
    return sum(slot.numel for slot in selected if slot.kind != "table")


def _active(selected: list[Slot], config: ModelConfig) -> int:
    """Parameters that one token uses: all but the routed experts it isn't sent to."""
    experts = _parameters(slot for slot in selected if slot.kind == "expert")
    return _parameters(selected) - experts + experts // config.n_routed_experts * config.num_experts_per_tok
