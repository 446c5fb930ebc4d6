"""Predictors for judge.py: upwell-nano as `upwell ask` uses it, and the keyword-rules control on the same linking."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from upwell.analyst.ask import Asker
from upwell.analyst.linking import link
from upwell.analyst.rules import draft_plan
from upwell.analyst.sources import OpenTable, open_table
from upwell.analyst.sql import to_sql
from upwell.engine import LLM
from upwell.engine.tokenizer import Tokenizer
from upwell.nano.export import load_run


class _Analyst:
    """Answers through the same Asker as the command line; keeps the last table open."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.opened: Path | None = None

    def __call__(self, path: Path, question: str) -> dict[str, Any]:
        if self.opened != path:
            self.asker.open(path)
            self.opened = path
        answer = self.asker.ask(question)
        return {"status": answer.status, "sql": answer.sql, "confidence": answer.confidence}


@cache
def _embedded(dtype: torch.dtype | None = None) -> _Analyst:
    return _Analyst(Asker(LLM(device="cpu", dtype=dtype)))


@cache
def _trained() -> _Analyst:
    run = Path(os.environ["UPWELL_RUN"])
    return _Analyst(Asker(LLM.from_model(load_run(run), Tokenizer.from_directory(run))))


def nano(path: Path, question: str) -> dict[str, Any]:
    """The embedded model as shipped."""
    return _embedded()(path, question)


def nano_bf16(path: Path, question: str) -> dict[str, Any]:
    """The same in BF16 (`--dtype bfloat16`): the kernels multiply rounded operands."""
    return _embedded(torch.bfloat16)(path, question)


def trained(path: Path, question: str) -> dict[str, Any]:
    """The model of the training run in $UPWELL_RUN, in FP32, before it is rounded to the shipped formats."""
    return _trained()(path, question)


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
