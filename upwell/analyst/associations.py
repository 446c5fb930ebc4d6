"""Which columns a word speaks for without naming them: "tallest" for a height, "cost" for a price.

The table of words is counted over the domains that nano trains on (upwell/nano/associations.py writes it).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from upwell.analyst.schema import ColumnProfile
from upwell.analyst.words import UNIT_OF, stem

ASSOCIATIONS = Path(__file__).with_name("associations.json")


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    raw = json.loads(ASSOCIATIONS.read_text(encoding="utf-8"))
    return raw["columns"], raw["sorts"]


def association(word: str, column: ColumnProfile) -> float:
    """In 0..1: of the columns that people use this word for, the share that share a header's word with this one."""
    headers = _table()[0].get(stem(word))
    if not headers:
        return 0.0
    # "mins" says minutes at the end of a name, "min" the least at its beginning.
    said = [part for part in column.words if part not in UNIT_OF or part == column.words[-1]]
    return max((headers.get(stem(part), 0.0) for part in said), default=0.0)


def sorts(word: str) -> float:
    """1 for a word that asks for the most ("tallest"), -1 for the least ("cheapest"), 0 when neither is known."""
    return _table()[1].get(word, 0.0)


def known_word(word: str) -> bool:
    """Whether it is a word that people use about tables, so hardly a misspelling of something else."""
    return stem(word) in _table()[0]
