"""How the routed experts' INT4 weights are best rounded, by what it costs nano; what `upwell convert` does and doesn't.

    python benchmarks/rounding.py --json benchmarks/results/rounding.json

Only weights are rounded, all layers' routed experts at once, by row (W4A8's) and by groups of 32 columns (W4A16's). KL
is from the unchanged model, over all tokens of generated questions and their plans that neither training nor
calibration saw, with a 95 % interval over the questions of its ratio to rounding to nearest.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plans import CALIBRATION, arguments, dense_model, kl_ratio, read_plans
from torch import Tensor

from upwell.bench.quality import Scores, paired_difference, predict, score
from upwell.bench.record import result, table
from upwell.checkpoint.calibrate import FEWEST_ROWS, Calibration, calibrate, first_tokens
from upwell.checkpoint.rounding import gptq, search_scale
from upwell.formats.int4 import GROUP, INT4_MAX, int4_scale, round_to_int4
from upwell.model import Transformer
from upwell.ops.moe import swiglu

Rounding = Callable[[Tensor, Tensor, int | None], Tensor]  # weight, its inputs, group -> the rounded weight


def dense(codes: Tensor, scale: Tensor) -> Tensor:
    rows = len(codes)
    return (codes.float().view(rows, scale[0].numel(), -1) * scale.view(rows, -1, 1)).view(rows, -1)


def at(weight: Tensor, scale: Tensor) -> Tensor:
    return dense(round_to_int4(weight, scale), scale)


def hadamard(n: int) -> Tensor:
    """Orthogonal [n, n], n a power of two."""
    made = torch.ones(1, 1)
    while len(made) < n:
        made = torch.cat((torch.cat((made, made), 1), torch.cat((made, -made), 1)))
    return made / n**0.5


def rotated(weight: Tensor, x: Tensor, group: int | None) -> Tensor:
    turn = hadamard(weight.shape[1])
    return at(weight @ turn, int4_scale(weight @ turn, group)) @ turn.T


def weighted(weight: Tensor, x: Tensor, group: int | None) -> Tensor:
    return search_scale(weight, INT4_MAX, group, x.square().mean(0))


def compensated(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    return dense(gptq(weight, scale, x.T @ x, INT4_MAX), scale)


ROUNDINGS: dict[str, Rounding] = {
    "to nearest, largest value to 7": lambda w, x, group: at(w, int4_scale(w, group)),
    "rotation (Hadamard), to nearest": rotated,
    "scale search": lambda w, x, group: at(w, search_scale(w, INT4_MAX, group)),
    "scale search, weighted by inputs": lambda w, x, group: at(w, weighted(w, x, group)),
    "GPTQ, largest value to 7": lambda w, x, group: compensated(w, int4_scale(w, group), x),
    "GPTQ, weighted scale search": lambda w, x, group: compensated(w, weighted(w, x, group), x),
}


def round_experts(model: Transformer, kept: Calibration, rounding: Rounding, group: int | None) -> list[Tensor]:
    """Round in place; returns what was there."""
    before = []
    for i, layer in enumerate(model.layers):
        experts = layer.ffn.experts
        before += [experts.w13.detach().clone(), experts.w2.detach().clone()]
        for e in range(experts.n):
            x, shares = kept.inputs(f"layers.{i}.ffn.experts", e)
            if len(x) < FEWEST_ROWS:
                x, shares = torch.eye(x.shape[1]), torch.ones(x.shape[1])
            gate, up = experts.w13[e].chunk(2)
            hidden = swiglu(x @ gate.T, x @ up.T, experts.limit) * shares.unsqueeze(1)
            experts.w13.data[e] = torch.cat([rounding(part, x, group) for part in (gate, up)])
            experts.w2.data[e] = rounding(experts.w2[e], hidden, group)
    model._apply(lambda tensor: tensor)  # the kernels' plan of the weights is made anew
    return before


def main() -> None:
    args = arguments(__doc__, 400)
    model, plans = dense_model(args.model), read_plans(args.model, args.texts)
    documents = read_plans(args.model, args.texts, whole=True)
    texts = [document.ids for document in read_plans(args.model, CALIBRATION, training=True)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        work = Path(directory)
        calibrate(args.model, first_tokens(texts, model.config.vocab_size), work / "kept", lambda done, total: None)
        kept = Calibration(work / "kept", model.config.swiglu_limit)
        unchanged, before = predict(model, documents), score(predict(model, plans), plans)
        for group in (None, GROUP):
            nearest: Scores | None = None
            for name, rounding in ROUNDINGS.items():
                began = time.perf_counter()
                weights = round_experts(model, kept, rounding, group)
                seconds = time.perf_counter() - began
                scores = score(predict(model, documents), documents, unchanged)
                nearest = nearest or scores
                right = score(predict(model, plans), plans).whole
                rows.append({
                    "rounding": name, "group": group, **scores.summary(), "kl_of_nearest": kl_ratio(scores, nearest),
                    "completions": len(right), "completions_right": float(right.double().mean()),
                    "completions_difference": paired_difference(right.tolist(), before.whole.tolist()),
                    "seconds": seconds,
                })  # fmt: skip
                for layer in model.layers:
                    layer.ffn.experts.w13.data.copy_(weights.pop(0))
                    layer.ffn.experts.w2.data.copy_(weights.pop(0))
                print(name, group, rows[-1]["kl"], file=sys.stderr)
    record = result("rounding", ["python", *sys.argv], model, args.model.name, rows)
    record["unrounded"] = {"completions": len(before.whole), "completions_right": float(before.whole.double().mean())}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"plans right unrounded: {100 * float(before.whole.double().mean()):.1f} %")
    lines = [["", "a scale", "KL", "of nearest's", "same choice", "plans right"]]
    for row in rows:
        right = f"{100 * row['completions_right']:.1f} %"
        lines.append([row["rounding"], "a row" if row["group"] is None else f"{row['group']} columns",
                      f"{row['kl']:.2e}", "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**row["kl_of_nearest"]),
                      f"{100 * row['same_first_choice']:.2f} %", right])  # fmt: skip
    print(table(lines))


if __name__ == "__main__":
    main()
