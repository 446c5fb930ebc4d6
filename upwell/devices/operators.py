"""The operator audit: which ATen operators and dtypes a computation runs, held against what torch_npu has.

OperatorRecord notes what is dispatched; audit() compares it with npu_operators.json, which contract/facts.py makes
from the torch_npu wheel. It can't see whether a kernel computes rightly or takes a dtype: only whether the operator
is there, and which dtypes Ascend documents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upwell.devices.npu import Chip

FP8_AND_FP4 = frozenset(
    {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"}
)
# Views and allocations move no numbers: any dtype that a tensor can have goes through them.
MOVES = frozenset(
    """alias as_strided cat clone copy_ detach empty empty_like empty_strided expand _reshape_alias _unsafe_view permute
    select slice split split_with_sizes squeeze stack t transpose unbind unfold unsqueeze view new_empty""".split()
)

Used = tuple[str, frozenset[str]]
"""An overload's name without aten:: and the dtypes of the tensors in and out of it."""


class OperatorRecord(TorchDispatchMode):
    """Notes every operator run under it with the dtypes of its tensors, in `used`. Use it under torch.no_grad():
    inference_mode leaves composites whole."""

    def __init__(self) -> None:
        super().__init__()
        self.used: Counter[Used] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.used[func.name(), frozenset(str(t.dtype).removeprefix("torch.") for t in tensors)] += 1
        return out


@dataclass(frozen=True)
class Finding:
    """An operator that isn't known to run as it should. `fails`: it can't be shipped; else worth knowing."""

    operator: str
    problem: str
    fails: bool


@cache
def facts() -> dict[str, Any]:
    """npu_operators.json; its 'aten' as a mapping from overload to status."""
    text = (resources.files("upwell.devices") / "npu_operators.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    loaded["aten"] = {name: status for status, names in loaded["aten"].items() for name in names.split()}
    return loaded


def audit(used: Iterable[Used], chip: Chip) -> list[Finding]:
    """What of the operators used isn't sure to run on the chip: unknown ones, CPU fallbacks, FP64 anywhere, FP8 and FP4
    in anything but a copy where the chip has no such arithmetic; and, as warnings, dtypes that no page documents."""
    found = []
    for name, dtypes in sorted(used, key=lambda u: (u[0], sorted(u[1]))):
        if not name.startswith("aten::"):
            continue  # an npu:: operator is checked against its schema (contract/check.py)
        found += _problems(name.removeprefix("aten::"), dtypes, chip, facts()["aten"], facts()["documented"])
    return found


def _problems(
    name: str, dtypes: frozenset[str], chip: Chip, aten: Mapping[str, str], documented: Mapping[str, Any]
) -> list[Finding]:
    found = []
    status = aten.get(name)
    if status is None:
        found.append(Finding(name, "unknown to this torch_npu", True))
    elif status == "cpu_fallback":
        found.append(Finding(name, "no kernel on the NPU: it would run on the host", True))
    if "float64" in dtypes:
        found.append(Finding(name, "float64", True))
    base = name.split(".")[0]
    if not chip.fp8 and dtypes & FP8_AND_FP4 and base not in MOVES:
        found.append(Finding(name, f"{'/'.join(sorted(dtypes & FP8_AND_FP4))} on {chip.soc}", True))
    page = documented.get(base.strip("_"))
    if base in MOVES or status == "composite_implicit":
        return found
    if page is None:
        found.append(Finding(name, "no page documents it", False))
    else:
        if page["dtypes"] and not dtypes <= set(page["dtypes"]):
            extra = ", ".join(sorted(dtypes - set(page["dtypes"])))
            found.append(Finding(name, f"dtypes that its page doesn't name: {extra}", False))
        if page["products"] and chip.family not in page["products"]:
            found.append(Finding(name, f"its page doesn't name {chip.family}", False))
    return found
