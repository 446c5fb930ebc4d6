"""Targets, layouts and recipes of `upwell convert`.

A recipe says which weights become integers, and with which scales; the rest stay BF16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Target = Literal["bf16", "w8a8", "w4a8", "w4a16", "fp8", "fp4"]
Layout = Literal["upwell", "vllm-ascend"]
Integer = Literal["int8", "int4", "int4-groups"]  # by row, by row, by row and group of columns (formats/int4.py)
TARGETS: tuple[Target, ...] = ("bf16", "w8a8", "w4a8", "w4a16", "fp8", "fp4")
INTEGER_TARGETS: tuple[Target, ...] = ("w8a8", "w4a8", "w4a16")
LAYOUTS: tuple[Layout, ...] = ("upwell", "vllm-ascend")

_ROUTED = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
_FFN = r"\.ffn\.(experts\.\d+|shared_experts)\.w[123]\.weight$"


@dataclass(frozen=True)
class Recipe:
    """`weights`: what becomes integers; `on_grid`: INT8's scales are powers of two where the source's are
    (formats/int8.py), not amax / 127."""

    weights: re.Pattern[str]
    on_grid: bool = False


# What vllm-ascend's own converter quantizes (its PR 15387): the wide projections and the experts.
_WIDE = re.compile(
    rf"{_FFN}|\.attn\.(wq_b|wo_b|indexer\.wq_b)\.weight$|^mtp\.\d+\.(e_proj|h_proj|main_proj)\.weight$"
)
RECIPES = {
    "upwell": Recipe(_WIDE, on_grid=True),
    "vllm-ascend": Recipe(_WIDE),
    # What msmodelslim's V4 recipes do, without their rotation and smoothing: the projections from the hidden state too.
    "msmodelslim": Recipe(re.compile(rf"{_FFN}|\.attn\.(wq_a|wq_b|wkv|indexer\.wq_b)\.weight$")),
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
    return "int8" if to in INTEGER_TARGETS and RECIPES[recipe].weights.search(name) else None
