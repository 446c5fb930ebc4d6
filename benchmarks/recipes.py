"""The recipes of `upwell convert` against each other, W8A8 by each: KL from the source, and what became of weights.

    python benchmarks/recipes.py --json benchmarks/results/recipes.json

Nano is converted by each recipe and reads generated questions with their plans, on domains that training never saw; KL
is over all their tokens, and its ratio to another recipe's has a 95 % interval over the questions (integers
decide which experts a token goes to, so single tokens' KL is anything but normal). `weights` are the relative errors of
nano's parts, and how many of their rows are exact. `synthetic` tells of rows as long as V4-Flash's, random numbers in
FP4, how many become INT8 without an error: nano's rows have 128 or 256 columns only.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from plans import arguments, kl_ratio, read_plans

from upwell.bench.documents import Document
from upwell.bench.quality import Predictions, Scores, predict, score
from upwell.bench.record import result, table
from upwell.checkpoint import load_model
from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.recipes import RECIPES
from upwell.formats.fp4 import dequantize_fp4, quantize_fp4
from upwell.formats.int8 import dequantize_int8, quantize_int8
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.ops.linear import dense_weight

OTHERS = "vllm-ascend", "msmodelslim"
WIDTH = 4096  # V4-Flash's hidden size


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    """Dense FP32 [out, in] by name, experts stacked to rows, of packed and of integer models."""
    out: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            out[name] = module.dense(torch.float32)
        elif isinstance(module, Experts) and module.packed is not None:
            for leaf in ("w1", "w3", "w2"):
                out[f"{name}.{leaf}"] = torch.cat([dense_weight(*e[leaf], torch.float32) for e in module.packed])
        elif isinstance(module, Experts):
            assert module.w13_scale is not None and module.w2_scale is not None
            dense = dequantize_int8(module.w13, module.w13_scale)
            for leaf, part in zip(("w1", "w3"), dense.chunk(2, 1), strict=True):
                out[f"{name}.{leaf}"] = part.flatten(0, 1)
            out[f"{name}.w2"] = dequantize_int8(module.w2, module.w2_scale).flatten(0, 1)
    return out


def weight_errors(model: Transformer, source: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Of the parts in integers: root of squared error over squared weights, and the share of rows without any."""
    sums: dict[str, list[float]] = {}
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))
    integers = {name for name, module in linears if module.scale is not None}
    for name, made in weights(model).items():
        if name not in integers and ".experts." not in name:
            continue
        part = "routed experts" if ".experts." in name else re.sub(r"^(layers|mtp)\.\d+\.(attn|ffn)?\.?", "", name)
        error = (made - source[name]).double().square()
        sums.setdefault(part, [0.0] * 4)
        for k, value in enumerate((error.sum(), source[name].double().square().sum(),
                                   (error.sum(1) == 0).sum(), len(error))):  # fmt: skip
            sums[part][k] += float(value)
    return {part: {"error": (e / w) ** 0.5, "exact_rows": exact / rows} for part, (e, w, exact, rows) in sums.items()}


def synthetic() -> list[dict[str, Any]]:
    """FP4 rows of WIDTH random numbers, 2,000 of a kind, and how many are INT8 on the grid exactly."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    normal, other = torch.randn(2, 2000, WIDTH, generator=generator).unbind(0)
    for name, dense in (("normal", normal), ("Student's t, 4 degrees", normal / _root_mean_of_squares(other, 4))):
        fp4 = dequantize_fp4(*quantize_fp4(dense))
        row: dict[str, Any] = {"numbers": name, "columns": WIDTH}
        for key, on_grid in (("on_grid", True), ("amax", False)):
            error = (dequantize_int8(*quantize_int8(fp4, on_grid)) - fp4).double().square()
            row[key] = {"error": float((error.sum() / fp4.double().square().sum()).sqrt()),
                        "exact_rows": float((error.sum(1) == 0).double().mean())}  # fmt: skip
        rows.append(row)
    return rows


def _root_mean_of_squares(normal: torch.Tensor, k: int) -> torch.Tensor:
    """Of k numbers, each column's own and its neighbours'."""
    return torch.stack([normal.roll(i, 1) for i in range(k)]).square().mean(0).sqrt()


def main() -> None:
    args = arguments(__doc__, 600)
    documents: list[Document] = read_plans(args.model, args.texts, whole=True)
    source = load_model(args.model, dtype=torch.float32)
    exact, reference = weights(source), predict(source, documents)
    scores: dict[str, Scores] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for recipe in RECIPES:
            done = convert(Conversion(args.model, Path(directory) / recipe, "w8a8", recipe=recipe))
            model = load_model(Path(directory) / recipe, dtype=torch.float32)
            predictions: Predictions = predict(model, documents)
            scores[recipe] = score(predictions, documents, reference)
            rows.append({"recipe": recipe, "bytes": done["bytes"], **scores[recipe].summary(),
                         "weights": weight_errors(model, exact)})  # fmt: skip
            print(recipe, rows[-1]["kl"], file=sys.stderr)
    for row in rows:
        row["kl_of"] = {other: kl_ratio(scores[row["recipe"]], scores[other]) for other in OTHERS}
    record = result("recipes", ["python", *sys.argv], source, args.model.name, rows)
    record |= {"synthetic": synthetic()}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    ratios = [f"of {other}'s" for other in OTHERS]
    lines = [["recipe", "MB", "KL", *ratios, "same choice", "routed experts' error", "rows exact"]]
    for row in rows:
        routed = row["weights"]["routed experts"]
        ratios = ["{ratio:.2f} ({low:.2f} to {high:.2f})".format(**row["kl_of"][other]) for other in OTHERS]
        lines.append([row["recipe"], f"{row['bytes'] / 1e6:.1f}", f"{row['kl']:.2e}", *ratios,
                      f"{100 * row['same_first_choice']:.2f} %", f"{100 * routed['error']:.2f} %",
                      f"{100 * routed['exact_rows']:.0f} %"])  # fmt: skip
    print(table(lines))
    print(json.dumps(record["synthetic"]))


if __name__ == "__main__":
    main()
