"""Queries run only as one SELECT over t, within limits, and their cells fit into JSON."""

from __future__ import annotations

import json
import time

import duckdb
import pytest

from upwell.analyst.query import check_query, run_query
from upwell.errors import QueryError


@pytest.fixture
def connection() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("CREATE TABLE t AS SELECT range AS i, 'x' || range AS name FROM range(5000)")
    return connection


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('x.csv')", "SELECT * FROM 'x.csv'", "SELECT 1; SELECT 2", "DROP TABLE t", "",
        "WITH i AS (INSERT INTO t VALUES (1, 'x') RETURNING *) SELECT * FROM i", "SELECT repeat('a', 9) FROM t",
        "SELECT * FROM range(10)", "SELECT getenv('HOME')", "SET threads = 1", "COPY t TO 'x'", "ATTACH 'x.db'",
        "PRAGMA database_list", "SELECT * FROM duckdb_settings()", "SELECT * FROM query('SELECT 1')", "CALL x()",
        "SELECT * FROM information_schema.tables", "SELECT list_transform([1], x -> x)", "SELEC", "INSTALL httpfs",
        "SELECT * FROM u", "SELECT (SELECT count(*) FROM sqlite_master)", "SELECT * INTO u FROM t", "DELETE FROM t",
        "EXPLAIN SELECT 1", "SELECT current_setting('temp_directory')", "SELECT read_text('x')", "VACUUM",
    ],
)  # fmt: skip
def test_refused(sql: str, connection: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(QueryError) as caught:
        run_query(connection, sql)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM t", "WITH a AS (SELECT * FROM t) SELECT avg(i) FROM a WHERE name ILIKE '%1%'",
        "SELECT i FROM t UNION SELECT i FROM t", "SELECT sum(count(*)) OVER () FROM t GROUP BY i QUALIFY count(*) > 0",
        "SELECT CASE WHEN i > 1 THEN 'a' ELSE 'b' END AS c, count(*) FROM t GROUP BY ALL ORDER BY c NULLS LAST LIMIT 3",
        "SELECT x.i FROM t AS x JOIN t AS y ON x.i = y.i WHERE x.i BETWEEN 1 AND 3 AND y.name IN ('x1', 'x2')",
    ],
)  # fmt: skip
def test_allowed(sql: str, connection: duckdb.DuckDBPyConnection) -> None:
    assert run_query(connection, sql).rows


def test_row_cap(connection: duckdb.DuckDBPyConnection) -> None:
    result = run_query(connection, "SELECT i FROM t", max_rows=10)
    assert len(result.rows) == 10 and result.truncated and result.columns == ["i"]
    assert not run_query(connection, "SELECT i FROM t LIMIT 10", max_rows=10).truncated


def test_time_limit(connection: duckdb.DuckDBPyConnection) -> None:
    start = time.perf_counter()
    with pytest.raises(QueryError, match="longer than"):
        run_query(connection, "SELECT count(*) FROM t a, t b, t c, t d WHERE a.i + b.i > c.i + d.i", time_limit=0.3)
    assert time.perf_counter() - start < 10
    assert run_query(connection, "SELECT count(*) FROM t").rows == [[5000]]  # still usable


def test_cells_fit_into_json() -> None:
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE t AS SELECT DATE '2020-01-02' AS d, TIMESTAMP '2020-01-02 03:04:05' AS s, "
        "1.50::DECIMAL(9,2) AS m, "
        "2.00::DECIMAL(9,2) AS w, 'nan'::DOUBLE AS x, 1e400::DOUBLE AS y, [1, 2] AS l, {'a': DATE '2020-01-01'} AS o, "
        "uuid() AS u, INTERVAL 1 DAY AS v, '\\xAA'::BLOB AS b, NULL AS z, TIME '01:02:03' AS h, true AS f"
    )
    (row,) = run_query(connection, "SELECT * FROM t").rows
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row[:6] == ["2020-01-02", "2020-01-02T03:04:05", 1.5, 2, None, None] and row[6:8] == [
        [1, 2],
        {"a": "2020-01-01"},
    ]


def test_failures_say_why(connection: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(QueryError, match="nope"):
        run_query(connection, "SELECT nope FROM t")


def test_guard_needs_no_connection() -> None:
    check_query("SELECT 1 AS one FROM t")
