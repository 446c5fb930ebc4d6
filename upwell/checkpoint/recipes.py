"""Targets, layouts and recipes of `upwell convert`. A recipe says which weights become integers; the rest stay BF16."""

from __future__ import annotations

import re
from typing import Literal

Target = Literal["bf16", "w8a8", "w4a8", "w4a16", "fp8", "fp4"]
Layout = Literal["upwell", "vllm-ascend"]
Integer = Literal["int8", "int4", "int4-groups"]  # by row, by row, by row and group of columns (formats/int4.py)
TARGETS: tuple[Target, ...] = ("bf16", "w8a8", "w4a8", "w4a16", "fp8", "fp4")
INTEGER_TARGETS: tuple[Target, ...] = ("w8a8", "w4a8", "w4a16")
LAYOUTS: tuple[Layout, ...] = ("upwell", "vllm-ascend")

_ROUTED = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
_FFN = r"\.ffn\.(experts\.\d+|shared_experts)\.w[123]\.weight$"
RECIPES = {
    # What vllm-ascend's own converter quantizes (its PR 15387): the wide projections and the experts.
    "vllm-ascend": re.compile(
        rf"{_FFN}|\.attn\.(wq_b|wo_b|indexer\.wq_b)\.weight$|^mtp\.\d+\.(e_proj|h_proj|main_proj)\.weight$"
    ),
    # What msmodelslim's V4 recipes do, without their rotation and smoothing: the projections from the hidden state too.
    "msmodelslim": re.compile(rf"{_FFN}|\.attn\.(wq_a|wq_b|wkv|indexer\.wq_b)\.weight$"),
    # Upwell's own, by what each part costs nano (docs/quality.md): vllm-ascend's without the shared expert, which every
    # token takes and which costs as much as all routed ones together, for a hundredth of their bytes.
    "upwell": re.compile(
        r"\.ffn\.experts\.\d+\.w[123]\.weight$|\.attn\.(wq_b|wo_b|indexer\.wq_b)\.weight$"
        r"|^mtp\.\d+\.(e_proj|h_proj|main_proj)\.weight$"
    ),
}


def integer_format(name: str, to: Target, recipe: str) -> Integer | None:
    """The integer format of weight `name`, None where it stays in floating point.

    W8A8: all the recipe's weights INT8. W4A8: routed experts INT4, the recipe's others INT8. W4A16: routed experts
    INT4 by groups, all others BF16.
    """
    if to == "w4a16":
        return "int4-groups" if _ROUTED.search(name) else None
    if to == "w4a8" and _ROUTED.search(name):
        return "int4"
    return "int8" if to in INTEGER_TARGETS and RECIPES[recipe].search(name) else None
