"""Tables about nothing in particular, and categories written as numbers."""

from __future__ import annotations

from random import Random

from upwell.nano.generate.lexicon import ColumnSpec, Domain

_GENERIC_NUM = "value score amount x1 x2 y metric total level index rate measure reading n val z points"
_GENERIC_CAT = "type group category class label status segment kind set batch bucket family mode"
_GENERIC_VALUES = (
    "red blue green yellow black white", "alpha beta gamma delta", "north south east west",
    "low medium high", "A1 B2 C3 D4", "control treated", "small medium large", "gold silver bronze",
    "old new", "open closed pending", "K1 K2 K3", "standard premium", "first second third",
    "morning noon evening", "online offline", "cat1 cat2 cat3 cat4", "internal external partner",
)  # fmt: skip


def generic_domain(rng: Random) -> Domain:
    """A table about nothing in particular, so that only the words of the headers help."""
    columns = []
    for name in rng.sample(_GENERIC_NUM.split(), rng.randint(2, 5)):
        high = rng.choice((1, 10, 100, 1000, 50000))
        columns.append(ColumnSpec("num", (name,), (name,), low=0, high=high, integer=high > 10 and rng.random() < 0.6))
    sets = rng.sample(_GENERIC_VALUES, 4)
    for name, values in zip(rng.sample(_GENERIC_CAT.split(), rng.randint(1, 3)), sets, strict=False):
        columns.append(ColumnSpec("cat", (name,), (name,), values=tuple(values.split())))
    if rng.random() < 0.5:
        columns.append(ColumnSpec("key", ("name", "id", "item", "label id"), ("name",), pool="code"))
    if rng.random() < 0.4:
        columns.append(ColumnSpec("date", ("date", "day", "ts", "created"), ("date",),
                                  low="2015-01-01", high="2024-12-31"))  # fmt: skip
    if rng.random() < 0.3:
        columns.append(ColumnSpec("flag", ("ok", "valid", "passed", "active"), ("valid",),
                                  yes=("valid",), no=("invalid",)))  # fmt: skip
    entity = rng.choice((("row", "rows"), ("record", "records"), ("item", "items"), ("entry", "entries")))
    return Domain(("data", "table1", "export", "results"), (entity,), tuple(columns),
                  ("humidity", "phone number", "gender", "cost of shipping", "latitude"))  # fmt: skip


_CODED = (
    (("class", "pclass", "Class"), ("class",)),
    (("zone", "delivery_zone", "Zone"), ("zone",)),
    (("cluster", "cluster_id", "Cluster"), ("cluster",)),
    (("risk_class", "Risk Class"), ("risk class",)),
    (("size class", "SizeClass"), ("size class",)),
    (("customer type", "type"), ("type",)),
    (("category", "Category"), ("category",)),
    (("label", "target_label"), ("label",)),
)


def coded_column(rng: Random) -> ColumnSpec:
    """A category written as small integers: cells are asked for as "class 2", never as "2"."""
    names, say = rng.choice(_CODED)
    first = rng.choice((1, 1, 1, 0))
    return ColumnSpec("cat", names, say, values=tuple(str(n) for n in range(first, first + rng.randint(3, 5))))
