"""Preview the generator: python -m upwell.nano.generate --n 40 --seed 1 [--stats]."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from itertools import islice

from upwell.analyst.plan import plan_tokens
from upwell.nano.generate import Example, examples, load_domains


def readable(example: Example) -> str:
    """The plan with column names and slot texts in place of pointers."""
    slots = example.linked.slots
    texts = {f"V{i}": v.text for i, v in enumerate(slots.values)}
    texts |= {f"N{i}": n.text for i, n in enumerate(slots.numbers)}
    texts |= {f"D{i}": d.text for i, d in enumerate(slots.dates)}
    texts |= {f"T{i}": t.text for i, t in enumerate(slots.texts)}
    out = []
    for token in plan_tokens(example.plan):
        word = token[1:-1]
        if word[0] == "C" and word[1:].isdigit():
            out.append(f"[{example.table.columns[int(word[1:])].name}]")
        else:
            out.append(f"{word}:{texts[word]!r}" if word in texts else word)
    return " ".join(out[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=40, help="how many examples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stats", action="store_true", help="frequencies instead of examples")
    parser.add_argument("--prompts", action="store_true", help="print whole prompts and targets")
    args = parser.parse_args()
    drops: Counter[str] = Counter()
    start = time.perf_counter()
    stream = examples(args.seed, load_domains(), drops)
    made = list(islice(stream, args.n))
    seconds = time.perf_counter() - start
    if args.stats:
        kinds = Counter(e.kind for e in made)
        for kind, count in kinds.most_common():
            print(f"{kind:16}{100 * count / len(made):6.1f} %")
        ops = Counter(t for e in made for t in e.target if not t[2].isdigit())
        print("tokens:", ", ".join(f"{t} {100 * c / len(made):.1f}" for t, c in ops.most_common()))
        total = sum(drops.values())
        print(f"dropped {100 * total / (total + len(made)):.1f} %:", dict(drops.most_common(20)))
        lengths = sorted(len(e.question.split()) for e in made)
        print("question words p5/50/95/max:", *[lengths[int(q * (len(made) - 1))] for q in (0.05, 0.5, 0.95, 1)])
        prompts = sorted(len(e.prompt.split()) for e in made)
        print("prompt words p5/50/95/max:", *[prompts[int(q * (len(made) - 1))] for q in (0.05, 0.5, 0.95, 1)])
        print(f"{len(made) / seconds:.0f} examples a second")
        return
    shown = None
    for e in made:
        if e.table is not shown:
            shown = e.table
            print(f"\n== {e.table.name}: " + ", ".join(f"{c.name}<{c.kind.value}>" for c in e.table.columns))
        print(f"  {e.question}\n      {readable(e)}")
        if args.prompts:
            print(f"      {e.prompt}\n      {' '.join(e.target)}")


if __name__ == "__main__":
    main()
