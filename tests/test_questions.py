"""The held-out question set is sound, and its judge tells right from wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pytest
import sqlglot
from sqlglot import exp

HERE = Path(__file__).parents[1] / "benchmarks" / "questions"


def _load_judge() -> ModuleType:
    spec = importlib.util.spec_from_file_location("questions_judge", HERE / "judge.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


J = _load_judge()
JUDGE = J.Judge()
QUESTIONS = J.load_questions()
ANSWERABLE = [q for q in QUESTIONS if q.answerable]
ORDERED = [q for q in ANSWERABLE if "ORDER BY" in q.sql]


def test_the_set_is_large_and_varied() -> None:
    assert len(QUESTIONS) >= 250
    assert len({q.id for q in QUESTIONS}) == len(QUESTIONS)
    assert len({(q.table, q.question.lower()) for q in QUESTIONS}) == len(QUESTIONS)
    per_table = Counter(q.table for q in QUESTIONS)
    assert len(per_table) >= 12 and min(per_table.values()) >= 12
    assert len(QUESTIONS) - len(ANSWERABLE) >= 0.2 * len(QUESTIONS)
    assert {q.kind for q in ANSWERABLE} == {
        "filter", "aggregate", "group", "time", "top", "sort", "share", "compare", "superlative",
        "lookup",
    }  # fmt: skip
    assert min(Counter(q.kind for q in QUESTIONS).values()) >= 15


def test_fields_agree() -> None:
    for q in QUESTIONS:
        assert q.answerable == (q.sql is not None) == (q.reason is None), q.id
        assert q.answerable == (q.kind != "noanswer"), q.id
        assert q.answerable or q.reason in ("missing", "ambiguous", "notdata"), q.id


def test_tables_are_small() -> None:
    paths = {JUDGE.path(q.table) for q in QUESTIONS}
    assert paths == set(JUDGE.tables.glob("*.csv"))
    sizes = [path.stat().st_size for path in paths]
    assert max(sizes) <= 150_000 and sum(sizes) < 1_000_000
    readme = (JUDGE.tables / "README.md").read_text("utf-8")
    for path in paths:
        assert f"`{path.name}`" in readme, path.name
        (rows,) = JUDGE.pair(path.stem)[0].execute("SELECT COUNT(*) FROM t").fetchone()
        assert rows >= 25, path.name


@pytest.mark.parametrize("q", ANSWERABLE, ids=lambda q: q.id)
def test_gold_runs_on_both_copies(q: Any) -> None:
    original, perturbed = (db.execute(q.sql).fetchall() for db in JUDGE.pair(q.table))
    assert isinstance(perturbed, list)
    assert original and original not in ([(0,)], [(None,)])
    assert JUDGE.right(q, "answer", q.sql)


@pytest.mark.parametrize("q", ORDERED, ids=lambda q: q.id)
def test_no_ties_where_order_decides(q: Any) -> None:
    """Neither at the cut of a top-n nor inside a sorted result, on either copy."""
    query = sqlglot.parse_one(q.sql, read="duckdb")
    assert isinstance(query, exp.Select)
    limit = query.args.get("limit")
    keys = [ordered.this.copy() for ordered in query.args["order"].expressions]
    cut = int(limit.expression.this) + 1 if limit else 10_000
    query.set("limit", None)
    query = query.select(*(exp.alias_(key, f"k{i}") for i, key in enumerate(keys)))
    for db in JUDGE.pair(q.table):
        rows = db.execute(query.limit(cut).sql("duckdb")).fetchall()
        values = [row[-len(keys) :] for row in rows]
        assert len(set(values)) == len(values), values
        assert all(v is not None for key in values for v in key)


def test_perturbing_changes_numbers_and_keeps_words() -> None:
    one, two = J.load_table(JUDGE.path("tips")), J.load_table(JUDGE.path("tips"))
    first, second = (J.perturb(db).execute("SELECT * FROM t").fetchall() for db in (one, two))
    assert first == second
    (before,) = one.execute("SELECT COUNT(*) FROM t").fetchone()
    assert len(first) == before - before // 10
    changed = J.perturb(one)
    bills = "SELECT list(total_bill ORDER BY total_bill) FROM t"
    days = "SELECT DISTINCT day FROM t ORDER BY day"
    assert changed.execute(bills).fetchall() != one.execute(bills).fetchall()
    assert changed.execute(days).fetchall() == one.execute(days).fetchall()
    assert changed.execute("DESCRIBE t").fetchall() == one.execute("DESCRIBE t").fetchall()
    years = "SELECT DISTINCT year FROM t ORDER BY year"
    gapminder, copy = JUDGE.pair("gapminder")
    assert copy.execute(years).fetchall() == gapminder.execute(years).fetchall()


GOLD = [("a", 1.0), ("b", 2.0), ("c", 3.5)]


@pytest.mark.parametrize(
    ("rows", "ordered", "right"),
    [
        (GOLD, True, True),
        ([(n, t) for t, n in GOLD], True, True),  # columns swapped
        ([(7, t, "x", n) for t, n in GOLD], True, True),  # two extra columns
        ([(7, 8, t, "x", n) for t, n in GOLD], False, False),  # three
        (GOLD[::-1], False, True),
        (GOLD[::-1], True, False),
        (GOLD[:2], False, False),
        ([*GOLD, ("d", 4.0)], False, False),  # an extra row
        ([(t,) for t, _ in GOLD], False, False),  # a missing column
        ([("a", 2.0), ("b", 1.0), ("c", 3.5)], False, False),  # right values, wrong pairs
        ([("a", 1.0 + 1e-8), ("b", Decimal("2.00")), ("c", 3.5)], False, True),
        ([("a", 1.0), ("b", 2.001), ("c", 3.5)], False, False),
    ],
)
def test_judge_rows(rows: list[tuple[object, ...]], ordered: bool, right: bool) -> None:
    names = [f"c{i}" for i in range(len(rows[0]))]
    assert J.judge(rows, names, GOLD, ordered) is right


@pytest.mark.parametrize(
    ("predicted", "gold", "right"),
    [
        (12.35, 12.3456789, True),  # rounded to the decimals it gives
        (12.3, 12.3456789, True),
        (12.0, 12.3456789, False),
        (0.1, 0.1234, False),  # too few digits to be a rounding
        (12.36, 12.3456789, False),
        (3, 3.0, True),
        (None, None, True),
        (None, 0.0, False),
        (True, True, True),
        ("true", True, True),
        (datetime(2006, 3, 1), date(2006, 3, 1), True),
        ("2006-03-01 00:00:00", date(2006, 3, 1), True),
        ("2006-03", date(2006, 3, 1), True),
        ("2006-04", date(2006, 3, 1), False),
        (date(2006, 3, 2), date(2006, 3, 1), False),
        (date(2006, 1, 1), 2006, True),  # a year by DATE_TRUNC
        (date(2006, 2, 1), 2006, False),
        ("Mon", "Monday", True),
        ("a", "b", False),
    ],
)
def test_judge_cells(predicted: object, gold: object, right: bool) -> None:
    assert J.judge([(predicted,)], ["x"], [(gold,)], ordered=False) is right


def test_judge_takes_a_share_as_part_of_one_or_of_a_hundred() -> None:
    gold = [("a", 25.0), ("b", 75.0)]
    parts = [("a", 0.25), ("b", 0.75)]
    assert J.judge(parts, ["k", "x"], gold, ordered=False, share=True)
    assert J.judge(gold, ["k", "x"], gold, ordered=False, share=True)
    assert not J.judge(parts, ["k", "x"], gold, ordered=False)
    assert not J.judge([("a", 0.25), ("b", 75.0)], ["k", "x"], gold, ordered=False, share=True)


def _question(**changes: object) -> Any:
    base = {"id": "x", "table": "tips", "question": "?", "kind": "aggregate",
            "sql": "SELECT AVG(tip) FROM t", "answerable": True, "reason": None}  # fmt: skip
    return J.Question(**{**base, **changes})


def test_right_needs_both_copies_and_survives_bad_sql() -> None:
    q = _question()
    (tip,) = JUDGE.pair("tips")[0].execute(q.sql).fetchone()
    assert JUDGE.right(q, "answer", "SELECT AVG(tip) AS avg_tip FROM tips")
    assert JUDGE.right(q, "unsure", "SELECT AVG(tip) FROM t")
    assert not JUDGE.right(q, "answer", f"SELECT {tip}")  # true of the original only
    assert not JUDGE.right(q, "refused", None)
    assert not JUDGE.right(q, "answer", "SELECT nonsense FROM t")
    assert not JUDGE.right(q, "answer", "DELETE FROM t")
    assert not JUDGE.right(q, "answer", "SELECT * FROM read_csv_auto('/etc/passwd')")
    assert JUDGE.right(q, "answer", q.sql)  # the table is as before


@pytest.mark.parametrize(
    ("reason", "status", "right"),
    [
        ("missing", "refused", True),
        ("missing", "unsure", False),
        ("notdata", "answer", False),
        ("ambiguous", "refused", True),
        ("ambiguous", "unsure", True),
        ("ambiguous", "answer", False),
    ],
)
def test_unanswerable(reason: str, status: str, right: bool) -> None:
    q = _question(sql=None, answerable=False, kind="noanswer", reason=reason)
    assert JUDGE.right(q, status, "SELECT 1") is right


def test_a_perfect_and_a_refusing_predictor() -> None:
    gold = {(JUDGE.path(q.table), q.question): q for q in QUESTIONS}

    def perfect(path: Path, question: str) -> dict[str, Any]:
        q = gold[path, question]
        return {"status": "answer" if q.answerable else "refused", "sql": q.sql, "confidence": 1.0}

    def refusing(path: Path, question: str) -> dict[str, Any]:
        return {"status": "refused", "sql": None, "confidence": 1.0}

    best = J.summarize(list(JUDGE.verdicts(QUESTIONS, perfect)))
    assert best["accuracy"]["rate"] == best["precision_sure"]["rate"] == 1.0
    assert best["coverage_sure"]["right"] == len(ANSWERABLE)
    assert best["false_answers"]["right"] == 0
    none = J.summarize(list(JUDGE.verdicts(QUESTIONS, refusing)))
    assert none["accuracy"]["right"] == len(QUESTIONS) - len(ANSWERABLE)
    assert none["coverage_sure"]["right"] == 0 and none["precision_sure"]["rate"] is None


def test_wilson() -> None:
    low, high = J.wilson(70, 100)
    assert (round(low, 4), round(high, 4)) == (0.6042, 0.7811)
    assert J.wilson(0, 0) == (0.0, 1.0)


def test_tables_cannot_be_changed_from_outside() -> None:
    with pytest.raises(duckdb.Error):
        JUDGE.pair("tips")[0].execute("COPY t TO '/tmp/leak.csv'")
