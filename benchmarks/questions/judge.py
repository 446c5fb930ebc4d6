"""Judges an analyst on the held-out questions by execution accuracy.

    python benchmarks/questions/judge.py --predictor upwell.analyst:ask_file [--json OUT.json]

A predictor is a callable `(table_path, question) -> {"status": "answer" | "unsure" | "refused",
"sql": str | None, "confidence": float}`; its SQL names the table `t` (or the file's stem).

An answerable question is right when the prediction's SQL gives the gold SQL's rows both on the
table and on a perturbed copy, where a query that is right by luck falls apart. An "unsure" counts
by the SQL of its best reading, a refusal never. An unanswerable question is right when refused; an
ambiguous one also when "unsure". This file imports nothing of upwell: it is an outside judge.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import permutations
from pathlib import Path
from typing import Any

import duckdb

HERE = Path(__file__).parent
Row = Sequence[object]
Predictor = Callable[[Path, str], dict[str, Any]]

MAX_EXTRA_COLUMNS = 2
FLAG_VALUES = [{"yes", "no"}, {"y", "n"}, {"true", "false"}, {"t", "f"}]
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True)
class Question:
    """One line of test.jsonl; `reason` is missing, ambiguous or notdata when not answerable."""

    id: str
    table: str
    question: str
    kind: str
    sql: str | None
    answerable: bool
    reason: str | None


def load_questions(path: Path = HERE / "test.jsonl") -> list[Question]:
    return [Question(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


# Comparing results


def judge(
    predicted_rows: Sequence[Row],
    predicted_columns: Sequence[str],
    gold_rows: Sequence[Row],
    ordered: bool,
    share: bool = False,
) -> bool:
    """Whether some choice of distinct predicted columns holds exactly the gold rows.

    Up to two more predicted columns are fine, more or fewer rows never. Names and order of columns
    don't matter; order of rows does when `ordered`. With `share` a number may be a part of 1 where
    the gold is a percentage.
    """
    if len(predicted_rows) != len(gold_rows):
        return False
    if not gold_rows:
        return True
    width = len(gold_rows[0])
    if not width <= len(predicted_columns) <= width + MAX_EXTRA_COLUMNS:
        return False
    gold = [[_cell(v) for v in row] for row in gold_rows]
    predicted = [[_cell(v) for v in row] for row in predicted_rows]
    return any(
        _same_rows([[row[i] for i in chosen] for row in predicted], gold, ordered, scale)
        for scale in ((1.0, 100.0) if share else (1.0,))
        for chosen in permutations(range(len(predicted_columns)), width)
    )


def _cell(value: object) -> str | float | None:
    """A result's cell as a float, None, or text in which one date has one spelling."""
    if value is None or isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = str(value).lower()
    elif hasattr(value, "isoformat"):
        text = str(value)
    else:
        return float(value)  # type: ignore[arg-type]  # int, float, Decimal
    if text is None:
        return None
    text = text.removesuffix("+00").removesuffix(" 00:00:00").removesuffix("T00:00:00")
    return text[:3] if text.lower() in WEEKDAYS else text


def _same_rows(
    predicted: list[list[Any]], gold: list[list[Any]], ordered: bool, scale: float
) -> bool:
    if scale != 1.0:
        predicted = [[v * scale if isinstance(v, float) else v for v in row] for row in predicted]
    if not ordered:
        predicted, gold = sorted(predicted, key=_sort_key), sorted(gold, key=_sort_key)
    return all(
        _same_cell(p, g) for row, right in zip(predicted, gold, strict=True)
        for p, g in zip(row, right, strict=True)
    )  # fmt: skip


def _sort_key(row: list[Any]) -> tuple[list[str], list[float]]:
    """Text first, by itself decisive in most results, so that noise in the numbers is harmless."""
    texts = [_period(v) if isinstance(v, str) else "" for v in row if not isinstance(v, float)]
    return texts, [v for v in row if isinstance(v, float)]


def _period(text: str) -> str:
    """'2006-03' for the day '2006-03-01' as well: one month, spelled in two ways."""
    return text[:7] if len(text) == 10 and text.endswith("-01") and text[4] == "-" else text


def _same_cell(predicted: object, gold: object) -> bool:
    if isinstance(predicted, float) and isinstance(gold, float):
        return _same_number(predicted, gold)
    if isinstance(predicted, str) and isinstance(gold, str):
        return predicted == gold or _period(predicted) == _period(gold) != gold
    if isinstance(predicted, str) and isinstance(gold, float):  # a year: 2006 is 2006-01-01
        return predicted in (f"{gold:.0f}-01-01", f"{gold:.0f}")
    return predicted is None and gold is None


def _same_number(predicted: float, gold: float) -> bool:
    """Equal to 1e-6 relative, or a rounding of the gold that keeps at least three digits."""
    if math.isnan(predicted) or math.isnan(gold):
        return math.isnan(predicted) and math.isnan(gold)
    if math.isclose(predicted, gold, rel_tol=1e-6, abs_tol=1e-12):
        return True
    decimals = len(repr(predicted).partition(".")[2])
    digits = len(f"{abs(predicted):.{decimals}f}".replace(".", "").lstrip("0"))
    return digits >= 3 and abs(predicted - gold) <= 0.5000001 * 10.0**-decimals


# The tables


def load_table(path: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory database holding the CSV as `t`, also under the file's name."""
    db = duckdb.connect()
    db.execute("CREATE TABLE t AS SELECT * FROM read_csv_auto(?)", [str(path)])
    if path.stem != "t":
        db.execute(f'CREATE VIEW "{path.stem}" AS SELECT * FROM t')
    return db


def perturb(table: duckdb.DuckDBPyConnection, seed: int = 7) -> duckdb.DuckDBPyConnection:
    """A deterministic copy of `t` in which a right query is still right and luck isn't.

    A tenth of the rows is dropped. Flags and numbers of few values are reshuffled among the rows;
    years and integer keys stay; every other number is scaled per row by 0.75 to 1.25, keeping its
    decimals. Text and dates stay, so that the question's words mean the same.
    """
    rng = random.Random(seed)
    columns = [(str(n), str(t)) for n, t, *_ in table.execute("DESCRIBE t").fetchall()]
    rows = table.execute("SELECT * FROM t").fetchall()
    dropped = set(rng.sample(range(len(rows)), k=max(1, len(rows) // 10)))
    rows = [row for i, row in enumerate(rows) if i not in dropped]
    cells = [
        _perturb_column([row[i] for row in rows], kind, rng) for i, (_, kind) in enumerate(columns)
    ]
    copy = duckdb.connect()
    fields = ", ".join(f'"{name}" {kind}' for name, kind in columns)
    copy.execute(f"CREATE TABLE t ({fields})")
    marks = ", ".join("?" * len(columns))
    copy.executemany(f"INSERT INTO t VALUES ({marks})", [list(r) for r in zip(*cells, strict=True)])
    views = "SELECT view_name FROM duckdb_views() WHERE NOT internal"
    for (view,) in table.execute(views).fetchall():
        copy.execute(f'CREATE VIEW "{view}" AS SELECT * FROM t')
    return copy


def _perturb_column(values: list[Any], kind: str, rng: random.Random) -> list[Any]:
    present = [v for v in values if v is not None]
    distinct = set(present)
    integer = kind.endswith("INT") or kind == "INTEGER"
    number = integer or kind == "DOUBLE"
    if integer and all(1800 <= v <= 2100 for v in distinct):
        return values  # years
    if integer and len(distinct) == len(present) and max(present) < 1000:
        return values  # a key, such as a code
    flag = kind == "BOOLEAN" or {str(v).lower() for v in distinct} in FLAG_VALUES
    if flag or (number and len(distinct) <= 40 and len(distinct) < len(present) / 5):
        rng.shuffle(present)
        shuffled = iter(present)
        return [None if v is None else next(shuffled) for v in values]
    if number:
        decimals = None if integer else max(len(repr(v).partition(".")[2]) for v in present)
        return [None if v is None else round(v * rng.uniform(0.75, 1.25), decimals) for v in values]
    return values


# Judging a predictor


@dataclass(frozen=True)
class Verdict:
    """How one question went; holds no wording, so that results can be shown while tuning."""

    id: str
    table: str
    kind: str
    answerable: bool
    status: str
    confidence: float
    right: bool


class Judge:
    """Holds the tables and their perturbed copies, and tells right predictions from wrong."""

    def __init__(self, tables: Path = HERE / "tables") -> None:
        self.tables = tables
        self._pairs: dict[str, tuple[duckdb.DuckDBPyConnection, duckdb.DuckDBPyConnection]] = {}

    def path(self, table: str) -> Path:
        return self.tables / f"{table}.csv"

    def pair(self, table: str) -> tuple[duckdb.DuckDBPyConnection, duckdb.DuckDBPyConnection]:
        """The table and its perturbed copy, both locked down for foreign SQL."""
        if table not in self._pairs:
            db = load_table(self.path(table))
            self._pairs[table] = db, perturb(db)
            for each in self._pairs[table]:
                each.execute("SET enable_external_access = false")
        return self._pairs[table]

    def right(self, question: Question, status: str, sql: str | None) -> bool:
        if not question.answerable:
            return status == "refused" or (status == "unsure" and question.reason == "ambiguous")
        if status == "refused" or not sql:
            return False
        assert question.sql is not None
        return all(
            _agrees(db, sql, question.sql, question.kind == "share")
            for db in self.pair(question.table)
        )

    def verdicts(self, questions: Sequence[Question], predictor: Predictor) -> Iterator[Verdict]:
        for q in questions:
            said = predictor(self.path(q.table), q.question)
            status, confidence = said["status"], float(said["confidence"])
            right = self.right(q, status, said["sql"])
            yield Verdict(q.id, q.table, q.kind, q.answerable, status, confidence, right)


def _agrees(db: duckdb.DuckDBPyConnection, sql: str, gold_sql: str, share: bool) -> bool:
    db.begin()  # rolled back: whatever the prediction is, the next one finds the same table
    try:
        gold = db.execute(gold_sql).fetchall()
        try:
            result = db.execute(sql)
            columns = [d[0] for d in result.description or []]
            rows = result.fetchall()
        except duckdb.Error:
            return False
        ordered = "ORDER BY" in gold_sql and len(gold) > 1
        return judge(rows, columns, gold, ordered, share)
    finally:
        db.rollback()


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / total
    middle = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _rate(right: int, total: int) -> dict[str, Any]:
    low, high = wilson(right, total)
    return {"right": right, "total": total, "rate": round(right / total, 4) if total else None,
            "low": round(low, 4), "high": round(high, 4)}  # fmt: skip


def _accuracy(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return _rate(sum(v.right for v in verdicts), len(verdicts))


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Accuracy overall, by kind and by table; coverage; precision among sure answers.

    "Sure" is status "answer". Precision counts a sure answer to an unanswerable question as wrong.
    """
    groups: dict[str, dict[str, list[Verdict]]] = {
        "by_kind": defaultdict(list),
        "by_table": defaultdict(list),
    }
    for v in verdicts:
        groups["by_kind"][v.kind].append(v)
        groups["by_table"][v.table].append(v)
    sure = [v for v in verdicts if v.status == "answer"]
    without = [v for v in verdicts if not v.answerable]
    return {
        "accuracy": _accuracy(verdicts),
        "accuracy_answerable": _accuracy([v for v in verdicts if v.answerable]),
        "precision_sure": _accuracy(sure),
        "coverage_sure": _rate(len(sure), len(verdicts)),
        "false_answers": _rate(sum(v.status == "answer" for v in without), len(without)),
        **{by: {k: _accuracy(group) for k, group in g.items()} for by, g in groups.items()},
    }


def _print_summary(summary: dict[str, Any]) -> None:
    def line(name: str, r: dict[str, Any]) -> None:
        rate = "-" if r["rate"] is None else f"{100 * r['rate']:.1f} %"
        between = f"{100 * r['low']:.1f} to {100 * r['high']:.1f}"
        print(f"{name:22} {rate:>8}  ({between})  {r['right']}/{r['total']}")

    for name in ("accuracy", "accuracy_answerable", "precision_sure", "coverage_sure",
                 "false_answers"):  # fmt: skip
        line(name, summary[name])
    for by in ("by_kind", "by_table"):
        print(f"\n{by}")
        for name, r in sorted(summary[by].items()):
            line(f"  {name}", r)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Judge an analyst on the held-out questions.")
    parser.add_argument("--predictor", required=True, metavar="MODULE:CALLABLE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")
    args = parser.parse_args(argv)

    module, _, name = args.predictor.partition(":")
    predictor: Predictor = getattr(importlib.import_module(module), name)
    start = time.perf_counter()
    verdicts = list(Judge().verdicts(load_questions(), predictor))
    seconds = time.perf_counter() - start
    summary = summarize(verdicts)
    _print_summary(summary)
    if args.json:
        result = {
            "predictor": args.predictor, "date": date.today().isoformat(),
            "machine": f"{platform.platform()}, python {platform.python_version()}",
            "seconds": round(seconds, 2), **summary, "questions": [asdict(v) for v in verdicts],
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()
