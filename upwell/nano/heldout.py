"""Generated questions on domains that training never sees, as prompts with their plans: data for `upwell eval`.

    python -m upwell.nano.heldout --count 500 --out plans.jsonl
    upwell eval --data plans.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from upwell.nano.generate import examples, load_domains
from upwell.nano.train import split_domains

SEED = 20261124  # differs from the seeds of training and its validation


def held_out(count: int, seed: int = SEED) -> Iterator[dict[str, str]]:
    """{"prompt", "completion"}: every twelfth example, so that tables vary. The same for the same seed."""
    domains = split_domains(load_domains())[1]
    for example in islice(examples(seed, domains), 0, 12 * count, 12):
        yield {"prompt": example.prompt, "completion": " ".join(example.target)}


def write(file: Path, count: int, seed: int = SEED) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for item in held_out(count, seed):
            stream.write(json.dumps(item, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.out, args.count, args.seed)


if __name__ == "__main__":
    main()
