"""Checkpoints: safetensors shards to a model and back, in the official names and formats and in transformers'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["load_model", "save_checkpoint"]

if TYPE_CHECKING:
    from upwell.checkpoint.load import load_model
    from upwell.checkpoint.save import save_checkpoint


def __getattr__(name: str) -> Any:
    # Imported on first use: headers, names and `inspect` need no torch.
    if name == "load_model":
        from upwell.checkpoint.load import load_model

        return load_model
    if name == "save_checkpoint":
        from upwell.checkpoint.save import save_checkpoint

        return save_checkpoint
    raise AttributeError(f"module 'upwell.checkpoint' has no attribute {name!r}")
