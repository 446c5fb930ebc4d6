"""Which device and dtype a name means, and whether it is usable here. torch_npu is imported only when asked for."""

from __future__ import annotations

import torch

from upwell.errors import DeviceError, InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """'auto', 'cpu', 'cuda[:i]' or 'npu[:i]' as a usable torch.device. Raises DeviceError with what is missing.

    'auto' takes an NPU that torch has loaded already, else CUDA, else the CPU.
    """
    if name == "auto":
        npu = getattr(torch, "npu", None)
        if npu is not None and npu.is_available():
            return torch.device("npu", 0)
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "npu") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise DeviceError(f"no device {name!r}", "devices: auto, cpu, cuda, cuda:0, npu, npu:0")
    if kind == "cpu":
        return torch.device("cpu")
    count = _cuda_count() if kind == "cuda" else _npu_count()
    if int(index or 0) >= count:
        raise DeviceError(f"device {name!r} isn't there: this machine has {count} of {kind}", "the first one is :0")
    return torch.device(kind, int(index or 0))


def resolve_dtype(name: str) -> torch.dtype | None:
    """'auto' (None: as the checkpoint has it), 'float32', 'bfloat16' or 'float16'. Raises InputError."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise InputError(f"no dtype {name!r}", f"dtypes: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _cuda_count() -> int:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        raise DeviceError(
            "device 'cuda' isn't usable here: " + ("no card answers" if built else "this torch is built without CUDA"),
            "use --device cpu, or install a CUDA build of torch",
        )
    return torch.cuda.device_count()


def _npu_count() -> int:
    try:
        import torch_npu  # noqa: F401  (registers torch.npu)
    except ImportError as error:
        # Two ways to fail: the package is absent, or it is there and CANN's libraries aren't.
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch_npu"
        why = "torch_npu isn't installed" if absent else f"torch_npu can't be loaded: {error}"
        fix = "pip install 'upwell[npu]'" if absent else "source CANN's set_env.sh first"
        raise DeviceError(f"device 'npu' isn't usable here: {why}", fix) from None
    npu = getattr(torch, "npu")  # noqa: B009  (torch_npu put it there; torch's types don't know it)
    if not npu.is_available():
        raise DeviceError("device 'npu' isn't usable here: the driver shows no NPU", "check with npu-smi info")
    return int(npu.device_count())
