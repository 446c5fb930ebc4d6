"""Writes upwell/devices/npu_operators.json: what the torch_npu wheel registers, and what Ascend's pages document.

    python -m contract.facts OUT [--docs FOLDER]

Run where torch_npu can be imported (contract/stubs.py, or CANN itself). For each ATen overload the dispatcher says
whether the NPU has a kernel of its own, composes it of others, or falls back to the CPU. FOLDER is
docs/zh/api/native_api/pytorch_2-13-0 of github.com/Ascend/pytorch: per function the dtypes and products it names.
Without --docs the documented part of an existing OUT is kept.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "uint8": "uint8", "int8": "int8",
    "int16": "int16", "int32": "int32", "int64": "int64", "bool": "bool", "complex64": "complex64",
    "complex128": "complex128",
}  # fmt: skip
PRODUCTS = {"Atlas A2": "a2", "Atlas A3": "a3", "Ascend 950": "950"}
STATUSES = ("kernel", "composite_implicit", "composite_explicit", "cpu_fallback")


def aten_status(name: str) -> str:
    """How torch_npu serves an ATen overload, by the dispatcher of this process."""
    import torch

    def has(key: str) -> bool:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))

    if has("PrivateUse1"):
        return "kernel"
    if has("CompositeImplicitAutograd"):
        return "composite_implicit"
    if has("CompositeExplicitAutograd") or has("CompositeExplicitAutogradNonFunctional"):
        return "composite_explicit"
    return "cpu_fallback"  # torch_npu registers a fallback for the whole key: the tensors go to the host and back


def registered() -> dict[str, str]:
    """Every aten:: overload's status, sorted into one list of short names a status."""
    import torch
    import torch_npu  # noqa: F401  (registers its kernels)

    by_status: dict[str, list[str]] = {status: [] for status in STATUSES}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("aten::"):
            by_status[aten_status(name)].append(name.removeprefix("aten::"))
    return {status: " ".join(names) for status, names in by_status.items()}


def documented(folder: Path) -> dict[str, Any]:
    """By function name (torch.topk, Tensor.topk and nn.functional's alike are 'topk'): dtypes, products, limits."""
    found: dict[str, Any] = {}
    for page in sorted(folder.glob("torch*.md")):
        for part in re.split(r"^(?=#{2,4} |> <font)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            entry = _entry(part)
            if entry is not None:
                name, facts = entry
                found[name] = _joined(found[name], facts) if name in found else facts
    return dict(sorted(found.items()))


def _entry(part: str) -> tuple[str, dict[str, Any]] | None:
    heading = part.split("\n", 1)[0]
    title = re.sub(r"<[^>]*>|[#>`*]|\(.*", "", heading).strip()
    name = title.split()[-1].split(".")[-1].rstrip("_") if title else ""
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or "支持情况" not in part:
        return None
    rows = re.findall(r"^\|([^|]*)\|\s*([✔✘])", part, re.MULTILINE)
    products = [key for row, mark in rows for text, key in PRODUCTS.items() if text in row and mark == "✔"]
    limits = re.search(r"`?input`?仅支持([a-z0-9，,、 ]+)", part)
    words = re.split(r"[，,、 ]+", limits.group(1)) if limits else []
    return name, {"dtypes": [DTYPES[w] for w in words if w in DTYPES], "products": products}


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """torch.x and Tensor.x: a dtype that either names, a product that both name."""
    return {
        "dtypes": sorted({*one["dtypes"], *other["dtypes"]}),
        "products": sorted({*one["products"]} & {*other["products"]}),
    }


def _of_aten(pages: dict[str, Any], aten: dict[str, str]) -> dict[str, Any]:
    """Those pages whose function has the name of an ATen operator."""
    bases = {name.split(".")[0].strip("_") for names in aten.values() for name in names.split()}
    return {name: page for name, page in pages.items() if name in bases}


def write(out: Path, docs: Path | None) -> None:
    import torch
    import torch_npu

    aten = registered()
    old = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    facts = {
        "source": {
            "made_by": "contract/facts.py",
            "registered": f"dispatcher of torch {torch.__version__} with the wheel torch_npu {torch_npu.__version__}",
            "documented": "github.com/Ascend/pytorch, docs/zh/api/native_api/pytorch_2-13-0, 2026-08-21",
        },
        "aten": aten,
        "documented": _of_aten(documented(docs), aten) if docs else old.get("documented", {}),
        "npu": old.get("npu", {}),  # contract/wheel.py's part
    }
    out.write_text(compact(facts), encoding="utf-8")


def compact(facts: dict[str, Any]) -> str:
    """JSON with a line for each entry of each part, so that a diff between versions can be read."""
    parts = []
    for part, entries in facts.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--docs", type=Path)
    arguments = parser.parse_args()
    write(arguments.out, arguments.docs)
