"""Predictors for judge.py: upwell-nano as `upwell ask` uses it, and the keyword-rules control on the same linking."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from upwell.analyst.ask import Asker
from upwell.analyst.linking import link
from upwell.analyst.rules import draft_plan
from upwell.analyst.sources import OpenTable, open_table
from upwell.analyst.sql import to_sql

_asker: Asker | None = None
_opened: Path | None = None


def nano(path: Path, question: str) -> dict[str, Any]:
    """The embedded model, through the same Asker as the command line."""
    global _asker, _opened
    if _asker is None:
        _asker = Asker()
    if _opened != path:
        _asker.open(path)
        _opened = path
    answer = _asker.ask(question)
    return {"status": answer.status, "sql": answer.sql, "confidence": answer.confidence}


@cache
def _table(path: Path) -> OpenTable:
    return open_table(path)


def rules(path: Path, question: str) -> dict[str, Any]:
    """The control: linking and keyword rules, no model."""
    table = _table(path)
    linked = link(question, table.profile)
    plan, sure = draft_plan(table.profile, linked)
    if plan.kind == "noans":
        status = "unsure" if plan.reason == "ambiguous" else "refused"
        return {"status": status, "sql": None, "confidence": float(sure)}
    return {"status": "answer" if sure else "unsure", "sql": to_sql(plan, table.profile, linked.slots),
            "confidence": float(sure)}  # fmt: skip
