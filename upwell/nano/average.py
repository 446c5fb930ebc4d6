"""The mean of a run's weights over several steps: read by upwell.nano.heads in place of the last ones.

    python -m upwell.nano.average --out runs/nano 2600 2800 3200     # of runs/nano/steps/2600.pt ...; writes average.pt

Weights along one run lie around a minimum that none of them hits (Izmailov et al. 2018, arXiv:1803.05407): their mean
answers more questions than any of them (docs/nano.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from upwell.errors import InputError


def average(out: Path, steps: list[int]) -> dict[str, Tensor]:
    """Mean of each floating-point tensor over out/steps/<step>.pt; others are the last one's.

    Raises InputError for a step that wasn't kept.
    """
    total: dict[str, Tensor] = {}
    for step in steps:
        file = out / "steps" / f"{step}.pt"
        if not file.exists():
            kept = ", ".join(sorted((p.stem for p in file.parent.glob("*.pt")), key=int))
            raise InputError(f"step {step} isn't kept in {file.parent}", f"there are: {kept or 'none'}")
        for name, tensor in torch.load(file, weights_only=True)["model"].items():
            if tensor.is_floating_point():
                tensor = total.get(name, 0) + tensor / len(steps)
            total[name] = tensor
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the trunk's run")
    parser.add_argument("steps", type=int, nargs="+", metavar="STEP")
    args = parser.parse_args()
    torch.save({"model": average(args.out, args.steps)}, args.out / "average.pt")


if __name__ == "__main__":
    main()
