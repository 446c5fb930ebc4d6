"""What the measurements of integers on nano share: their command line, the dense model, and the texts they read."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from upwell.bench.documents import WINDOW, Cut, Document, read_documents
from upwell.bench.quality import Scores
from upwell.checkpoint import load_model
from upwell.checkpoint.match import read_config
from upwell.engine import Tokenizer
from upwell.engine.llm import nano_path
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.nano.heldout import write_prompts
from upwell.ops.linear import dense_weight

CALIBRATION = 128  # prompts with their plans, on the training's domains


def arguments(description: str | None, texts: int) -> argparse.Namespace:
    """model, texts, json: what is measured, on how many generated questions, and where the record goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=nano_path(), metavar="PATH", help="default: nano as shipped")
    parser.add_argument("--texts", type=int, default=texts, help=f"generated questions (default: {texts})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    return parser.parse_args()


def read_plans(model: Path, count: int, training: bool = False, whole: bool = False) -> list[Document]:
    """`count` generated questions with their plans, on domains that training never saw unless `training`; of each the
    plan is scored, or with `whole` all of it."""
    config, tokenizer = read_config(model), Tokenizer.from_directory(model)
    assert tokenizer is not None, "the model has no tokenizer.json"
    cut = Cut(config.bos_token_id, WINDOW, WINDOW // 2)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plans.jsonl"
        write_prompts(file, count, training)
        if whole:
            items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            texts = [json.dumps({"text": item["prompt"] + item["completion"]}) for item in items]
            file.write_text("\n".join(texts), encoding="utf-8")
        return read_documents(file, tokenizer, cut, config.max_position_embeddings)


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


def kl_ratio(model: Scores, other: Scores) -> dict[str, float]:
    """The model's KL over the other's on the same documents, with a 95 % interval: 4,000 bootstraps of documents."""
    assert model.kl is not None and other.kl is not None
    n = len(model.kl)
    picks = torch.randint(n, (4000, n), generator=torch.Generator().manual_seed(0))
    ratios = model.kl[picks].sum(1) / other.kl[picks].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return {"ratio": float(model.kl.sum() / other.kl.sum()), "low": low, "high": high}
