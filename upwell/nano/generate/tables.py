"""A domain to one concrete random table: which columns, under which headers, with which values."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from upwell.nano.generate.generic import coded_column, generic_domain
from upwell.nano.generate.lexicon import UNITS, ColumnSpec, Domain, keywords, words
from upwell.nano.generate.pools import draw

# Words that mean nearly the same, so that a question about one may be answered by the other.
_KIN = [
    frozenset(group.split())
    for group in (
        "price cost amount value charge fee fare revenue sale spend expense expenditure income money "
        "worth budget pay salary wage earning profit payment balance bill total turnover tariff rent",
        "date day when time datetime timestamp since deadline month",
        "name title label id number code identifier person who",
        "size area surface extent big large dimension",
        "height elevation altitude tall high depth",
        "length distance range long far duration hour minute age old year span",
        "weight mass heavy load",
        "score rating grade rank mark point star review quality",
        "count number quantity unit piece qty volume many",
        "type kind category class group sort genre segment",
        "place city location town region area country state site district province where zone",
        "status state stage phase condition outcome result",
        "speed velocity fast pace rate",
        "share percent percentage rate ratio fraction proportion",
        "company firm vendor supplier brand maker manufacturer producer client customer account",
    )
]


@dataclass(frozen=True)
class Column:
    """One column of a sampled table. `say` are the phrases that mean this column and no other."""

    spec: ColumnSpec
    header: str
    values: tuple[Any, ...]
    say: tuple[str, ...]
    hi: tuple[str, ...]
    lo: tuple[str, ...]
    opaque: bool = False
    unit: str = ""
    nulls: bool = False

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def coded(self) -> bool:
        return self.kind == "cat" and isinstance(next(iter(self.present()), ""), int)

    @property
    def header_words(self) -> str:
        return " ".join(words(self.header))

    def present(self) -> list[Any]:
        return [v for v in self.values if v is not None]


@dataclass(frozen=True)
class Table:
    """A table with what the questions need to know of it."""

    name: str
    domain: Domain
    entity: tuple[tuple[str, str], ...]
    columns: tuple[Column, ...]
    key: int | None
    label: int | None  # what stands for a row: the key, the repeated name of a panel, the day of a series
    label_entity: tuple[tuple[str, str], ...]
    left_out: tuple[ColumnSpec, ...]
    holders: dict[str, frozenset[int]] = field(repr=False)
    vocabulary: frozenset[str] = field(repr=False)

    def of_kind(self, *kinds: str) -> list[int]:
        return [i for i, c in enumerate(self.columns) if c.kind in kinds]


def related(phrase: str, vocabulary: Iterable[str]) -> bool:
    """Whether the phrase shares a word, or a near-synonym, with the vocabulary."""
    known = set(vocabulary)
    own = keywords(phrase)
    if own & known:
        return True
    if any(len(w) > 4 and any(k[:5] == w[:5] for k in known) for w in own):
        return True
    return any(own & kin and known & kin for kin in _KIN)


def _restyle(name: str, rng: Random) -> str:
    if rng.random() < 0.45:
        return name
    parts = words(name)
    if not parts:
        return name
    style = rng.choice(("snake", "snake", "snake", "Title", "Title", "camel", "Pascal", "UPPER", "lower", "First"))
    if style == "snake":
        return "_".join(parts)
    if style == "Title":
        return " ".join(p.capitalize() for p in parts)
    if style == "camel":
        return parts[0] + "".join(p.capitalize() for p in parts[1:])
    if style == "Pascal":
        return "".join(p.capitalize() for p in parts)
    if style == "UPPER":
        return "_".join(parts).upper()
    return " ".join(parts) if style == "lower" else " ".join(parts).capitalize()


def _header(spec: ColumnSpec, taken: set[str], rng: Random) -> str:
    says = [s for s in spec.say if len(s.split()) <= 3]
    for _ in range(8):
        base = rng.choice(says) if says and rng.random() < 0.2 else rng.choice(spec.names)
        name = _restyle(base, rng)
        if name.lower() not in taken:
            return name
    return next(f"{spec.names[0]}_{n}" for n in range(2, 99) if f"{spec.names[0]}_{n}".lower() not in taken)


def _opaque_header(taken: set[str], rng: Random) -> str:
    style = rng.choice(("c", "var", "col_", "F", "attr", "Q", "x_", "field", "V"))
    return next(name for _ in range(500) if (name := f"{style}{rng.randint(1, 40)}").lower() not in taken)


def _numbers(spec: ColumnSpec, count: int, rng: Random) -> list[Any]:
    low, high = float(spec.low), float(spec.high)
    shape = rng.choice(("uniform", "bell", "skewed"))
    digits = 0 if spec.integer else 2 if rng.random() < 0.5 or high - low < 10 else 1
    out: list[Any] = []
    for _ in range(count):
        if shape == "uniform":
            x = rng.uniform(low, high)
        elif shape == "bell":
            x = min(max(rng.gauss((low + high) / 2, (high - low) / 5), low), high)
        elif low > 0 and high / low > 20:
            x = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            x = low + (high - low) * rng.random() ** 2
        out.append(round(x) if spec.integer else round(x, digits))
    return out


def _weights(count: int, rng: Random) -> list[float]:
    return [rng.random() ** 1.5 + 0.15 for _ in range(count)]


def _values(spec: ColumnSpec, count: int, rng: Random) -> tuple[list[Any], bool]:
    """The column's values, and whether some are null."""
    out: list[Any]
    if spec.kind == "num":
        out = _numbers(spec, count, rng)
    elif spec.kind == "year":
        low, high = int(spec.low), int(spec.high)
        out = [rng.randint(low, high) for _ in range(count)]
    elif spec.kind == "date":
        low_d, high_d = dt.date.fromisoformat(str(spec.low)), dt.date.fromisoformat(str(spec.high))
        days = [low_d + dt.timedelta(days=rng.randint(0, (high_d - low_d).days)) for _ in range(count)]
        out = list(days) if rng.random() < 0.5 else [d.isoformat() for d in days]
    elif spec.kind == "flag":
        yes, no = rng.choice(((1, 0), (True, False), ("yes", "no"), ("Y", "N"), ("Yes", "No"), ("true", "false")))
        part = rng.uniform(0.15, 0.85)
        out = [yes if rng.random() < part else no for _ in range(count)]
        out[0], out[-1] = yes, no
    elif spec.kind == "key":
        names = list(spec.values) or draw(spec.pool or "code", count, rng)
        out = [*rng.sample(names, min(count, len(names)))]
        out += [None] * (count - len(out))
    elif spec.kind == "text":
        out = [
            rng.choice(spec.values) + (f"; {rng.choice(spec.values).lower()}" if rng.random() < 0.6 else "")
            for _ in range(count)
        ]
    else:
        chosen = list(spec.values)
        if len(chosen) > 4 and rng.random() < 0.5:
            chosen = rng.sample(chosen, rng.randint(3, len(chosen)))
        out = [*chosen, *rng.choices(chosen, _weights(len(chosen), rng), k=max(0, count - len(chosen)))]
        rng.shuffle(out)
        out = out[:count]
    if spec.kind == "cat" and all(v.isdigit() for v in spec.values):
        out = [int(v) for v in out]
    nulls = spec.kind not in ("key", "flag") and rng.random() < 0.25
    if nulls:
        part = rng.uniform(0.04, 0.25)
        out = [None if rng.random() < part else v for v in out]
        out[-1] = None
    return out, nulls


def _unit(header: str, spec: ColumnSpec) -> str:
    sized = {"length", "height", "depth", "altitude", "elevation", "width", "distance", "elev", "len", "alt"}
    for word in reversed(words(header)):
        # A single letter may be anything, unless what is measured is named.
        if word in UNITS and (len(word) > 1 or (word == "m" and sized & set(words(header)))):
            return word
    if "%" in header:
        return "pct"
    for name in spec.names:
        for word in words(name)[1:]:
            if word in UNITS and len(word) > 1:
                return word
    return ""


def _phrases(spec: ColumnSpec) -> list[str]:
    return [*spec.say, *(" ".join(words(n)) for n in spec.names)]


def _own_phrases(index: int, specs: Sequence[ColumnSpec], headers: Sequence[str]) -> tuple[str, ...]:
    """The phrases of one column that no other column of the table could be meant by."""
    others = [
        keywords(phrase)
        for j, spec in enumerate(specs)
        if j != index
        for phrase in [*_phrases(spec), " ".join(words(headers[j]))]
    ]
    own_header = keywords(" ".join(words(headers[index])))
    kept = []
    for phrase in specs[index].say:
        keys = keywords(phrase)
        if not any(keys <= other for other in others) or (
            keys == own_header and not any(keywords(" ".join(words(h))) >= keys
                                           for j, h in enumerate(headers) if j != index)
        ):  # fmt: skip
            kept.append(phrase)
    return tuple(kept)


def _choose(domain: Domain, domains: Sequence[Domain], rng: Random) -> tuple[list[ColumnSpec], list[ColumnSpec]]:
    count = min(len(domain.columns), rng.choice((4, 5, 6, 7, 7, 8, 8, 9, 10, 11, 12, 14)))
    chosen = sorted(rng.sample(range(len(domain.columns)), count))
    keys = [i for i, c in enumerate(domain.columns) if c.kind == "key"]
    if keys and keys[0] not in chosen and rng.random() < 0.85:
        chosen[0] = keys[0]
    specs = [domain.columns[i] for i in sorted(set(chosen))]
    if not any(s.kind == "num" for s in specs):
        specs += [s for s in domain.columns if s.kind == "num"][:2]
    left = [c for c in domain.columns if c not in specs]
    if rng.random() < 0.3 and len(specs) < 15:
        vocabulary = {w for s in domain.columns for p in _phrases(s) for w in keywords(p)}
        other = rng.choice(domains)
        for spec in rng.sample(other.columns, min(len(other.columns), rng.randint(1, 3))):
            clash = any(keywords(p) & vocabulary for p in _phrases(spec))
            if spec.kind != "key" and not clash:
                # Its verbs and superlatives belong to the other domain's rows.
                specs.append(replace(spec, verb=(), hi=(), lo=(), more=(), less=(), ask=()))
    if rng.random() < 0.07:
        extra = coded_column(rng)
        if not any(keywords(p) & keywords(extra.say[0]) for s in domain.columns for p in _phrases(s)):
            specs.append(extra)
    return specs, left


def sample_table(domains: Sequence[Domain], rng: Random) -> Table:
    """A random table of a random domain: 4 to 17 columns, 12 to 80 rows."""
    generic = rng.random() < 0.06
    domain = generic_domain(rng) if generic else rng.choice(domains)
    specs, left = (list(domain.columns), []) if generic else _choose(domain, domains, rng)
    rng.shuffle(specs)
    if rng.random() < 0.6:
        specs.sort(key=lambda s: s.kind != "key")
    rows = rng.randint(20, 80)
    panel = _panel(domain, specs, rng) if rng.random() < 0.16 else None
    if panel is None and rng.random() < 0.2:
        _number_rows(domain, specs, rng)
    series = _series(specs, rng) if panel is None and rng.random() < 0.09 else None
    for spec in specs:
        if spec.kind == "key" and spec.values:
            rows = min(rows, len(spec.values))
    all_opaque = rng.random() < 0.015
    opaque_count = len(specs) if all_opaque else rng.choice((1, 2, 3)) if rng.random() < 0.08 else 0
    opaque = set(rng.sample(range(len(specs)), min(opaque_count, len(specs))))
    headers: list[str] = []
    for i, spec in enumerate(specs):
        taken = {h.lower() for h in headers}
        headers.append(_opaque_header(taken, rng) if i in opaque else _header(spec, taken, rng))
    data = [_values(spec, rows, rng) for spec in specs]
    if series is not None:
        place = next(i for i, spec in enumerate(specs) if spec is series.spec)
        data[place] = series.values(rows, rng), False
    key = _key(domain, specs, opaque)
    superlatives: dict[str, int] = {}
    for i, spec in enumerate(specs):
        for word in {*spec.hi, *spec.lo}:
            superlatives[word] = superlatives.get(word, 0) + (2 if i in opaque else 1)
    columns = []
    for i, spec in enumerate(specs):
        say = () if i in opaque else _own_phrases(i, specs, headers)
        columns.append(
            Column(
                spec=_nameless(spec) if i in opaque else spec,
                header=headers[i],
                values=tuple(data[i][0]),
                say=say,
                hi=tuple(w for w in spec.hi if superlatives[w] == 1),
                lo=tuple(w for w in spec.lo if superlatives[w] == 1),
                opaque=i in opaque,
                unit="" if i in opaque else _unit(headers[i], spec),
                nulls=data[i][1],
            )
        )
    holders: dict[str, set[int]] = {}
    for i, column in enumerate(columns):
        if column.kind in ("cat", "key", "text"):
            for value in column.present():
                where = holders.setdefault(str(value).lower(), set())
                where |= {i, -1} if column.coded else {i}  # -1: a bare number is nobody's own
    vocabulary = {w for s, h in zip(specs, headers, strict=True)
                  for p in [*_phrases(s), " ".join(words(h)), *s.hi, *s.lo, *s.yes, *s.no, *s.ask, *s.verb]
                  for w in keywords(p)}  # fmt: skip
    vocabulary |= {w for pair in domain.entity for w in keywords(pair[0])}
    plain = (("row", "rows"), ("record", "records"))
    label, label_entity = _named_key(domain, specs, key), domain.entity
    if panel is not None:
        entity: tuple[tuple[str, str], ...] = (*plain, ("entry", "entries"), ("observation", "observations"))
        label = next(i for i, spec in enumerate(specs) if spec is panel)
    elif series is not None:
        entity = label_entity = ((series.one, series.one + "s"),)
        label = next(i for i, spec in enumerate(specs) if spec is series.spec)
    else:
        entity = domain.entity if rng.random() < 0.93 else (*domain.entity, *plain)
    if label in opaque:
        label = None
    return Table(
        name=rng.choice(domain.tables),
        domain=domain,
        entity=entity,
        columns=tuple(columns),
        key=key,
        label=label,
        label_entity=label_entity,
        left_out=tuple(left),
        holders={value: frozenset(where) for value, where in holders.items()},
        vocabulary=frozenset(vocabulary),
    )


_PANEL = frozenset("person company city country team brand product software school animal".split())


@dataclass(frozen=True)
class _Series:
    """A table with one row a day, month or year, which has no other name."""

    spec: ColumnSpec
    one: str

    def values(self, count: int, rng: Random) -> list[Any]:
        if self.one == "year":
            first = rng.randint(1900, 2020 - count)
            return list(range(first, first + count))
        first_day = dt.date(rng.randint(1995, 2022), rng.randint(1, 12), 1)
        if self.one == "day":
            days = [first_day + dt.timedelta(days=i) for i in range(count)]
        else:
            days = [dt.date(first_day.year + (first_day.month - 1 + i) // 12, (first_day.month - 1 + i) % 12 + 1, 1)
                    for i in range(count)]  # fmt: skip
        return list(days) if rng.random() < 0.5 else [d.isoformat() for d in days]


def _series(specs: list[ColumnSpec], rng: Random) -> _Series | None:
    """Drop what names the rows, so that only their time does. None if there is no time, or too little else."""
    times = [s for s in specs if s.kind in ("date", "year")]
    if not times or sum(s.kind == "num" for s in specs) < 2:
        return None
    time = times[0]
    specs[:] = [s for s in specs if s.kind != "key" and (s is time or s not in times)]
    names: tuple[str, ...] = ("date", "Date", "day", "obs_date")
    say: tuple[str, ...] = ("date", "day")
    if time.kind == "year":
        names, say = ("year", "Year", "yr"), ("year",)
    plain = replace(time, verb=(), hi=(), lo=(), more=(), less=(), ask=(), say=say, names=names)
    specs[specs.index(time)] = plain
    return _Series(plain, "year" if time.kind == "year" else rng.choice(("day", "day", "day", "month")))


def _panel(domain: Domain, specs: list[ColumnSpec], rng: Random) -> ColumnSpec | None:
    """Turn the key into a column whose names repeat, as in a table of countries by year."""
    keys = [i for i, s in enumerate(specs) if s.kind == "key" and s == _first_key(domain)]
    if not keys or not any(s.kind in ("date", "year") for s in specs):
        return None
    key = specs[keys[0]]
    if not key.values and key.pool not in _PANEL:
        return None
    names = rng.sample(key.values, min(len(key.values), 9)) if key.values else draw(key.pool, rng.randint(4, 9), rng)
    own = tuple(pair[0] for pair in domain.entity)
    specs[keys[0]] = replace(
        key,
        kind="cat",
        values=tuple(names),
        say=tuple(dict.fromkeys((*own, *own, *key.say))),
        prepositions=("of", "for", "for"),
    )
    return specs[keys[0]]


def _number_rows(domain: Domain, specs: list[ColumnSpec], rng: Random) -> None:
    """Add a code beside the names of the rows: "employee_id" beside "name". A person who lists the rows wants names."""
    first = _first_key(domain)
    keys = [s for s in specs if s.kind == "key"]
    if first is None or keys != [first] or first.pool == "code":
        return
    one = domain.entity[0][0]
    short = one.split()[-1]
    names = (f"{one} id", f"{short}_id", f"{short}_no", f"{short.capitalize()}ID", f"{short} code", "id", "ID", "No.")
    code = ColumnSpec("key", names, (f"{one} id", f"{one} number", f"{short} code", "id", "id number"), pool="code")
    specs.insert(0 if rng.random() < 0.7 else rng.randint(0, len(specs)), code)


def _named_key(domain: Domain, specs: Sequence[ColumnSpec], key: int | None) -> int | None:
    """What rows are listed by: their names where the table has both a code and a name for them."""
    if key is None or specs[key].pool != "code":
        return key
    own = {"name", "title", "description"} | {w for one, _ in domain.entity for w in words(one)}
    named = [i for i, s in enumerate(specs) if s.kind == "key" and s.pool != "code" and set(words(s.names[0])) <= own]
    return named[0] if named else key


def _first_key(domain: Domain) -> ColumnSpec | None:
    return next((c for c in domain.columns if c.kind == "key"), None)


def _nameless(spec: ColumnSpec) -> ColumnSpec:
    """Of a column with an opaque header nothing but that header and its cells can be meant."""
    return replace(spec, verb=(), hi=(), lo=(), more=(), less=(), ask=(), yes=(), no=())


def _key(domain: Domain, specs: Sequence[ColumnSpec], opaque: set[int]) -> int | None:
    """The column that names the rows: the domain's first key, if it is in the table."""
    first = _first_key(domain)
    if first is None or first not in specs:
        return None
    index = specs.index(first)
    return None if index in opaque else index
