"""What words mean what kind of column: "tallest" a height, "cost" a price; counted over the domains' own wordings.

    python -m upwell.nano.associations

Each described column lists its headers and the words that people use for it. For every word that is no header the
share of columns that it is used for, by word of their headers, is kept (analyst/associations.json), and the way that
a superlative sorts. Plans whose columns these words speak for are preferred (analyst/evidence.py).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from upwell.analyst.associations import ASSOCIATIONS
from upwell.analyst.words import STOP, TOKEN, UNITS, split_name, stem
from upwell.nano.generate import Domain, load_domains
from upwell.nano.generate.lexicon import ColumnSpec

_SHARE = 0.08  # of a word's columns: rarer header words are dropped


def phrases(column: ColumnSpec) -> Iterator[str]:
    for group in (column.say, column.hi, column.lo, column.more, column.less, column.ask, column.verb):
        yield from group


def stems_of(phrase: str) -> set[str]:
    return {stem(w) for w in TOKEN.findall(phrase.lower()) if w not in STOP and w.isalpha() and len(w) > 1}


def headers(column: ColumnSpec) -> set[str]:
    """The stems of a column's headers, units and the words of its first name for people included."""
    words = {w for name in column.names for w in split_name(name)}
    return {stem(w) for w in words if w not in STOP and w.isalpha() and len(w) > 1} | stems_of(column.say[0])


def count(domains: Sequence[Domain]) -> dict[str, object]:
    """{"columns": word -> header word -> share, "sorts": superlative -> -1 (least first) to 1 (most first)}."""
    used: Counter[str] = Counter()
    beside: dict[str, Counter[str]] = defaultdict(Counter)
    sorts: dict[str, list[int]] = defaultdict(list)
    for domain in domains:
        for column in domain.columns:
            named = headers(column)
            for word in {w for phrase in phrases(column) for w in stems_of(phrase)}:
                used[word] += 1
                beside[word].update(named - UNITS - {"yrs", "mos"})
            for ways, sign in ((column.hi, 1), (column.lo, -1)):
                for word in {w for way in ways for w in TOKEN.findall(way.lower())}:
                    sorts[word].append(sign)
    return {
        "columns": {
            word: {h: round(n / used[word], 3) for h, n in sorted(of.items()) if n >= _SHARE * used[word]}
            for word, of in sorted(beside.items())
        },
        "sorts": {w: round(sum(s) / len(s), 2) for w, s in sorted(sorts.items()) if abs(sum(s)) > 0.6 * len(s)},
    }


def main() -> None:
    made = count(load_domains())
    ASSOCIATIONS.write_text(json.dumps(made, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
