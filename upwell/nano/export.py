"""The trained run as package data: the official FP4/FP8 checkpoint, its tokenizer, and the loss curve.

    python -m upwell.nano.export --run runs/nano            # writes upwell/nano/weights
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from upwell.checkpoint import save_checkpoint
from upwell.model import Transformer
from upwell.nano.geometry import NANO

WEIGHTS = Path(__file__).parent / "weights"


def load_run(run: Path) -> Transformer:
    """The run's model in FP32: with trained MTP and indexers where the second stage is done, else the trunk."""
    file = run / "heads.pt" if (run / "heads.pt").exists() else run / "checkpoint.pt"
    model = Transformer(NANO)
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    save_checkpoint(load_run(args.run), args.out)
    shutil.copy(args.run / "tokenizer.json", args.out / "tokenizer.json")
    for log in ("log.jsonl", "heads_log.jsonl"):
        if (args.run / log).exists():
            shutil.copy(args.run / log, args.out / log)


if __name__ == "__main__":
    main()
