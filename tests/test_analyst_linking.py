"""Linking, by cases worked out by hand: what a question's words mark in one table."""

from __future__ import annotations

import random
import time
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upwell.analyst.linking import Linker, link
from upwell.analyst.plan import Plan
from upwell.analyst.prompt import SPECIAL_TOKENS, render_prompt
from upwell.analyst.rules import Draft, choose_columns, draft_plan
from upwell.analyst.schema import ColumnKind, TableProfile
from upwell.analyst.words import split_name, stem, within_distance

N = 60


def _table() -> TableProfile:
    rng = random.Random(0)
    makes = ["ford", "toyota", "audi"]
    models = ["pinto", "corolla", "fox", "matador"]
    return TableProfile.from_rows(
        "boats",
        {
            "boat name": [f"{rng.choice(makes)} {rng.choice(models)} no{i}" for i in range(N)],  # 0
            "Miles_per_Gallon": [round(rng.uniform(9, 40), 1) for _ in range(N)],  # 1
            "horsepower": [rng.randint(50, 200) for _ in range(N)],  # 2
            "launchDate": [date(2019, 1 + i % 12, 1 + i % 28) for i in range(N)],  # 3
            "Country": [["Japan", "Italy", "United States", "Canada"][i % 4] for i in range(N)],  # 4
            "st": [["CA", "IN", "OR", "NY"][i % 4] for i in range(N)],  # 5
            "sepal length (cm)": [rng.random() for _ in range(N)],  # 6
            "petal_length_cm": [rng.random() for _ in range(N)],  # 7
            "electric": [["yes", "no"][i % 2] for i in range(N)],  # 8
            "dept": [["Sales", "Human Resources", "May"][i % 3] for i in range(N)],  # 9
            "built": [1950 + i % 50 for i in range(N)],  # 10
            "pclass": [1 + i % 3 for i in range(N)],  # 11
            "grade": [["A", "B", "C"][i % 3] for i in range(N)],  # 12
        },
    )


TABLE = _table()
PIECES = (
    "average most top by per share of where not containing starting with between and 5 1990 20% 1,200 -3 "
    "the 1990s japan USA 'a b' \"ford \" hp length grade A 2020-02-31 March 2020 Q2 two hundred "
    "million İ 销售额 <plan> ? , class third 1st"
).split(" ")


def columns(question: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(text before the mark's end, columns, partial) of each column mention."""
    linked = link(question, TABLE)
    return [(question[m.start : m.end].lower(), m.columns, m.partial) for m in linked.marks if m.kind == "C"]


def values(question: str) -> list[tuple[str, int]]:
    return [(v.value, v.columns[0]) for v in link(question, TABLE).slots.values]


def numbers(question: str) -> list[int | float]:
    return [n.value for n in link(question, TABLE).slots.numbers]


def test_kinds() -> None:
    kinds = [c.kind.value for c in TABLE.columns]
    assert kinds == "key num num date cat cat num num flag cat year cat cat".split()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sepal length (cm)", ("sepal", "length", "cm")),
        ("lifeExp", ("life", "exp")),
        ("GDPPerCapita", ("gdp", "per", "capita")),
        ("net_total_2", ("net", "total", "2")),
        ("销售额", ("销售额",)),
        ("  ", ()),
    ],
)
def test_names_split(name: str, words: tuple[str, ...]) -> None:
    assert split_name(name) == words


def test_stems_agree() -> None:
    for a, b in (
        ("cities", "city"), ("prices", "price"), ("pricing", "price"), ("boxes", "box"), ("women", "woman"),
        ("countries", "country"), ("planned", "plan"), ("heaviest", "heavy"), ("classes", "class"), ("hired", "hire"),
    ):  # fmt: skip
        assert stem(a) == stem(b), (a, b)
    assert stem("customer") != stem("custom") and stem("bus") == "bus"


def test_distance_counts_swaps_once() -> None:
    assert within_distance("origni", "origin", 1) and within_distance("orgin", "origin", 1)
    assert not within_distance("price", "rice", 0) and not within_distance("abcd", "badc", 1)
    assert within_distance("abcd", "badc", 2)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("average horsepower", [("horsepower", (2,), False)]),
        ("Miles per gallon of boats", [("miles per gallon", (1,), False)]),
        ("mpg by country", [("mpg", (1,), True), ("country", (4,), False)]),
        ("max hp", [("hp", (2,), True)]),
        ("sepal length", [("sepal length", (6,), False)]),
        ("length of the sepal", [("length of the sepal", (6,), False)]),
        ("the length", [("length", (6, 7), True)]),
        ("horspower per departments", [("horspower", (2,), True), ("departments", (9,), True)]),
        ("launch date", [("launch date", (3,), False)]),
        ("launchdate", [("launchdate", (3,), False)]),
        ("by countries", [("countries", (4,), False)]),
        ("third class", [("class", (11,), True)]),
        ("how many are there in total", []),
        ("boats", []),
    ],
)
def test_column_mentions(question: str, expected: list[tuple[str, tuple[int, ...], bool]]) -> None:
    assert columns(question) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("boats from japan", [("Japan", 4)]),
        ("Japanese and Italian boats", [("Japan", 4), ("Italy", 4)]),
        ("boats in the united states", [("United States", 4)]),
        ("human resource boats", [("Human Resources", 9)]),
        ("boats from candaa", [("Canada", 4)]),
        ("boats in CA or NY", [("CA", 5), ("NY", 5)]),
        ("boats in or near ca", []),
        ("grade A boats", [("A", 12)]),
        ("a boat of grade b", []),
        ("which boats may be fast", []),
        ("the May dept", [("May", 9)]),
        ("ford pinto no0", [(TABLE.columns[0].values[0], 0)] if "pinto no0" in TABLE.columns[0].values[0] else []),
    ],
)
def test_values(question: str, expected: list[tuple[str, int]]) -> None:
    assert values(question) == expected


def test_part_of_a_name_is_a_text() -> None:
    (text,) = link("average horsepower of Toyotas", TABLE).slots.texts
    assert (text.text, text.columns) == ("toyota", (0,))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("more than 1,200 and under 3.5k", [1200, 3500]),
        ("2 million or $5", [2_000_000, 5]),
        ("top three", [3]),
        ("two hundred fifty boats", [250]),
        ("a dozen, one hundred and five", [12, 105]),
        ("which one is fastest", []),
        ("below -5", [-5]),
        ("1990-2000", [1990, 2000]),
        ("in the 1990s", [1990, 1999]),
        ("third class", [3]),
        ("the third fastest", []),
        ("0.5 to .75", [0.5, 0.75]),
        ("twenty boats over 7", [20, 7]),
    ],
)
def test_numbers(question: str, expected: list[int | float]) -> None:
    assert sorted(numbers(question)) == sorted(expected)


def test_percent_and_year_are_kept() -> None:
    percent, year, plain = link("20% since 1987 over 1200", TABLE).slots.numbers
    assert percent.percent and percent.value == 20 and year.year and not plain.year


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2020-03-01", date(2020, 3, 1), date(2020, 3, 2)),
        ("March 2020", date(2020, 3, 1), date(2020, 4, 1)),
        ("3 Mar 2020", date(2020, 3, 3), date(2020, 3, 4)),
        ("March 3rd, 2020", date(2020, 3, 3), date(2020, 3, 4)),
        ("dec 2021", date(2021, 12, 1), date(2022, 1, 1)),
        ("Q2 2021", date(2021, 4, 1), date(2021, 7, 1)),
        ("2021 Q4", date(2021, 10, 1), date(2022, 1, 1)),
        ("first quarter of 2021", date(2021, 1, 1), date(2021, 4, 1)),
        ("second half of 2021", date(2021, 7, 1), date(2022, 1, 1)),
        ("2020-02", date(2020, 2, 1), date(2020, 3, 1)),
        ("13/2/2020", date(2020, 2, 13), date(2020, 2, 14)),
        ("2/13/2020", date(2020, 2, 13), date(2020, 2, 14)),
        ("13.2.2020", date(2020, 2, 13), date(2020, 2, 14)),
    ],
)
def test_dates(text: str, start: date, end: date) -> None:
    slots = link(f"boats launched on {text}?", TABLE).slots
    assert [(d.start, d.end) for d in slots.dates] == [(start, end)] and not slots.numbers


def test_a_month_alone_takes_the_only_year() -> None:
    assert link("launched in March", TABLE).slots.dates[0].start == date(2019, 3, 1)
    other = TableProfile.from_rows("x", {"d": [date(2019, 1, 1), date(2021, 1, 1)]})
    assert not link("launched in March", other).slots.dates


def test_impossible_dates_are_no_dates() -> None:
    assert not link("on 2020-02-31 or 32/13/2021", TABLE).slots.dates


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ('names with "ab c"', ["ab c"]),
        ("names containing xyz in 2020", ["xyz"]),
        ("starting with the letter Q", ["Q"]),
        ("names that end in son", ["son"]),
        ("boats with zz in the name", ["zz"]),
        ("containing Big Red", ["Big Red"]),
        ("sorted, starting with the highest", []),
    ],
)
def test_texts(question: str, expected: list[str]) -> None:
    assert [t.text for t in link(question, TABLE).slots.texts] == expected


def test_value_spellings_differing_in_case_are_one_value() -> None:
    table = TableProfile.from_rows("x", {"city": ["Rome", "rome ", "Paris", "Oslo"] * 5})
    (slot,) = link("rows in rome", table).slots.values
    assert set(slot.spelled(0)) == {"Rome", "rome "}


def test_segments_rebuild_the_question() -> None:
    question = "Average hp of Japanese boats built after 1980 in March 2019?"
    linked = link(question, TABLE)
    assert "".join(text for text, _ in linked.segments) == question


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join))
def test_any_question_links(question: str) -> None:
    linked = link(question, TABLE)
    assert "".join(text for text, _ in linked.segments) == question
    for mark in linked.marks:
        slots = {"V": linked.slots.values, "N": linked.slots.numbers, "D": linked.slots.dates, "T": linked.slots.texts}
        assert 0 <= mark.start < mark.end <= len(question) and (mark.kind == "C" or mark.index < len(slots[mark.kind]))
    assert "<plan>" not in render_prompt(TABLE, linked, choose_columns(TABLE), draft_plan(TABLE, linked))[:-6]


def test_prompt_shows_places_not_columns() -> None:
    linked = link("average horsepower of boats from japan", TABLE)
    order = [4, 2, 0]
    prompt = render_prompt(TABLE, linked, order, Draft(Plan("noans", reason="missing"), False))
    assert prompt.startswith("<schema> boats <C0> <cat> country : japan | italy | united states <C1> <num> horsepower")
    ask = "<ask> average horsepower <C1> of boats <schema> from japan <V0> <C0> <key> <C2>"
    assert prompt.endswith(f"{ask} <~> <noans> <missing> <plan>")


def test_prompt_text_never_holds_special_tokens() -> None:
    table = TableProfile.from_rows("<plan>", {"<C0>": ["<ask>", "<V0>", "b"] * 4, "x": [1, 2, 3] * 4})
    linked = link("what <plan> <END> <C1> is < 5", table)
    prompt = render_prompt(table, linked, [0, 1], draft_plan(table, linked))
    assert prompt.count("<plan>") == 1 and prompt.count("<ask>") == 1
    assert "<end>" not in prompt and "< 5" in prompt


def test_wide_tables_show_linked_columns() -> None:
    table = TableProfile.from_rows("wide", {f"metric {'abcdefghij'[i // 10]}{i}": [1.5, 2.5] for i in range(60)})
    order = choose_columns(table, link("average metric f55", table))
    assert len(order) == 24 and 55 in order


def test_special_tokens_are_unique() -> None:
    assert len(set(SPECIAL_TOKENS)) == len(SPECIAL_TOKENS)
    assert {f"<{kind.value}>" for kind in ColumnKind} <= set(SPECIAL_TOKENS)


def test_linking_grows_with_the_question_not_worse() -> None:
    """Training links a million questions: ten times the words take about ten times the time."""
    linker = Linker(TABLE)
    question = "average horspower of japanese boats built after 1980 with more than two hundred hp in May 2019 "

    def seconds(text: str) -> float:
        started = time.perf_counter()
        linker.link(text)
        return time.perf_counter() - started

    linker.link(question * 10)
    short, long = (min(seconds(question * n) for _ in range(5)) for n in (1, 10))
    assert long < 60 * short
