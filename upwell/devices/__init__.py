"""Which device and dtype a name means, and whether it is usable here. torch_npu is imported only when asked for."""

from __future__ import annotations

import logging

import torch

from upwell.devices import npu
from upwell.errors import DeviceError, InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """'auto', 'cpu', 'cuda[:i]' or 'npu[:i]' as a usable torch.device. Raises DeviceError with what is missing.

    'auto' takes the first usable of npu, cuda, cpu. An installed torch_npu that can't be used is warned of, so that
    nobody computes on the CPU of an Ascend server without knowing it.
    """
    if name == "auto":
        return _best()
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "npu") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise DeviceError(f"no device {name!r}", "devices: auto, cpu, cuda, cuda:0, npu, npu:0")
    if kind == "cpu":
        return torch.device("cpu")
    count = _cuda_count() if kind == "cuda" else npu.count()
    if int(index or 0) >= count:
        raise DeviceError(f"device {name!r} isn't there: this machine has {count} of {kind}", "the first one is :0")
    return torch.device(kind, int(index or 0))


def resolve_dtype(name: str) -> torch.dtype | None:
    """'float32', 'bfloat16' or 'float16'; None of 'auto': FP32 on a CPU, else as the checkpoint has it. Raises
    InputError."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise InputError(f"no dtype {name!r}", f"dtypes: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_kv_cache_dtype(name: str) -> torch.dtype | None:
    """None of 'auto': the model's dtype; 'int8'. Raises InputError."""
    if name not in ("auto", "int8"):
        raise InputError(f"no KV cache dtype {name!r}", "KV cache dtypes: auto, int8")
    return torch.int8 if name == "int8" else None


def dtype_on(device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype asked for; where none was, FP32 on a CPU, which is what its kernels compute in (packed weights and
    large BF16 ones stay as they are), and None, the checkpoint's own, elsewhere."""
    return torch.float32 if dtype is None and device.type == "cpu" else dtype


def _best() -> torch.device:
    if getattr(torch, "npu", None) is not None or npu.installed_version() is not None:
        try:
            npu.load()
            return torch.device("npu", 0)
        except DeviceError as error:
            logger.warning("%s", error)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _cuda_count() -> int:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        raise DeviceError(
            "device 'cuda' isn't usable here: " + ("no card answers" if built else "this torch is built without CUDA"),
            "use --device cpu, or install a CUDA build of torch",
        )
    return torch.cuda.device_count()
