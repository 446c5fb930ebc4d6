"""The prompt that nano reads: the table's schema, the question with its marks inline, and a draft of the plan.

The draft is what keyword rules read (analyst/rules.py). Nano confirms or corrects it, which is far sooner learned than
writing every plan from nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from upwell.analyst.plan import PLAN_TOKENS, plan_tokens
from upwell.analyst.rules import Draft
from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.slots import LinkedQuestion, Mark
from upwell.analyst.words import COMMON, split_name, stem

_KINDS = tuple(f"<{kind.value}>" for kind in ColumnKind)
# `<year>` is both a column's kind and a plan's word: one token.
SPECIAL_TOKENS: tuple[str, ...] = tuple(dict.fromkeys((*PLAN_TOKENS, *_KINDS, "<~>", "<schema>", "<ask>", "<plan>")))
_SAMPLED = {ColumnKind.KEY: 2, ColumnKind.TEXT: 2, ColumnKind.CAT: 3, ColumnKind.FLAG: 2}
_ROLES = (ColumnKind.KEY, ColumnKind.DATE, ColumnKind.YEAR)
_TAG = re.compile(r"<(?=[a-z~/])", re.IGNORECASE)


def render_prompt(profile: TableProfile, linked: LinkedQuestion, order: Sequence[int], draft: Draft) -> str:
    """`order[k]` is the real column shown at place k, which the text and the plan call <Ck>."""
    place = {column: k for k, column in enumerate(order)}
    parts = ["<schema>", plain(profile.name)]
    for k, c in enumerate(order):
        column = profile.columns[c]
        parts += [f"<C{k}>", f"<{column.kind.value}>", plain(" ".join(column.words) or column.name)]
        samples = column.samples[: _SAMPLED.get(column.kind, 0)]
        if samples:
            parts.append(": " + " | ".join(plain(sample) for sample in samples))
    parts.append("<ask>")
    rows = _row_stems(profile.name)
    for text, marks in linked.segments:
        parts.append(_with_rows_marked(plain(text), rows))
        for mark in marks:
            parts += _render_mark(mark, place)
            if mark.kind == "N" and linked.slots.numbers[mark.index].year:
                parts.append("<year>")  # it may also be a period, for conditions on dates
    parts += _roles(profile, order)
    parts += [*([] if draft.sure else ["<~>"]), *plan_tokens(draft.plan, order)[:-1]]
    parts.append("<plan>")
    return " ".join(part for part in parts if part)


def _row_stems(name: str) -> frozenset[str]:
    """Stems of the words by which a question can mean the table's rows: the words of its name, and "rows" itself."""
    named = {stem(word) for word in split_name(name) if word not in COMMON and len(word) > 2}
    return frozenset(named | {"row", "record", "entry"})


def _with_rows_marked(text: str, rows: frozenset[str]) -> str:
    """`<schema>` behind each word that means the rows: with such a noun a question is hardly about something else."""
    words = [f"{word} <schema>" if stem(word.strip("?.,!'")) in rows else word for word in text.split()]
    return " ".join(words)


def _roles(profile: TableProfile, order: Sequence[int]) -> list[str]:
    """The columns that name rows or place them in time, once more, just before the plan: most plans need one."""
    parts = []
    for kind in _ROLES:
        places = [k for k, c in enumerate(order) if profile.columns[c].kind is kind]
        for k in places[:2]:
            parts += [f"<{kind.value}>", f"<C{k}>"]
    return parts


def _render_mark(mark: Mark, place: dict[int, int]) -> list[str]:
    columns = [f"<C{place[c]}>" for c in mark.columns if c in place]
    if mark.kind == "C":
        return ["<~>", *columns] if mark.partial and columns else columns
    return [f"<{mark.kind}{mark.index}>", *columns]


def plain(text: str) -> str:
    """Lower-case, one space between words, and no text that reads as a special token."""
    return _TAG.sub("< ", " ".join(text.lower().split()))
