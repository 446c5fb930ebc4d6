"""Plans: tokens round-trip, the grammar only makes plans that run, SQL means what the plan says."""

from __future__ import annotations

import math
import random
from datetime import date, timedelta
from typing import Any

import duckdb
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upwell.analyst.grammar import PlanGrammar
from upwell.analyst.linking import link
from upwell.analyst.plan import PLAN_TOKENS, Condition, Dim, Measure, Plan, parse_plan, plan_tokens
from upwell.analyst.query import check_query, run_query
from upwell.analyst.reading import describe
from upwell.analyst.schema import TableProfile
from upwell.analyst.slots import DateSlot, NumberSlot, Slots, TextSlot, ValueSlot
from upwell.analyst.sql import to_sql
from upwell.errors import InputError

NAMES = [
    "order",
    "select",
    "a b",
    'qu"ote',
    "o'clock",
    "销售额",
    "n",
    "year",
    "total_n",
    "t",
    "x1",
    "CamelCase",
    "%",
    "1st",
]


def random_table(rng: random.Random) -> dict[str, list[Any]]:
    """Columns of every kind, some empty cells, names that need quoting."""
    rows = rng.randint(1, 30)
    makers = [
        lambda i: rng.uniform(-5, 5), lambda i: rng.randint(0, 1), lambda i: rng.choice([True, False]),
        lambda i: rng.randint(1950, 2020), lambda i: date(2020, 1, 1) + timedelta(days=rng.randint(0, 900)),
        lambda i: rng.choice(["a'b", "x%y", "c_d", "Japan", 'q"q']), lambda i: f"name {i}", lambda i: rng.choice("YN"),
        lambda i: f"2020-01-{1 + i % 28:02d}", lambda i: rng.randint(1, 3), lambda i: None,
        lambda i: rng.choice(["very long text " * 5, "another"]) + str(i),
    ]  # fmt: skip
    names = rng.sample(NAMES, rng.randint(1, 8))
    table = {}
    for name in names:
        make = rng.choice(makers)
        table[name] = [None if rng.random() < 0.1 else make(i) for i in range(rows)]
    return table


def random_slots(rng: random.Random, profile: TableProfile) -> Slots:
    values = []
    for c, column in enumerate(profile.columns):
        for value in column.values[:2]:
            if column.is_text:
                values.append(ValueSlot(value, (c,), ((value,),)))
    rng.shuffle(values)
    numbers = [
        NumberSlot("3", 3),
        NumberSlot("2.5%", 2.5, percent=True),
        NumberSlot("2020", 2020, year=True),
        NumberSlot("-1e20", -1e20),
    ]
    days = [DateSlot("", date(2020, 1, 5), date(2020, 1, 6)), DateSlot("", date(2020, 2, 1), date(2020, 3, 1))]
    texts = [TextSlot("50%_\\'x"), TextSlot("name")]
    pick = lambda items: tuple(items[: rng.randint(0, len(items))])  # noqa: E731
    return Slots(pick(values[:10]), pick(numbers), pick(days), pick(texts))


def random_walk(rng: random.Random, grammar: PlanGrammar) -> list[str]:
    state, tokens = grammar.start(), []
    while not grammar.done(state):
        allowed = grammar.allowed(state)
        assert allowed, f"dead end after {tokens}"
        assert len(set(allowed)) == len(allowed) and set(allowed) <= set(PLAN_TOKENS)
        weights = [0.2 if token in ("<end>", "<noans>", "<null>", "<notnull>") else 1.0 for token in allowed]
        token = rng.choices(allowed, weights)[0]
        tokens.append(token)
        state = grammar.advance(state, token)
        assert len(tokens) < 80
    return tokens


def load(table: dict[str, list[Any]]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    frame = pd.DataFrame({name: pd.Series(cells, dtype=object) for name, cells in table.items()})
    for name, cells in table.items():
        kinds = {type(cell) for cell in cells if cell is not None}
        if kinds == {int}:
            frame[name] = frame[name].astype("Int64")
        elif kinds == {float}:
            frame[name] = frame[name].astype("float64")
        elif not kinds or kinds == {str}:
            frame[name] = frame[name].astype("string")
    connection.register("frame", frame)
    connection.execute("CREATE TABLE t AS SELECT * FROM frame")
    return connection


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_every_path_of_the_grammar_runs(seed: int) -> None:
    rng = random.Random(seed)
    table = random_table(rng)
    profile = TableProfile.from_rows("things", table)
    slots = random_slots(rng, profile)
    order = list(range(len(profile.columns)))
    rng.shuffle(order)
    connection = load(table)
    grammar = PlanGrammar(profile, slots, order)
    for _ in range(10):
        tokens = random_walk(rng, grammar)
        plan = parse_plan(tokens, order)
        assert plan_tokens(plan, order) == tokens
        assert grammar.accepts(tokens)
        assert len(plan.where) <= 4 and len(set(plan.where)) == len(plan.where)
        assert "\n" not in describe(plan, profile, slots)
        if plan.kind != "noans":
            run_query(connection, to_sql(plan, profile, slots))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_profiles_agree(seed: int) -> None:
    """A table profiled from lists is the table profiled by SQL, so training sees what use sees."""
    table = random_table(random.Random(seed))
    rows, sql = TableProfile.from_rows("x", table), TableProfile.from_duckdb(load(table), "x")
    assert rows.n_rows == sql.n_rows
    for a, b in zip(rows.columns, sql.columns, strict=True):
        assert (a.name, a.words, a.kind, a.n_null, a.truth) == (b.name, b.words, b.kind, b.n_null, b.truth)
        assert set(a.values) == set(b.values) and (a.minimum, a.maximum) == (b.minimum, b.maximum)


@pytest.mark.parametrize(
    "text",
    [
        "", "where", "where C0 eq V0", "count", "by C0 end", "show end", "count end end", "sum end", "noans end",
        "show C0 sort desc end", "C0 end", "share end", "count top V0 end", "where C0 eq D0 count end",
        "list C0 C99 end",
    ],
)  # fmt: skip
def test_no_plans(text: str) -> None:
    with pytest.raises(InputError):
        parse_plan([f"<{word}>" for word in text.split()])


CARS = {
    "name": ["ant", "bee", "cat", "dog", "elk", "fox"],
    "origin": ["USA", "Japan", "USA", "Europe", "Japan", None],
    "power": [100.0, 80.0, 150.0, None, 120.0, 90.0],
    "sold": [
        date(2020, 1, 5),
        date(2020, 1, 20),
        date(2020, 4, 1),
        date(2021, 1, 1),
        date(2021, 1, 31),
        date(2021, 7, 4),
    ],
    "electric": ["yes", "no", "no", "yes", "no", "no"],
    "rate": [0.1, 0.2, 0.3, 0.2, 0.5, 0.05],
}
PROFILE = TableProfile.from_rows("cars", CARS)
FRAME = pd.DataFrame(CARS)
QUESTION = 'usa japan 100 2 2020 20% in January 2020 and 2021-01-01 "a"'


def answer(text: str) -> list[list[Any]]:
    slots = link(QUESTION, PROFILE).slots
    tokens = [f"<{word}>" for word in f"{text} end".split()]
    assert PlanGrammar(PROFILE, slots).accepts(tokens), text
    return run_query(load(CARS), to_sql(parse_plan(tokens), PROFILE, slots)).rows


def test_answers_equal_pandas() -> None:
    power, origin = FRAME["power"], FRAME["origin"]
    assert answer("count") == [[6]]
    assert answer("where C1 eq V0 avg C2") == [[power[origin == "USA"].mean()]]
    assert answer("where C1 in V0 V1 count") == [[int(origin.isin(["USA", "Japan"]).sum())]]
    assert answer("where C2 ge N0 count") == [[int((power >= 100).sum())]]
    assert answer("median C2 min C2 max C2") == [[power.median(), power.min(), power.max()]]
    assert answer("distinct C1") == [[origin.nunique()]]
    assert answer("where C2 null show C0") == [["dog"]]
    assert answer("where C4 yes list C0") == [["ant"], ["dog"]]
    assert answer("where C4 no count") == [[4]]
    assert answer("where C0 contains T0 show C0") == [["ant"], ["cat"]]
    assert answer("where C0 starts T0 count") == [[1]]
    means = power.groupby(origin, dropna=False).mean()
    assert sorted(answer("by C1 avg C2"), key=str) == sorted(
        ([None if pd.isna(k) else k, None if math.isnan(v) else v] for k, v in means.items()), key=str
    )
    assert answer("show C0 sort desc C2 top N1") == [["cat", 150.0], ["elk", 120.0]]
    assert answer("by C1 sum C2 sort desc top one") == [["USA", 250.0]]


def test_dates() -> None:
    assert answer("where C3 on D0 show C0") == [["ant"], ["bee"]]  # within January 2020
    assert answer("where C3 on D1 show C0") == [["dog"]]  # on one day
    assert answer("where C3 after N2 count") == [[3]]  # after the end of 2020
    assert answer("where C3 since N2 count") == [[6]] and answer("where C3 before D1 count") == [[3]]
    assert answer("where C3 between D0 D1 count") == [[4]]
    assert answer("by year C3 count") == [[2020, 3], [2021, 3]]
    assert answer("by month C3 count") == [["2020-01-01", 2], ["2020-04-01", 1], ["2021-01-01", 2], ["2021-07-01", 1]]
    assert [row[0] for row in answer("by quarter C3 count")] == ["2020-01-01", "2020-04-01", "2021-01-01", "2021-07-01"]
    days = [row[0] for row in answer("by weekday C3 count")]
    assert days == ["Monday", "Wednesday", "Friday", "Sunday"]


def test_shares() -> None:
    assert answer("share rows C4 yes") == [[pytest.approx(100 / 3)]]
    groups = dict(answer("by C1 share rows"))
    assert groups == {
        "USA": pytest.approx(100 / 3),
        "Japan": pytest.approx(100 / 3),
        "Europe": pytest.approx(100 / 6),
        None: pytest.approx(100 / 6),
    }
    assert dict(answer("by C1 share rows C4 yes"))["USA"] == 50
    # Of the total, whatever groups are kept.
    assert answer("by C1 share sum C2 having gt N3") == [
        ["Japan", pytest.approx(200 / 540 * 100)],
        ["USA", pytest.approx(250 / 540 * 100)],
    ]
    assert answer("by C1 share rows sort desc top one")[0][1] == pytest.approx(100 / 3)


def test_percent_takes_the_columns_scale() -> None:
    assert answer("where C5 eq N3 count") == [[2]]  # 20% of a column of fractions is 0.2


def test_readings() -> None:
    slots = link(QUESTION, PROFILE).slots

    def read(text: str) -> str:
        return describe(parse_plan([f"<{word}>" for word in f"{text} end".split()]), PROFILE, slots)

    assert read("where C1 eq V0 by year C3 avg C2 sort desc") == (
        "average power where origin = USA, by year of sold, highest first"
    )
    assert read("where C3 on D0 count") == "number of rows where sold on January 2020"
    assert read("share rows C4 yes") == "share of rows with electric in percent"
    assert read("noans ambiguous C1 C2") == "unclear: origin or power?"


def test_sql_is_plain_and_quotes_only_where_needed() -> None:
    table = TableProfile.from_rows("x", {"order": ["a", "b'c", "a"] * 5, "n": [1.0, 2.0, 3.0] * 5})
    slots = Slots(values=(ValueSlot("b'c", (0,), (("b'c",),)),))
    plan = Plan("aggregate", (Condition(0, "eq", ("V0",)),), (Dim(0),), (Measure("count"), Measure("avg", 1)))
    sql = to_sql(plan, table, slots)
    assert sql.split("\n") == [
        'SELECT "order", count(*) AS n_, avg(n) AS avg_n',
        "FROM t",
        "WHERE \"order\" = 'b''c'",
        'GROUP BY "order"',
        'ORDER BY "order"',
    ]
    check_query(sql)


def test_the_grammar_is_typed() -> None:
    slots = link(QUESTION, PROFILE).slots
    grammar = PlanGrammar(PROFILE, slots)
    wrong = [
        "sum C1", "avg C4", "where C0 eq V0 count", "where C1 eq N0 count", "where C2 eq V0 count",
        "where C2 on N2 count", "where C3 on N0 count", "where C1 yes count", "where C4 eq V0 count",
        "by month C1 count",
        "count top one", "count having gt N0", "share rows", "by C1 count top one", "where C1 in V1 V0 count",
        "where C1 in V0 count", "where C2 gt N0 and C2 gt N0 count", "by C1 C1 count", "count count", "show C0 C0",
        "by C1 count sort desc top N3", "by C1 max C3 having gt N0", "where C0 eq V9 count", "show C9",
    ]  # fmt: skip
    for text in wrong:
        assert not grammar.accepts([f"<{word}>" for word in f"{text} end".split()]), text
