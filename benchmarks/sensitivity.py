"""What it costs nano to hold one part of the model in integers, all else as it was: what recipes are made of.

    python benchmarks/sensitivity.py --json benchmarks/results/sensitivity.json

Each part alone goes to INT8 and to INT4, a scale a row, its inputs rounded to INT8 by token (wo_a's aren't: it is a
grouped product). Measured is the KL divergence from the unchanged model, on generated questions with their plans, all
tokens (the plans alone are few, and most of their KL is a handful of tokens'); of MTP's parts, that of its drafts.
`int8_grid`: INT8 with scales that are powers of two. `flash_share`: the part's share of V4-Flash's weights;
`flash_read`: of what a token reads.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from plans import arguments, dense_model, read_plans
from torch import Tensor, nn

from upwell.bench.documents import Document
from upwell.bench.quality import Predictions, predict, score
from upwell.bench.record import result, table
from upwell.checkpoint.geometry import slots
from upwell.config import ModelConfig
from upwell.formats.int4 import quantize_int4
from upwell.formats.int8 import quantize_int8
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.model.moe import Experts

KINDS = ("int8", "int8_grid", "int4")
PARTS = {
    "wq_a": r"^layers.*\.attn\.wq_a", "wq_b": r"^layers.*\.attn\.wq_b", "wkv": r"^layers.*\.attn\.wkv",
    "wo_a": r"^layers.*\.attn\.wo_a", "wo_b": r"^layers.*\.attn\.wo_b",
    "compressor": r"^layers.*\.attn\.compressor\.w(kv|gate)", "indexer.wq_b": r"^layers.*\.indexer\.wq_b",
    "indexer.weights_proj": r"^layers.*\.indexer\.weights_proj",
    "indexer.compressor": r"^layers.*\.indexer\.compressor\.w(kv|gate)",
    "shared expert": r"^layers.*\.shared_experts\.",
    "routed experts": r"^layers.*\.ffn\.experts", "head": r"^head",
    "mtp: e_proj, h_proj": r"^mtp.*\.(e_proj|h_proj)", "mtp: attention": r"^mtp.*\.attn\.w",
    "mtp: shared expert": r"^mtp.*\.shared_experts\.", "mtp: routed experts": r"^mtp.*\.ffn\.experts",
}  # fmt: skip


@contextmanager
def in_integers(model: Transformer, part: str, kind: str) -> Iterator[None]:
    """Inside, the modules of a part hold integers."""
    before: list[tuple[nn.Module, str, Any]] = []

    def hold(module: nn.Module, weight: str, scale: str) -> None:
        own: Tensor = getattr(module, weight)
        flat = own.detach().flatten(0, -2)
        codes, steps = quantize_int4(flat) if kind == "int4" else quantize_int8(flat, kind == "int8_grid")
        before.extend(((module, weight, own), (module, scale, None)))
        setattr(module, weight, nn.Parameter(codes.view(*own.shape[:-1], -1), False))
        setattr(module, scale, steps.view(own.shape[:-1]))

    for name, module in model.named_modules():
        if re.match(PARTS[part], name) and isinstance(module, Linear):
            hold(module, "weight", "scale")
        elif re.match(PARTS[part], name) and isinstance(module, Experts):
            hold(module, "w13", "w13_scale")
            hold(module, "w2", "w2_scale")
    assert before, part
    model._apply(lambda tensor: tensor)  # the kernels' plan of the weights is made anew
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        model._apply(lambda tensor: tensor)


@torch.inference_mode()
def drafts(model: Transformer, documents: Sequence[Document]) -> Predictions:
    """MTP's predictions of the documents' tokens from `begin`, 2 or more, on."""
    block, inputs = model.mtp[0], []
    for document in documents:
        ids = torch.tensor([document.ids[:-1]])
        streams = model.draft_streams(ids[:, 1:], model.streams(ids)[:-1])
        inputs.append(block.norm(block.hc_head(streams[document.begin - 2 :])))
    return Predictions(inputs, model.head)


def flash_shares(part: str) -> tuple[float, float]:
    """The part's share of V4-Flash's weights, and of those a token reads (MTP apart), from its geometry."""
    config = ModelConfig.preset("v4-flash")
    active = config.num_experts_per_tok / config.n_routed_experts
    all_of, read_of = [0.0, 0.0], [0.0, 0.0]
    for slot in slots(config):
        read = slot.numel * (active if slot.kind == "expert" else 0 if slot.kind == "table" else 1)
        read = 0 if slot.name.startswith(("mtp.", "embed.")) else read
        for k in (0, 1) if re.match(PARTS[part], slot.name) and len(slot.shape) == 2 else (0,):
            all_of[k] += slot.numel if slot.kind != "table" else 0
            read_of[k] += read
    return all_of[1] / all_of[0], read_of[1] / read_of[0]


def main() -> None:
    args = arguments(__doc__, 100)
    model, documents = dense_model(args.model), read_plans(args.model, args.texts, whole=True)
    drafted = [replace(document, begin=2) for document in documents]
    head = copy.deepcopy(model.head)
    of_model = Predictions(predict(model, documents).inputs, head)
    of_drafts = Predictions(drafts(model, drafted).inputs, head)
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        share, read = flash_shares(part)
        row: dict[str, Any] = {"part": part, "flash_share": share, "flash_read": read}
        for kind in KINDS:
            with in_integers(model, part, kind):
                if part.startswith("mtp"):
                    scores = score(drafts(model, drafted), drafted, of_drafts)
                else:
                    scores = score(predict(model, documents), documents, of_model)
            row[kind] = {key: scores.summary()[key] for key in ("tokens", "kl", "same_first_choice", "loss")}
        rows.append(row)
        print(part, *(row[kind]["kl"] for kind in KINDS), file=sys.stderr)
    record = result("sensitivity", ["python", *sys.argv], model, args.model.name, rows)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [["part", "KL in INT8", "on the grid", "in INT4", "of Flash's weights", "of what a token reads"]]
    for row in rows:
        kls = [f"{row[key]['kl']:.2e}" for key in KINDS]
        lines.append([row["part"], *kls, *(f"{100 * row[key]:.2f} %" for key in ("flash_share", "flash_read"))])
    print(table(lines))


if __name__ == "__main__":
    main()
