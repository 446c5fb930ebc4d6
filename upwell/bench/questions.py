"""A model of nano's kind on a set of questions about tables, judged by the set's own judge.py.

The judge is no part of the package: `benchmarks/questions` of a checkout has it, with the questions and their tables.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from upwell.analyst.ask import Asker
from upwell.engine import LLM, Tokenizer
from upwell.errors import InputError
from upwell.model import Transformer

BATCH = 8  # questions the model reads at once, each under several column orders


def load_judge(directory: Path) -> Any:
    """The module DIR/judge.py. Raises InputError where there is none."""
    file = directory / "judge.py"
    if not file.is_file():
        raise InputError(f"{directory}: has no judge.py", "give benchmarks/questions of a checkout")
    spec = importlib.util.spec_from_file_location("upwell_questions_judge", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def right_answers(judge: Any, model: Transformer, tokenizer: Tokenizer | None, questions: Sequence[Any]) -> list[bool]:
    """Whether each question is answered rightly, by the judge's rule."""
    asker = Asker(LLM.from_model(model, tokenizer, max_num_seqs=128))
    bench = judge.Judge()
    right: dict[str, bool] = {}
    for table, group in groupby(sorted(questions, key=lambda q: q.table), key=lambda q: q.table):
        same = list(group)
        asker.open(bench.path(table))
        for begin in range(0, len(same), BATCH):
            part = same[begin : begin + BATCH]
            for question, answer in zip(part, asker.ask_all([q.question for q in part]), strict=True):
                right[question.id] = bench.right(question, answer.status, answer.sql)
    return [right[question.id] for question in questions]
