"""Which rank holds which routed experts: by measured load, hot ones on several ranks. No torch.

Load is how many tokens chose an expert, by layer, counted as the model runs. First the extra places go, one by one, to
the expert with the most load a copy; then copies are placed, largest first, each on the least loaded rank that has room
and doesn't hold the expert yet (longest processing time first).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from upwell.errors import InputError

Placement = tuple[tuple[int, ...], ...]
"""The experts of each rank, in the order of its places."""


def contiguous(experts: int, ranks: int) -> Placement:
    """Experts in order, as evenly as their number allows."""
    return tuple(tuple(range(experts * r // ranks, experts * (r + 1) // ranks)) for r in range(ranks))


def place(load: Sequence[int], ranks: int, extra: int = 0) -> Placement:
    """Experts of one layer on ranks, by load; `extra` places beyond one an expert hold copies of hot ones.

    No rank holds more than ceil((experts + extra) / ranks), and none the same expert twice.
    """
    experts = len(load)
    copies = [1] * experts
    for _ in range(extra):
        wanting = [e for e in range(experts) if copies[e] < ranks]
        if not wanting:
            break
        copies[max(wanting, key=lambda e: (load[e] / copies[e], -e))] += 1
    room = [-(-sum(copies) // ranks)] * ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for e in sorted(range(experts), key=lambda e: (-load[e] / copies[e], e)):
        for _ in range(copies[e]):
            free = [r for r in range(ranks) if len(held[r]) < room[r] and e not in held[r]]
            if not free:
                break  # its other copies are placed
            best = min(free, key=lambda r: (sums[r], len(held[r]), r))
            held[best].append(e)
            sums[best] += load[e] / copies[e]
    return tuple(tuple(sorted(own)) for own in held)


def rank_loads(placement: Placement, load: Sequence[int]) -> list[float]:
    """What each rank computes if an expert's tokens are shared evenly by its copies."""
    copies = [sum(e in own for own in placement) for e in range(len(load))]
    return [sum(load[e] / copies[e] for e in own) for own in placement]


class ExpertLoad:
    """Tokens by expert, of each layer by its name (`layers.0`, `mtp.0`), and the file that keeps them."""

    def __init__(self, layers: dict[str, list[int]]) -> None:
        self.layers = layers

    @staticmethod
    def read(file: Path, names: Sequence[str], experts: int) -> ExpertLoad:
        """Raises InputError for a file that isn't one, or is of another model."""
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            layers = {str(k): [int(n) for n in v] for k, v in raw["expert_load"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: can't be read as an expert load: {error}") from None
        if list(layers) != list(names) or any(len(v) != experts or min(v) < 0 for v in layers.values()):
            raise InputError(
                f"{file}: has the load of another model: {len(layers)} layers, not {len(names)} of {experts} experts",
                "name a file of this model, or a new one",
            )
        return ExpertLoad(layers)

    def write(self, file: Path) -> None:
        """Whole or not at all."""
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in self.layers.items())
        part = file.with_name(file.name + ".part")
        part.write_text('{"expert_load": {\n' + lines + "\n}}\n", encoding="utf-8")
        part.replace(file)

    def plus(self, other: ExpertLoad) -> ExpertLoad:
        return ExpertLoad({k: [a + b for a, b in zip(v, other.layers[k], strict=True)] for k, v in self.layers.items()})
