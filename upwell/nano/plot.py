"""The training curve as a picture.

    python -m upwell.nano.plot --run upwell/nano/weights --out docs/nano_training.png
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory with log.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in entries]
    figure, (losses, plans) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    losses.plot(steps, [e["loss"] for e in entries], label="training (moving average)")
    losses.plot(steps, [e["held_loss"] for e in entries], label="held-out domains")
    losses.set(xlabel="step", ylabel="loss a plan token (nats)", yscale="log")
    losses.legend()
    plans.plot(steps, [100 * e["held_plans_right"] for e in entries], color="tab:green")
    plans.set(xlabel="step", ylabel="held-out plans right in every token (%)", ylim=(0, 100))
    spans = [(a["step"], b["step"]) for a, b in pairwise(entries) if b["quantized"]]
    for axis in (losses, plans):
        for first, last in spans:
            axis.axvspan(first, last, alpha=0.12, color="gray", linewidth=0)
    if spans:
        plans.text(steps[-1], 4, "gray: FP4/FP8 in view", ha="right")
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
