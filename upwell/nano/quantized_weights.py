"""Training with the shipped formats in view: the forward pass sees the weights as FP4 and FP8 will hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from upwell.checkpoint.geometry import slots
from upwell.formats.fp4 import dequantize_fp4, quantize_fp4
from upwell.formats.fp8 import dequantize_fp8, quantize_fp8
from upwell.model import Transformer


def shipped_as(model: Transformer) -> dict[str, str]:
    """How the official format holds each parameter that it rounds: name -> "fp4" | "fp8" | "bf16"."""
    formats: dict[str, str] = {}
    for slot in slots(model.config):
        if slot.kind == "expert":
            prefix = slot.name.partition(".{}")[0]
            formats[f"{prefix}.w13"] = formats[f"{prefix}.w2"] = "fp4"
        elif slot.kind == "matrix":
            formats[slot.name] = "fp8"
        elif slot.kind in ("plain", "norm", "router"):
            formats[slot.name] = "bf16"
    return formats


def rounded(weight: Tensor, kind: str) -> Tensor:
    """`weight` after a trip through the format, FP32."""
    if kind == "bf16":
        return weight.bfloat16().float()
    flat = weight.reshape(-1, weight.shape[-1])
    trip = dequantize_fp4(*quantize_fp4(flat)) if kind == "fp4" else dequantize_fp8(*quantize_fp8(flat))
    return trip.view_as(weight)


@contextmanager
def quantized(model: Transformer, formats: dict[str, str]) -> Iterator[None]:
    """Inside, the model holds rounded weights; the gradients found there apply to the full ones (straight through)."""
    parameters = dict(model.named_parameters())
    full = {name: parameters[name].data for name in formats}
    with torch.no_grad():
        for name, kind in formats.items():
            parameters[name].data = rounded(full[name], kind)
    try:
        yield
    finally:
        for name, data in full.items():
            parameters[name].data = data
