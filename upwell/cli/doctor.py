"""upwell doctor: what this machine and installation have, and what is missing for which device."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

import upwell
from upwell.bench.record import cpu_name
from upwell.devices import resolve_device
from upwell.errors import DeviceError
from upwell.ops import native

DEVICES = ("cpu", "cuda", "npu")
DOTS = {
    "bf16": "this CPU has dot products of BF16, faster than FP32's: use --dtype bfloat16",
    "int8": "this CPU has dot products of INT8, faster than BF16's: upwell convert SRC DST --to w8a8",
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="show versions, kernels, memory and usable devices")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    found = examine()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    memory = found["memory"]
    print(f"upwell   {found['upwell']}")
    print(f"python   {found['python']} on {found['system']}")
    print(f"torch    {found['torch']}")
    print(f"cpu      {found['cpu']}, {found['cores']} cores for this process, {found['threads']} threads used")
    print(f"kernels  {found['kernels']}")
    for kind in found["dots"]:
        print(f"         {DOTS[kind]}")
    if memory is not None:
        print(f"memory   {memory['available'] / 2**30:.1f} GiB available of {memory['total'] / 2**30:.1f}")
    for name, device in found["devices"].items():
        what = f"usable{device['detail']}" if device["usable"] else f"{device['missing']} ({device['remedy']})"
        print(f"{name:8s} {what}")


def examine() -> dict[str, Any]:
    """Versions, kernels, memory in bytes (None where the system doesn't say) and each device's state, JSON-ready."""
    lib = native.library()
    return {
        "upwell": upwell.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": native.describe(),
        "isa": None if lib is None else lib.upwell_isa().decode(),
        "dots": [kind for kind, has in (("bf16", native.bf16_dots()), ("int8", native.integer_dots())) if has],
        "memory": _memory(),
        "devices": {name: _device(name) for name in DEVICES},
    }


def _device(name: str) -> dict[str, Any]:
    try:
        resolve_device(name)
    except DeviceError as error:
        return {"usable": False, "missing": error.message, "remedy": error.remedy}
    if name == "cpu":
        return {"usable": True, "count": 1, "detail": ""}
    module = getattr(torch, name)
    count = module.device_count()
    return {"usable": True, "count": count, "detail": f": {count} x {module.get_device_name(0)}"}


def _memory() -> dict[str, int] | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return {"total": sizes["MemTotal"], "available": sizes["MemAvailable"]}
    except (OSError, KeyError, ValueError, IndexError):
        return None
