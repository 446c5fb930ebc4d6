"""Running a query on a loaded table: one SELECT over `t`, within limits of rows and time.

The guard is an allow-list over the parsed tree: tables, functions and kinds of statement that are
not named here don't run, whatever they would do.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import duckdb
import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from upwell.analyst.schema import TABLE
from upwell.errors import QueryError

MAX_ROWS = 1000
TIME_LIMIT = 30.0  # seconds

_FUNCTIONS = frozenset(
    """abs avg cast ceil ceiling coalesce concat count date_diff date_part date_trunc
    timestamp_trunc day dayname dayofmonth dayofweek day_of_month day_of_week dayofweek_iso extract filter floor
    greatest if isodow least length lower max median min month monthname nullif quarter round
    row_number rank dense_rank sqrt ln log power stddev stddev_samp strftime time_to_str strptime
    substring sum timestamp trim try_cast upper variance week year case and or
    not in between ilike like is""".split()
)


@dataclass(frozen=True, slots=True)
class Result:
    """Rows of JSON-safe values; `truncated` when there were more than the cap."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool = False


def run_query(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    max_rows: int = MAX_ROWS,
    time_limit: float = TIME_LIMIT,
) -> Result:
    """Check and run one SELECT. Raises QueryError when it may not run, fails or takes too long."""
    check_query(sql)
    late = threading.Event()

    def stop() -> None:
        late.set()
        connection.interrupt()

    timer = threading.Timer(time_limit, stop)
    timer.start()
    try:
        cursor = connection.execute(sql)
        columns = [entry[0] for entry in cursor.description or []]
        rows = cursor.fetchmany(max_rows + 1)
    except duckdb.Error as error:
        if late.is_set():
            raise QueryError(f"the query took longer than {time_limit:g} s", "ask for less at a time") from error
        reason = str(error).strip().split("\n")[0]
        raise QueryError(f"the query failed: {reason}") from error
    finally:
        timer.cancel()
    safe = [[json_safe(value) for value in row] for row in rows[:max_rows]]
    return Result(columns, safe, truncated=len(rows) > max_rows)


def check_query(sql: str) -> None:
    """Raise QueryError unless `sql` is exactly one plain SELECT over the table `t`."""
    try:
        statements = [s for s in sqlglot.parse(sql, dialect="duckdb") if s is not None]
    except SqlglotError as error:
        raise QueryError(f"not SQL: {str(error).splitlines()[0]}") from error
    if len(statements) != 1:
        raise QueryError(f"{len(statements)} statements", "one SELECT at a time")
    statement = statements[0]
    if not isinstance(statement, exp.Query):
        raise QueryError(f"{statement.key.upper()} may not run", "only SELECT may")
    defined = {cte.alias.lower() for cte in statement.find_all(exp.CTE)}
    for node in statement.walk():
        if isinstance(node, exp.Table):
            plain = isinstance(node.this, exp.Identifier) and not node.args.get("db")
            if not plain or node.name.lower() not in defined | {TABLE}:
                raise QueryError(f"unknown table {node.sql()}", f"the only table is {TABLE}")
        elif isinstance(node, exp.DDL | exp.DML | exp.Command | exp.Into) and not isinstance(node, exp.Query):
            raise QueryError(f"{node.key.upper()} may not run", "only SELECT may")
        elif isinstance(node, exp.Func):
            name = (node.name if isinstance(node, exp.Anonymous) else node.sql_name()).lower()
            if name not in _FUNCTIONS:
                raise QueryError(f"the function {name} may not be used")


def json_safe(value: Any) -> Any:
    """A cell as JSON can hold it: dates in ISO form, decimals as numbers, no NaN or infinity."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if not isinstance(value, timedelta) else value.total_seconds()
