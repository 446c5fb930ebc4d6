"""What it costs nano to hold one part of the model in integers, all else as it was: what recipes are made of.

    python benchmarks/sensitivity.py --json benchmarks/results/sensitivity.json

Each part alone goes to INT8 and to INT4, a scale a row, its inputs rounded to INT8 by token (wo_a's aren't: it is a
grouped product). Measured is the KL divergence from the unchanged model, on the plans of generated questions; of MTP's
parts, that of its drafts. `flash_share`: the part's share of V4-Flash's weights; `flash_read`: of what a token reads.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upwell.bench.documents import WINDOW, Cut, Document, read_documents
from upwell.bench.quality import Predictions, predict, score
from upwell.bench.record import result, table
from upwell.checkpoint import load_model
from upwell.checkpoint.geometry import slots
from upwell.config import ModelConfig
from upwell.engine import Tokenizer
from upwell.engine.llm import nano_path
from upwell.formats.int4 import quantize_int4
from upwell.formats.int8 import quantize_int8
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.nano.heldout import write_prompts
from upwell.ops.linear import dense_weight

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


def arguments(description: str | None, texts: int) -> argparse.Namespace:
    """model, texts, json: what is measured, on how many generated questions, and where the record goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=nano_path(), metavar="PATH", help="default: nano as shipped")
    parser.add_argument("--texts", type=int, default=texts, help=f"generated questions (default: {texts})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    return parser.parse_args()


def dense_model(path: Path) -> Transformer:
    """The checkpoint in FP32 with nothing packed."""
    model = load_model(path, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Linear) and module.scale is not None:
            module.weight, module.scale = nn.Parameter(module.dense(torch.float32), False), None
        elif isinstance(module, Experts) and module.packed is not None:
            w1, w2, w3 = (
                torch.stack([dense_weight(*parts[leaf], torch.float32) for parts in module.packed])
                for leaf in ("w1", "w2", "w3")
            )
            module.w13, module.w2 = nn.Parameter(torch.cat((w1, w3), 1), False), nn.Parameter(w2, False)
            module.packed = None
    return model


@contextmanager
def in_integers(model: Transformer, part: str, bits: int) -> Iterator[None]:
    """Inside, the modules of a part hold integers."""
    before: list[tuple[nn.Module, str, Any]] = []

    def hold(module: nn.Module, weight: str, scale: str) -> None:
        own: Tensor = getattr(module, weight)
        flat = own.detach().flatten(0, -2)
        codes, steps = quantize_int8(flat) if bits == 8 else quantize_int4(flat)
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
    """MTP's predictions of the documents' tokens but the first."""
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
    model = dense_model(args.model)
    tokenizer = Tokenizer.from_directory(args.model)
    assert tokenizer is not None, "the model has no tokenizer.json"
    with tempfile.TemporaryDirectory() as directory:
        write_prompts(Path(directory) / "plans.jsonl", args.texts)
        cut = Cut(model.config.bos_token_id, WINDOW, WINDOW // 2)
        longest = model.config.max_position_embeddings
        documents = read_documents(Path(directory) / "plans.jsonl", tokenizer, cut, longest)
    head = copy.deepcopy(model.head)
    of_model = Predictions(predict(model, documents).inputs, head)
    of_drafts = Predictions(drafts(model, documents).inputs, head)
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        share, read = flash_shares(part)
        row: dict[str, Any] = {"part": part, "flash_share": share, "flash_read": read}
        for bits in (8, 4):
            with in_integers(model, part, bits):
                draft = part.startswith("mtp")
                scores = score(drafts(model, documents) if draft else predict(model, documents), documents,
                               of_drafts if draft else of_model)  # fmt: skip
            row[f"int{bits}"] = {key: scores.summary()[key] for key in ("kl", "same_first_choice", "loss")}
        rows.append(row)
        print(part, row["int8"]["kl"], row["int4"]["kl"], file=sys.stderr)
    record = result("sensitivity", ["python", *sys.argv], model, args.model.name, rows)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [["part", "KL in INT8", "KL in INT4", "of Flash's weights", "of what a token reads"]]
    for row in rows:
        kls = [f"{row[key]['kl']:.2e}" for key in ("int8", "int4")]
        lines.append([row["part"], *kls, *(f"{100 * row[key]:.2f} %" for key in ("flash_share", "flash_read"))])
    print(table(lines))


if __name__ == "__main__":
    main()
