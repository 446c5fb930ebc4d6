"""Marks, evidence, variants and the ranking of candidate plans, on small tables and without the model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from upwell.analyst.associations import association
from upwell.analyst.evidence import Asked, evidence
from upwell.analyst.linking import link
from upwell.analyst.plan import Condition, Dim, Measure, Plan
from upwell.analyst.ranking import NONE, collect, rank, same_rows, weights
from upwell.analyst.rules import draft_plan
from upwell.analyst.schema import TableProfile
from upwell.analyst.variants import variants

DOGS = TableProfile.from_rows(
    "breeds",
    {
        "breed": ["Boxer", "Beagle", "Pug", "Husky", "Collie"],
        "energy": [4, 4, 1, 5, 4],
        "height_cm": [60, 37, 28, 57, 59],
        "weight_kg": [30.2, 10.4, 7.2, 22.4, 25.6],
        "sheds": ["no", "yes", "yes", "yes", "yes"],
    },
)
TOOLS = TableProfile.from_rows(
    "packages",
    {
        "name": ["packaging", "find", "python-dateutil", "pyyaml", "six"],
        "n_files": [60, 3, 33, 41, 9],
        "has_long_files": [True, False, True, True, False],
        "size_kb": [66, 120, 229, 703, 11],
        "code": ["KB", "USD", "TOP", "ALL", "TRY"],
    },
)
STEPS = TableProfile.from_rows("steps", {"day": ["2023-05-01", "2023-05-02", "2023-05-03"], "anna": [9, 7, 8]})


def marks(question: str, profile: TableProfile) -> list[tuple[str, str, tuple[int, ...]]]:
    linked = link(question, profile)
    return [(m.kind, question[m.start : m.end], m.columns) for m in linked.marks]


def asked(question: str, profile: TableProfile) -> Asked:
    linked = link(question, profile)
    return Asked(profile, linked, draft_plan(profile, linked))


def test_the_rows_noun_is_no_cell() -> None:
    assert marks("how many packages are there", TOOLS) == []  # "packaging" has the same stem
    moons = TableProfile.from_rows("moons", {"name": ["Moon", "Io", "Titan"], "radius": [1737, 1822, 2575]})
    assert marks("how many moons are there", moons) == []
    assert marks("radius of the moon", moons) == [("C", "radius", (1,)), ("V", "moon", (0,))]


def test_marks_of_prefixes_units_and_common_words() -> None:
    assert ("T", "py", (0,)) in marks("packages starting with py", TOOLS)  # no word of its own: part of a name
    assert ("C", "kb", (3,)) in marks("packages over 200 kb", TOOLS)
    assert marks("which package has the most files", TOOLS) == [("C", "files", (1,))]  # not has_long_files as well
    assert ("V", "find", (0,)) in marks("how many files does find have", TOOLS)
    assert not any(kind == "V" for kind, *_ in marks("find the packages with 3 files", TOOLS))


def test_words_speak_for_columns() -> None:
    height, weight = DOGS.columns[2], DOGS.columns[3]
    assert association("tallest", height) > 0.5 > association("tallest", weight)
    assert association("heaviest", weight) > 0.5 > association("heaviest", height)
    assert association("qwertyish", height) == 0.0


@pytest.mark.parametrize(
    ("question", "column", "sign"),
    [("tallest breed", 2, 1.0), ("lightest breed", 3, -1.0), ("average height", 2, 0.0), ("at least 3", 2, 0.0)],
)
def test_sign_of_a_superlative(question: str, column: int, sign: float) -> None:
    assert asked(question, DOGS).sign(column) == pytest.approx(sign, abs=0.5)


def test_the_oldest_is_the_earliest_but_of_the_most_years() -> None:
    table = TableProfile.from_rows("people", {"name": ["Ann", "Bob"], "age": [70, 31], "born": [1954, 1993]})
    question = asked("who is the oldest", table)
    assert question.sign(1) == 1.0
    assert question.sign(2) == -1.0


def test_evidence_names_what_a_plan_leaves_unused() -> None:
    question = asked("breeds over 50 cm that don't shed", DOGS)
    bare = Plan("show", columns=(0,))
    good = Plan("show", (Condition(2, "gt", ("N0",)), Condition(4, "no")), columns=(0,))
    found, better = (evidence(plan, question, {bare: 0.5, good: 0.5}) for plan in (bare, good))
    assert found["unused number"] == 1.0
    assert found["not missing"] == found["comparison missing"] == 1.0
    assert not {"unused number", "not missing", "comparison missing"} & set(better)


def test_a_variant_takes_the_column_that_the_words_speak_for() -> None:
    question = asked("tallest breed", DOGS)
    drawn = {Plan("show", columns=(0,), sort="desc", sort_column=3, top="one"): 0.4}
    wanted = Plan("show", columns=(0,), sort="desc", sort_column=2, top="one")
    assert wanted in variants(drawn, question)
    assert rank(drawn, question)[0] == wanted


def test_when_asks_for_a_day() -> None:
    question = asked("when was anna at her lowest", STEPS)
    wanted = Plan("show", columns=(0,), sort="asc", sort_column=1, top="one")
    drawn = {Plan("aggregate", measures=(Measure("min", 1),)): 0.9}
    assert wanted in variants(drawn, question)


def test_counting_the_rows_is_not_missing() -> None:
    drawn = {Plan("noans", reason="missing"): 0.9}
    counted = Plan("aggregate", measures=(Measure("count"),))
    assert rank(drawn, asked("how many packages are there", TOOLS))[0] == counted


@pytest.mark.parametrize("drawn", [{}, {Plan("noans", reason="notdata"): 1.0}])
def test_confidence_is_a_probability(drawn: Mapping[Plan, float]) -> None:
    for text in ("tallest breed", "hello", "how many breeds weigh over 20 kg"):
        plan, confidence = rank(drawn, asked(text, DOGS))
        assert 0.0 < confidence < 1.0
        assert plan in collect(drawn, asked(text, DOGS))


def test_every_kind_of_evidence_has_a_weight() -> None:
    assert NONE in weights()
    for text in ("tallest breed", "how many breeds don't shed", "breeds sorted by weight", "average height by sheds"):
        for found in collect({Plan("noans", reason="missing"): 0.2}, asked(text, DOGS)).values():
            assert set(found) <= set(weights())


BILLS = TableProfile.from_rows(
    "bills",
    {
        "bill_no": [f"B-{k:02}" for k in range(12)],
        "client": ["Quill", "Tessel", "Orchard", "Quill"] * 3,
        "amt_eur": [120.5, 88.0, 430.0, 15.25, 99.9, 1020.0, 310.0, 77.0, 64.5, 205.0, 18.0, 540.0],
        "paid": [True, False, True] * 4,
        "issued": [f"2024-{k + 1:02}-05" for k in range(12)],
    },
)


@pytest.mark.parametrize(
    ("question", "sorts"),
    [
        ("list the bills by amount", False),  # no word but "by": candidates have the order all the same
        ("bills from largest to smallest", True),
        ("bills from high to low amounts", True),
        ("bills sorted by client", True),
        ("bills in descending order of amount", True),
        ("biggest bills first", True),
        ("bills in alphabetical order", True),
        ("which client was billed first", False),
        ("biggest bill", False),
    ],
)
def test_what_asks_for_an_order(question: str, sorts: bool) -> None:
    assert ("sort" in asked(question, BILLS).says) is sorts


def test_an_order_of_orders_is_no_sorting() -> None:
    table = TableProfile.from_rows("orders", {"order_id": ["a1", "b2", "c3"], "total": [3, 1, 2]})
    assert "sort" not in asked("biggest order by total", table).says


@pytest.mark.parametrize(
    ("question", "column", "order"),
    [
        ("bills by amount from largest to smallest", 2, "desc"),
        ("bills by amount from low to high", 2, "asc"),
        ("bills by amount descending", 2, "desc"),
        ("bills by amount", 2, "asc"),
        ("rank the bills by amount", 2, "desc"),
        ("oldest bills first", 4, "asc"),
        ("bills from new to old", 4, "desc"),
        ("bills alphabetically", 0, "asc"),
    ],
)
def test_the_order_of_a_list(question: str, column: int, order: str) -> None:
    assert asked(question, BILLS).usual(column) == order


def test_a_list_by_a_quantity_is_an_order_not_groups() -> None:
    question = asked("list the bills by amount", BILLS)
    grouped = Plan("aggregate", by=(Dim(2),), measures=(Measure("count"),))
    wanted = Plan("show", columns=(0,), sort="asc", sort_column=2)
    assert rank({grouped: 0.8}, question)[0] == wanted


def test_a_superlative_keeps_the_conditions_that_another_candidate_has() -> None:
    question = asked("biggest bill of Quill", BILLS)
    drawn = {Plan("show", columns=(0,), sort="desc", sort_column=2, top="one"): 0.6}
    wanted = Plan("show", (Condition(1, "eq", ("V0",)),), columns=(0,), sort="desc", sort_column=2, top="one")
    assert wanted in variants(drawn, question)
    assert rank(drawn, question)[0] == wanted


def test_groups_are_sorted_where_the_question_asks_for_it() -> None:
    question = asked("total amount by client, highest first", BILLS)
    drawn = {Plan("aggregate", by=(Dim(1),), measures=(Measure("sum", 2),)): 0.9}
    assert rank(drawn, question)[0] == Plan("aggregate", by=(Dim(1),), measures=(Measure("sum", 2),), sort="desc")


def test_rows_are_listed_by_their_names() -> None:
    drawn = {Plan("noans", reason="missing"): 0.5, Plan("show", columns=(0,)): 0.2}
    plan, _ = rank(drawn, asked("list the bills in alphabetical order", BILLS))
    assert (plan.kind, plan.sort, plan.sort_column) == ("show", "asc", 0)


def test_a_negated_flag_is_marked_and_read() -> None:
    question = asked("how many bills are unpaid", BILLS)
    assert ("C", "unpaid", (3,)) in marks("how many bills are unpaid", BILLS)
    assert "not" in question.says
    assert question.draft.plan.where == (Condition(3, "no"),)


def test_a_flag_whose_own_name_negates_is_read_as_it_is() -> None:
    columns = {"bill": ["a1", "b2", "c3"], "unpaid": [True, False, True]}
    question = asked("how many bills are unpaid", TableProfile.from_rows("bills", columns))
    assert question.draft.plan.where == (Condition(1, "yes"),)


def test_the_most_rows_are_counted() -> None:
    assert asked("which client has the most bills", BILLS).counts_rows
    assert asked("who is billed most often", BILLS).counts_rows
    assert not asked("which bill has the highest amount", BILLS).counts_rows


def test_a_superlative_of_no_column_is_unheard() -> None:
    assert asked("fastest breed", DOGS).unheard
    assert not asked("tallest breed", DOGS).unheard
    assert not asked("newest bill", BILLS).unheard


def test_plans_for_the_same_table_share_their_probability() -> None:
    stops = TableProfile.from_rows(
        "stops", {"code": ["HAM", "BER", "ULM"], "stop": ["Hamburg", "Berlin", "Ulm"], "tracks": [14, 9, 12]}
    )
    one, other = (Plan("show", columns=(c,), sort="desc", sort_column=2, top="one") for c in (0, 1))
    assert same_rows(one, stops) == same_rows(other, stops)
    question = asked("stop with the most tracks", stops)
    assert rank({one: 0.5, other: 0.5}, question)[1] > rank({one: 0.5}, question)[1] / 2
    unlike = Plan("show", columns=(2,), sort="desc", sort_column=2, top="one")
    assert same_rows(unlike, stops) != same_rows(one, stops)
