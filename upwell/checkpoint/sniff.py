"""Which kind of V4 checkpoint a directory holds, by name, from its config and headers alone.

V4's family moves: the kinds are told apart before anything is matched or converted, so that what can't be read is
refused by its name and not by the first tensor that doesn't fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upwell.checkpoint.match import DSPARK, V41
from upwell.checkpoint.names import is_hf_name
from upwell.checkpoint.recipes import INTEGER_TARGETS
from upwell.checkpoint.shards import Stored, read_shards
from upwell.errors import CheckpointError

DESCRIPTION = "quant_model_description.json"  # msmodelslim's and vllm-ascend's mark


@dataclass(frozen=True)
class CheckpointKind:
    """`name` for people; `format`: official (FP8, with FP4 or FP8 experts), w8a8, w4a8, w4a16 (Upwell's), dense, dspark
    (converted, not run); None: not read."""

    name: str
    format: str | None

    @property
    def readable(self) -> bool:
        return self.format is not None


def sniff(directory: Path) -> CheckpointKind:
    """The kind of a checkpoint directory. Raises CheckpointError where there is none or it is damaged."""
    if any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors")):
        return CheckpointKind("a GGUF file (llama.cpp)", None)
    if (directory / DESCRIPTION).is_file():
        types = sorted({t for t in _json(directory / DESCRIPTION).values() if str(t).startswith("W")})
        return CheckpointKind(f"quantized for vllm-ascend ({', '.join(map(str, types)) or 'float'})", None)
    return kind_of(_json(directory / "config.json"), read_shards(directory))


def kind_of(config: dict[str, Any], stored: dict[str, Stored]) -> CheckpointKind:
    """The kind by config.json and the tensors' names and dtypes."""
    names = list(stored)
    if str(config.get("model_type", "")).startswith("deepseek_v4") and config.get("model_type") != "deepseek_v4":
        return CheckpointKind(f"a later DeepSeek ({config['model_type']})", None)
    if any(V41.search(name) for name in names):
        return CheckpointKind("DeepSeek-V4.1 (Engram) or V4 Vision", None)
    if any(DSPARK.search(name) for name in names):
        return CheckpointKind("DeepSeek-V4 with DSpark drafting (Flash-0731, Pro-0813)", "dspark")
    method = (config.get("quantization_config") or {}).get("quant_method")
    dtypes = {tensor.dtype for tensor in stored.values()}
    if method in INTEGER_TARGETS:
        return CheckpointKind(f"DeepSeek-V4 in {method.upper()}, Upwell's layout", method)
    if method not in (None, "fp8"):
        return CheckpointKind(f"DeepSeek-V4 quantized by {method}", None)
    if any(is_hf_name(name) for name in names):
        return CheckpointKind("DeepSeek-V4 in transformers' names", "dense" if "F8_E4M3" not in dtypes else "official")
    if "F8_E4M3" in dtypes:
        experts = "FP4" if dtypes & {"I8", "U8"} else "FP8"
        return CheckpointKind(f"DeepSeek-V4, official FP8 with {experts} experts", "official")
    return CheckpointKind("DeepSeek-V4, dense", "dense")


def _json(file: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: can't be read as JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: isn't a JSON object")
    return loaded
