"""Checks the development set: `python check.py` prints one line a fault and counts by kind.

Every query must run over its own table, return rows, and sort without ties.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import sqlglot
from sqlglot import exp

HERE = Path(__file__).parent
REASONS = {"missing", "ambiguous", "notdata"}


def tied(connection: duckdb.DuckDBPyConnection, sql: str) -> bool:
    """True when ORDER BY leaves two neighbours equal, among the rows kept or at the cut."""
    query = sqlglot.parse_one(sql, read="duckdb")
    assert isinstance(query, exp.Select)
    limit, order = query.args.get("limit"), query.args.get("order")
    if order is None:
        return False
    # DuckDB lets a select item name an earlier alias, so a sort key can be selected as it stands.
    keys = [key.this.copy().as_(f"sort_key_{i}") for i, key in enumerate(order.expressions)]
    query = query.select(*keys)
    if limit is not None:
        query = query.limit(int(limit.expression.name) + 1)
    rows = connection.execute(query.sql(dialect="duckdb")).fetchall()
    return any(one[-len(keys) :] == two[-len(keys) :] for one, two in pairwise(rows))


def faults(item: dict[str, Any], connection: duckdb.DuckDBPyConnection) -> list[str]:
    """What is wrong with one question, over its table as `t`."""
    if not item["answerable"]:
        fine = item["sql"] is None and item["reason"] in REASONS and item["kind"] == "noans"
        return [] if fine else ["unanswerable: needs reason, kind noans and no sql"]
    if item["reason"] is not None or item["kind"] == "noans":
        return ["answerable: reason must be null and kind not noans"]
    try:
        rows = connection.execute(item["sql"]).fetchall()
    except duckdb.Error as error:
        return [f"does not run: {error}"]
    found = []
    if not rows or rows == [(None,)]:
        found.append("empty result")
    if item["kind"] in ("lookup", "superlative") and len(rows) != 1:
        found.append(f"{item['kind']} gives {len(rows)} rows")
    if tied(connection, item["sql"]):
        found.append("tied sort keys")
    return found


def main() -> int:
    files = [HERE / f"{name}.jsonl" for name in ("questions", "hard", "sorting")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    items = [json.loads(line) for line in lines]
    connection = duckdb.connect()
    bad, loaded = 0, ""
    for item in items:
        if item["table"] != loaded:
            loaded = item["table"]
            path = HERE / "tables" / f"{loaded}.csv"
            connection.execute(f"CREATE OR REPLACE TABLE t AS FROM read_csv('{path}')")
        for fault in faults(item, connection):
            bad += 1
            print(f"{item['id']}: {fault}")
    names = [item["id"] for item in items] + [(item["table"], item["question"]) for item in items]
    for name, count in Counter(names).items():
        if count > 1:
            bad += 1
            print(f"appears {count} times: {name}")
    kinds = Counter(item["reason"] or item["kind"] for item in items)
    print(f"{len(items)} questions, {bad} faults;", dict(kinds.most_common()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
