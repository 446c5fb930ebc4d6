"""Models before and after a conversion, one after another: predictions of a text and answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upwell.bench.documents import WINDOW, Cut, Document, read_documents
from upwell.bench.quality import Predictions, Scores, loss_difference, paired_difference, predict, score
from upwell.bench.questions import load_judge, right_answers
from upwell.bench.record import table
from upwell.checkpoint import load_model
from upwell.checkpoint.match import read_config
from upwell.checkpoint.shards import read_shards
from upwell.checkpoint.sniff import sniff
from upwell.engine import Tokenizer
from upwell.errors import CheckpointError, InputError
from upwell.model import Transformer
from upwell.model.compiled import precision


@dataclass(frozen=True)
class Evaluation:
    """What is asked for. `models` are compared with `against`, where one is given, and it is measured first."""

    models: Sequence[Path]
    against: Path | None = None
    data: Path | None = None
    questions: Path | None = None
    window: int = WINDOW
    stride: int | None = None  # None: half the window
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None  # None: FP32 on the CPU, the checkpoint's own elsewhere
    kv_cache_dtype: torch.dtype | None = None  # of `models`; None: the model's own, as the reference has it; or INT8


def evaluate(
    job: Evaluation, say: Callable[[str], None] = lambda line: None, seen: Callable[[Transformer], None] | None = None
) -> list[dict[str, Any]]:
    """A row for each model, the reference's first. `say` hears what is being done, `seen` gets each model.

    Raises InputError for files and settings that can't be used, CheckpointError for models that can't be read.
    """
    if job.data is None and job.questions is None:
        raise InputError("nothing to measure on", "give --data FILE (.txt or .jsonl), --questions DIR, or both")
    judge = None if job.questions is None else load_judge(job.questions)
    asked = [] if judge is None else judge.load_questions()
    paths = [*([] if job.against is None else [job.against]), *job.models]
    if job.data is not None and not job.data.is_file():
        raise InputError(f"{job.data}: no such file", "give a text (.txt) or lines of JSON (.jsonl)")
    for path in paths:
        read_config(path)
        if not (kind := sniff(path)).readable:
            raise CheckpointError(f"{path}: {kind.name} can't be run", "give a checkpoint that upwell can load")
    device = torch.device(job.device)
    rows: list[dict[str, Any]] = []
    documents: list[Document] = []
    spoken: str | None = None  # the first model's tokenizer
    reference: tuple[Predictions, Scores] | None = None
    answered: list[bool] | None = None
    for path in paths:
        say(f"{path}: loading")
        held, products = precision(device, job.dtype, "exact")
        model = load_model(path, dtype=held, device=device)
        model.multiply_in(products)
        is_reference = job.against is not None and not rows
        model.cache_in(None if is_reference else job.kv_cache_dtype)
        tokenizer = Tokenizer.from_directory(path)
        if tokenizer is None:
            raise CheckpointError(f"{path}: has no tokenizer.json", "put the model's own beside its weights")
        if spoken not in (None, tokenizer.to_json()):
            raise InputError(f"{path}: its tokenizer isn't that of {paths[0]}", "compare models of one tokenizer")
        if seen is not None:
            seen(model)
        row: dict[str, Any] = {"model": str(path), "format": sniff(path).format, "kind": sniff(path).name,
                               "bytes": sum(tensor.nbytes for tensor in read_shards(path).values())}  # fmt: skip
        if model.cached is not None:
            row["kv_cache_dtype"] = str(model.cached).removeprefix("torch.")
        if job.data is not None:
            if spoken is None:
                stride = max(1, job.window // 2) if job.stride is None else job.stride
                cut = Cut(model.config.bos_token_id, job.window, stride)
                documents = read_documents(job.data, tokenizer, cut, model.config.max_position_embeddings)
            say(f"{path}: reading {sum(len(document.ids) for document in documents):,} tokens")
            predictions = predict(model, documents)
            scores = score(predictions, documents, None if reference is None else reference[0])
            row |= scores.summary()
            if reference is not None:
                row["loss_difference"] = loss_difference(scores, reference[1])
                if len(scores.whole):
                    pair = scores.whole.tolist(), reference[1].whole.tolist()
                    row["completions_difference"] = paired_difference(*pair)
            elif job.against is not None:
                reference = predictions, scores
        if judge is not None:
            say(f"{path}: answering {len(asked)} questions")
            right = right_answers(judge, model, tokenizer, asked)
            low, high = judge.wilson(sum(right), len(right))
            row["answers"] = {"right": sum(right), "total": len(right), "rate": sum(right) / len(right), "low": low,
                              "high": high}  # fmt: skip
            if answered is not None:
                row["answers_difference"] = paired_difference(right, answered)
            elif job.against is not None:
                answered = right
        spoken = tokenizer.to_json()
        rows.append(row)
        del model
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; shares in percent, differences in points with their 95 % intervals."""
    cells = [_cells(row) for row in rows]
    names = max(([*row] for row in cells), key=len)  # the reference has no differences
    return table([["", *names[1:]], *([row.get(name, "") for name in names] for row in cells)])


def _format(row: dict[str, Any]) -> str:
    return f"{row['format']}, KV {row['kv_cache_dtype']}" if "kv_cache_dtype" in row else row["format"]


def _cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {"model": Path(row["model"]).name, "format": _format(row), "MB": f"{row['bytes'] / 1e6:,.1f}"}
    if "perplexity" in row:
        cells["perplexity"] = f"{row['perplexity']:.4f}"
    if "kl" in row:
        cells["loss more by"] = _between(row["loss_difference"], 1, 4)
        cells |= {"KL": f"{row['kl']:.1e}", "same choice": _percent(row["same_first_choice"])}
    if "completions_right" in row:
        cells["completions right"] = _percent(row["completions_right"])
    if "completions_difference" in row:
        cells["their points"] = _between(row["completions_difference"], 100, 1)
    if "answers" in row:
        cells["answers right"] = _percent(row["answers"]["rate"])
    if "answers_difference" in row:
        cells["points"] = _between(row["answers_difference"], 100, 1)
    return cells


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _between(of: dict[str, float | None], scale: float, digits: int) -> str:
    middle, low, high = (
        "" if value is None else f"{scale * value:+.{digits}f}" for value in (of["difference"], of["low"], of["high"])
    )
    return f"{middle} ({low} to {high})" if low else middle
