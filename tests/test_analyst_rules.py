"""The keyword-rules control reads what such rules should, and refuses when nothing links."""

from __future__ import annotations

from datetime import date

import pytest

from upwell.analyst.linking import link
from upwell.analyst.plan import plan_tokens
from upwell.analyst.rules import draft_plan
from upwell.analyst.schema import TableProfile

TABLE = TableProfile.from_rows(
    "boats",
    {
        "name": [f"boat {i}" for i in range(30)],  # 0
        "origin": ["USA", "Japan", "Europe"] * 10,  # 1
        "power": [float(i) for i in range(30)],  # 2
        "sold": [date(2018 + i % 4, 1 + i % 12, 1) for i in range(30)],  # 3
        "electric": ["yes", "no"] * 15,  # 4
        "weight": [100 + i for i in range(30)],  # 5
    },
)


@pytest.mark.parametrize(
    ("question", "plan"),
    [
        ("how many boats are there", "count"),
        ("average power of boats from Japan", "where C1 eq V0 avg C2"),
        ("total weight by origin", "by C1 sum C5"),
        ("how many boats have power over 10", "where C2 gt N0 count"),
        ("top 5 boats by power", "show C0 sort desc C2 top N0"),
        ("which boat has the lowest weight", "show C0 sort asc C5 top one"),
        ("which origin has the highest average power", "by C1 avg C2 sort desc top one"),
        ("how many different origins", "distinct C1"),
        ("percentage of boats that are electric", "share rows C4 yes"),
        ("boats per year", "by year C3 count"),
        ("power between 5 and 10", "where C2 between N0 N1 show C0"),
        ("number of boats not from USA", "where C1 ne V0 count"),
        ("average power usa vs japan", "where C1 in V0 V1 by C1 avg C2"),
        ("list the origins", "list C1"),
        ("boats sold before 2020", "where C3 before N0 show C0"),
        ("hello, how are you", "noans notdata"),
        ("what colour is the captain's hat", "noans missing"),
    ],
)
def test_readings(question: str, plan: str) -> None:
    found, _ = draft_plan(TABLE, link(question, TABLE))
    assert " ".join(plan_tokens(found)).replace("<", "").replace(">", "") == f"{plan} end"


def test_unread_words_make_it_unsure() -> None:
    assert draft_plan(TABLE, link("average power by origin", TABLE))[1]
    assert not draft_plan(TABLE, link("average power by flavour and origin", TABLE))[1]
