"""Generated questions as prompts with their plans: data for `upwell eval` and `upwell convert --calibration`.

    python -m upwell.nano.heldout --count 400 --out plans.jsonl                  # on domains that training never saw
    python -m upwell.nano.heldout --count 300 --training --out calibration.jsonl  # on the training's own
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from upwell.nano.generate import examples, load_domains
from upwell.nano.train import split_domains

SEED = 20261124  # training and its validation use others
EVERY = 6  # of a table's questions, so that tables vary


def write_prompts(file: Path, count: int, training: bool = False) -> None:
    """`count` lines {"prompt", "completion"}; the same for the same arguments."""
    domains = split_domains(load_domains())[0 if training else 1]
    with file.open("w", encoding="utf-8") as stream:
        for example in islice(examples(SEED + training, domains), 0, EVERY * count, EVERY):
            line = {"prompt": example.prompt, "completion": " ".join(example.target)}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--training", action="store_true", help="domains of the training, for calibration")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_prompts(args.out, args.count, args.training)


if __name__ == "__main__":
    main()
