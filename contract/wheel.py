"""Reads the schemas of torch_npu's own operators out of a wheel, without installing or loading anything of it.

    python -m contract.wheel FACTS WHEEL...     writes those that upwell calls into npu_operators.json

A schema is registered from a string, so it lies in libtorch_npu.so as text.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path

from contract.facts import compact

LIBRARY = "torch_npu/lib/libtorch_npu.so"
SCHEMA = re.compile(rb"(npu_\w+(?:\.\w+)?)\(([^\0]*?)\) -> ([^\0]*)\0")


def schemas(wheel: Path) -> dict[str, str]:
    """Every schema of the wheel's npu_* operators by name."""
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(LIBRARY)
    return {m.group(1).decode(): m.group().rstrip(b"\0").decode() for m in SCHEMA.finditer(data)}


def version(wheel: Path) -> str:
    """torch_npu-2.12.0-cp311-....whl -> 2.12.0"""
    return wheel.name.split("-")[1]


def write(facts: Path, wheels: list[Path]) -> None:
    from upwell.ops.npu import PRODUCTS

    known = json.loads(facts.read_text(encoding="utf-8"))
    by_version = {version(wheel): schemas(wheel) for wheel in sorted(wheels)}
    known["npu"] = {v: {name: known_by[name] for name in sorted(PRODUCTS)} for v, known_by in by_version.items()}
    facts.write_text(compact(known), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts", type=Path)
    parser.add_argument("wheels", type=Path, nargs="+")
    arguments = parser.parse_args()
    write(arguments.facts, arguments.wheels)
