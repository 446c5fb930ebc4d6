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
    if name in ("LLM", "SamplingParams", "load_model"):
        _import_torch()
        import upwell.checkpoint as checkpoint
        import upwell.engine as engine

        return getattr(checkpoint if name == "load_model" else engine, name)
    raise AttributeError(f"module 'upwell' has no attribute {name!r}")


def _import_torch() -> None:
    """torch imports an installed torch_npu by itself: where CANN is missing, that is said in one line."""
    try:
        import torch  # noqa: F401
    except RuntimeError as error:
        if "backend extension" not in str(error):
            raise
        from upwell.errors import DeviceError

        raise DeviceError(
            f"torch can't be imported: {str(error).splitlines()[0]}",
            "source CANN's set_env.sh, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to run without the NPU",
        ) from None
