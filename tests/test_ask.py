"""A question answered from a real file by the embedded model: the main job, end to end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from upwell.analyst.ask import Asker, PlanMask, column_orders
from upwell.analyst.grammar import PlanGrammar
from upwell.analyst.linking import link
from upwell.errors import DataError, InputError

SALES = Path(__file__).parent.parent / "examples" / "sales.csv"


@pytest.fixture(scope="module")
def asker() -> Asker:
    asker = Asker()
    asker.open(SALES)
    return asker


def gold(sql: str) -> list[tuple[object, ...]]:
    return duckdb.sql(sql.replace("FROM t", f"FROM '{SALES}'")).fetchall()


@pytest.mark.parametrize(
    ("question", "sql"),
    [
        ("how many orders are there?", "SELECT count(*) FROM t"),
        ("total revenue", "SELECT sum(revenue) FROM t"),
        ("average revenue by region", "SELECT region, avg(revenue) FROM t GROUP BY region"),
        ("which region has the highest total revenue?",
         "SELECT region, sum(revenue) FROM t GROUP BY region ORDER BY 2 DESC LIMIT 1"),
    ],
)  # fmt: skip
def test_answers_equal_duckdb(asker: Asker, question: str, sql: str) -> None:
    answer = asker.ask(question)
    assert answer.sql is not None, answer
    wanted = sorted((tuple(row) for row in gold(sql)), key=str)
    width = len(wanted[0])
    got = sorted((tuple(row[-width:]) for row in answer.rows), key=str)
    for w, g in zip(wanted, got, strict=True):
        for a, b in zip(w, g, strict=True):
            assert b == (pytest.approx(float(a)) if isinstance(a, (int, float)) or hasattr(a, "quantize") else a)


def test_what_the_table_lacks_is_refused(asker: Asker) -> None:
    for question in ("hello, how are you?", "write me a poem about the sea"):
        answer = asker.ask(question)
        assert answer.status != "answer"
        assert not answer.rows or answer.status == "unsure"
        assert answer.message


def test_the_same_question_gives_the_same_answer(asker: Asker) -> None:
    first, again = asker.ask("average revenue by region"), asker.ask("average revenue by region")
    assert first == again
    assert 0.0 <= first.confidence <= 1.0 + 1e-6


def test_every_token_is_a_plans(asker: Asker) -> None:
    """Whatever the question, decoding stays inside the grammar: the plan compiles and runs."""
    for question in ("asdf qwer", "revenue revenue", "top 999 of nothing by something", "?", "1 2 3 4 5 6 7 8 9"):
        answer = asker.ask(question)
        assert answer.status in ("answer", "unsure", "refused")
        if answer.sql:
            assert answer.columns


def test_bad_questions(asker: Asker) -> None:
    with pytest.raises(InputError, match="empty"):
        asker.ask("   ")
    with pytest.raises(InputError, match="2001 characters"):
        asker.ask("a" * 2001)
    with pytest.raises(InputError, match="no table"):
        Asker().ask("how many?")
    with pytest.raises(DataError):
        Asker().open("nowhere.csv")


def test_orders_are_permutations_of_the_same_columns(asker: Asker) -> None:
    table = asker.open(SALES)
    linked = link("total revenue", table.profile)
    orders = column_orders(table.profile, linked, 4)
    assert len(orders) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_mask_follows_the_grammar(asker: Asker) -> None:
    table = asker.open(SALES)
    linked = link("total revenue", table.profile)
    mask = PlanMask(PlanGrammar(table.profile, linked.slots), asker.llm.tokenizer)
    generated: list[int] = []
    while True:
        allowed = mask(generated)
        if not allowed:
            break
        generated.append(mask.end if mask.end in allowed else allowed[0])
        assert len(generated) < 64
    assert mask.words(generated)[-1] == "<end>"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "upwell.cli", *arguments], capture_output=True, text=True, check=False)


def test_command_line(tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("how many orders are there?\n\ntotal revenue\n")
    before = sorted(p.name for p in SALES.parent.iterdir()), SALES.read_bytes()
    done = run("ask", str(SALES), "--questions", str(questions), "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["question"] for line in lines] == ["how many orders are there?", "total revenue"]
    assert set(lines[0]) == {"question", "status", "reading", "sql", "columns", "rows", "confidence", "message"}
    with SALES.open() as file:
        assert lines[0]["rows"] == [[sum(1 for _ in csv.reader(file)) - 1]]
    assert (sorted(p.name for p in SALES.parent.iterdir()), SALES.read_bytes()) == before


def test_command_line_refuses_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.touch()
    for arguments in (("ask", str(tmp_path / "no.csv"), "how many?"), ("ask", str(empty), "how many?")):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
        assert arguments[1] in done.stderr
