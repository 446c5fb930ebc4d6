"""Upwell runs DeepSeek V4 on Huawei Ascend NPUs, on a CPU, and on CUDA cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__", "load_model"]

if TYPE_CHECKING:
    from upwell.checkpoint import load_model
    from upwell.engine import LLM, SamplingParams


def __getattr__(name: str) -> Any:
    # Imported on first use: `import upwell` (and every CLI start) shouldn't wait for torch.
    if name == "load_model":
        from upwell.checkpoint import load_model

        return load_model
    if name in ("LLM", "SamplingParams"):
        import upwell.engine as engine

        return getattr(engine, name)
    raise AttributeError(f"module 'upwell' has no attribute {name!r}")
