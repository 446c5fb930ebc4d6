"""Ascend: is an NPU usable, what is missing if not, what its chip computes. torch_npu is imported by load() alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Literal

import torch

from upwell.errors import DeviceError

Family = Literal["a2", "a3", "950", "310p", "unknown"]

# Ascend/pytorch's COMPATIBILITY.md (2026-08): torch -> torch_npu -> CANN. No public table names a CANN for 2.13.
CANN_BY_TORCH_NPU = {
    "2.10.0": {"2.10.0": "9.0.0", "2.10.0.post4": "9.1.0"},
    "2.11.0": {"2.11.0": "9.1.0"},
    "2.12.0": {"2.12.0": "9.1.0"},
}
ADVISED = "torch 2.12.0 with torch_npu 2.12.0 and CANN 9.1.0"
INSTALL = f"pip install 'upwell[npu]'; {ADVISED} go together"


@dataclass(frozen=True)
class Chip:
    """What one SoC computes. `soc` is the driver's name; fp8 covers FP8 and FP4 arithmetic and casts."""

    soc: str
    family: Family
    bf16: bool
    fp8: bool


def chip(soc: str) -> Chip:
    """The chip of a SoC name such as Ascend910B1 (A2), Ascend910_9382 (A3) or Ascend950PR_9599.

    FP8 and FP4 came with the 950 (asc-devkit's guide to it lists them as new against 910B and 910C).
    """
    patterns: tuple[tuple[str, Family], ...] = (
        (r"Ascend910B", "a2"), (r"Ascend910_93", "a3"), (r"Ascend950", "950"), (r"Ascend310P", "310p")
    )  # fmt: skip
    family: Family = next((family for pattern, family in patterns if re.match(pattern, soc)), "unknown")
    return Chip(soc, family, bf16=family in ("a2", "a3", "950"), fp8=family == "950")


def installed_version() -> str | None:
    """torch_npu's version by its package's metadata, without importing it; None where it isn't installed."""
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None


def load() -> Any:
    """Import torch_npu and return torch.npu, with at least one NPU. Raises DeviceError: one line with what is missing.

    A torch.npu that is there already (torch loads torch_npu by itself unless told not to) is taken as it is.
    """
    if getattr(torch, "npu", None) is None:
        _import_torch_npu()
    npu = getattr(torch, "npu")  # noqa: B009  (torch_npu put it there; torch's types don't know it)
    if not npu.is_available():
        raise DeviceError(
            f"device 'npu' isn't usable here: torch_npu {installed_version() or ''} is loaded, but the driver "
            "shows no NPU",
            "check npu-smi info, and that the container has /dev/davinci* and the driver's folders",
        )
    return npu


def count() -> int:
    """How many NPUs there are. Raises DeviceError as load() does."""
    return int(load().device_count())


def chip_of(device: torch.device) -> Chip:
    """The chip of an NPU device, by the name its driver gives."""
    return chip(str(load().get_device_name(device.index or 0)))


def _import_torch_npu() -> None:
    version, torch_version = installed_version(), str(torch.__version__).split("+")[0]
    if version is not None and _release(version) != torch_version:
        fitting = " or ".join(CANN_BY_TORCH_NPU.get(torch_version, ())) or "no documented version"
        raise DeviceError(
            f"device 'npu' isn't usable here: torch_npu {version} was built for torch {_release(version)}, "
            f"and this is torch {torch_version}",
            f"torch {torch_version} goes with torch_npu {fitting}; {INSTALL}",
        )
    try:
        import_module("torch_npu")
    except ModuleNotFoundError as error:
        if error.name != "torch_npu":
            raise DeviceError(f"device 'npu' isn't usable here: torch_npu needs {error.name}", INSTALL) from None
        raise DeviceError("device 'npu' isn't usable here: torch_npu isn't installed", INSTALL) from None
    except (ImportError, OSError, RuntimeError) as error:
        # Without CANN's libraries in the loader's path it fails on the first of them, libhccl.so.
        wanted = CANN_BY_TORCH_NPU.get(torch_version, {}).get(version or "", "9.1.0")
        first = str(error).strip().splitlines()[0]
        raise DeviceError(
            f"device 'npu' isn't usable here: torch_npu {version or ''} can't be loaded: {first}",
            f"CANN {wanted} goes with it: install it and source its set_env.sh",
        ) from None


def _release(version: str) -> str:
    """'2.12.0.post3' -> '2.12.0'."""
    return ".".join(version.split("+")[0].split(".")[:3])
