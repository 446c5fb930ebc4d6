"""The domains: what tables of the world hold and the words people use for it (data files)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from upwell.errors import UpwellError

DOMAINS = Path(__file__).parent.parent / "domains"

UNITS = {
    "kg": ("kg", "kilos"), "g": ("g", "grams"), "lb": ("lb", "pounds"), "lbs": ("lbs", "pounds"),
    "cm": ("cm",), "mm": ("mm",), "m": ("m", "meters"), "km": ("km", "kilometers"),
    "mi": ("miles",), "miles": ("miles",), "ft": ("ft", "feet"), "usd": ("$", "dollars", "USD"),
    "eur": ("€", "euros", "EUR"), "gbp": ("£", "pounds"), "pct": ("%", "percent"),
    "percent": ("%", "percent"), "min": ("minutes", "min"), "mins": ("minutes",),
    "minutes": ("minutes",), "sec": ("seconds",), "s": ("seconds",), "hrs": ("hours",),
    "hours": ("hours",), "h": ("hours", "h"), "days": ("days",), "years": ("years",),
    "months": ("months",), "c": ("degrees", "°C"), "mb": ("MB",), "gb": ("GB",), "ms": ("ms",),
    "l": ("liters",), "ml": ("ml",), "kwh": ("kWh",), "ha": ("hectares",), "sqm": ("m2", "sqm"),
    "sqft": ("sq ft", "square feet"), "mph": ("mph",), "kmh": ("km/h",),
}  # fmt: skip
_STOP = frozenset("a an the of for in on to per by and or at is it its their".split())
_PIECES = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")


def words(name: str) -> list[str]:
    """A header's words, lower-case: `hireDate`, `HIRE_DATE`, `Hire date` -> hire, date."""
    return [piece.lower() for piece in _PIECES.findall(name)]


def stem(word: str) -> str:
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


@lru_cache(maxsize=1 << 16)
def keywords(phrase: str) -> frozenset[str]:
    """The phrase's significant word stems, without units."""
    kept = [stem(w) for w in words(phrase.replace("'s", "")) if w not in _STOP]
    return frozenset(w for w in kept if w not in UNITS) or frozenset(kept)


_IRREGULAR = {
    "person": "people", "child": "children", "man": "men", "woman": "women", "foot": "feet",
    "mouse": "mice", "tooth": "teeth", "staff": "staff", "series": "series", "species": "species",
    "sheep": "sheep", "aircraft": "aircraft", "criterion": "criteria", "leaf": "leaves",
    "shelf": "shelves", "wife": "wives", "life": "lives", "half": "halves", "analysis": "analyses",
    "diagnosis": "diagnoses", "equipment": "equipment", "software": "software", "fish": "fish",
    "crew": "crew", "status": "statuses", "gas": "gases", "bus": "buses", "hero": "heroes",
    "potato": "potatoes", "loaf": "loaves", "knife": "knives",
}  # fmt: skip


# Headers such as "held_at" or "signed up" end in a word that has no plural.
NO_NOUN = frozenset("at on by in to of for up out here there with from off".split())


def plural(phrase: str) -> str:
    """The plural of a noun phrase: its last word's, or the head's before `of`."""
    head, of, tail = phrase.partition(" of ")
    if of:
        return plural(head) + of + tail
    start, _, last = phrase.rpartition(" ")
    if last in NO_NOUN or (last.endswith("ed") and len(last) > 4):
        return phrase
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "men", "people", "children")) and not last.endswith(("ss", "us", "is")):
        pass
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in ("a", "e", "i", "o", "u"):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{start} {last}" if start else last


@dataclass(frozen=True)
class ColumnSpec:
    """One column a domain's tables may have (see the fields of the data files)."""

    kind: str
    names: tuple[str, ...]
    say: tuple[str, ...]
    pool: str = ""
    values: tuple[str, ...] = ()
    said: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    prepositions: tuple[str, ...] = ()
    low: Any = 0
    high: Any = 100
    integer: bool = False
    additive: bool = False
    hi: tuple[str, ...] = ()
    lo: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
    verb: tuple[str, ...] = ()
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    tables: tuple[str, ...]
    entity: tuple[tuple[str, str], ...]
    columns: tuple[ColumnSpec, ...]
    missing: tuple[str, ...]
    ambiguous: tuple[tuple[tuple[str, ...], ...], ...] = ()


def _column(raw: dict[str, Any]) -> ColumnSpec:
    low, high = raw.get("range") or (0, 100)
    names = {key: tuple(str(x) for x in raw.get(key, ())) for key in
             ("names", "say", "values", "hi", "lo", "more", "less", "ask", "verb", "yes", "no")}  # fmt: skip
    said = {str(value): tuple([ways] if isinstance(ways, str) else ways) for value, ways in raw.get("said", {}).items()}
    return ColumnSpec(
        kind=raw["kind"],
        pool=raw.get("pool", ""),
        said=said,
        prepositions=tuple(raw.get("in", ())),
        low=low,
        high=high,
        integer=bool(raw.get("int", False)),
        additive=bool(raw.get("add", False)),
        **names,
    )


def _entity(raw: str | Sequence[str]) -> tuple[str, str]:
    return (raw, plural(raw)) if isinstance(raw, str) else (raw[0], raw[1])


def load_domains(folder: Path = DOMAINS) -> list[Domain]:
    """Every domain of the folder's JSONL files, in order of file name and line."""
    domains = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
                domains.append(
                    Domain(
                        tables=tuple(raw["table"]),
                        entity=tuple(_entity(e) for e in raw["entity"]),
                        columns=tuple(_column(c) for c in raw["columns"]),
                        missing=tuple(raw.get("missing", ())),
                        ambiguous=tuple(tuple(tuple(part) for part in group) for group in raw.get("ambiguous", ())),
                    )
                )
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise UpwellError(
                    f"{path.name}:{number}: not a domain ({error!r})", "fix that line of the file"
                ) from error
    if not domains:
        raise UpwellError(f"no domains in {folder}", "put the *.jsonl files of the recipe there")
    return domains
