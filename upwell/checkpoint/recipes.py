"""Targets, layouts and recipes of `upwell convert`. A recipe says which weights become INT8; the rest stay BF16."""

from __future__ import annotations

import re
from typing import Literal

Target = Literal["bf16", "w8a8", "fp8", "fp4"]
Layout = Literal["upwell", "vllm-ascend"]
TARGETS: tuple[Target, ...] = ("bf16", "w8a8", "fp8", "fp4")
LAYOUTS: tuple[Layout, ...] = ("upwell", "vllm-ascend")
NOT_YET = ("w4a8", "w4a16")

_FFN = r"\.ffn\.(experts\.\d+|shared_experts)\.w[123]\.weight$"
RECIPES = {
    # The tensors that vllm-ascend's own converter quantizes (its PR 15387): the wide projections and the experts.
    "vllm-ascend": re.compile(rf"{_FFN}|\.attn\.(wq_b|wo_b)\.weight$|\.(e_proj|h_proj)\.weight$"),
    # Those of msmodelslim's V4 recipes, without its rotation and smoothing: the projections from the hidden state too.
    "msmodelslim": re.compile(rf"{_FFN}|\.attn\.(wq_a|wq_b|wkv|indexer\.wq_b)\.weight$"),
}
