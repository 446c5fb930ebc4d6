"""A table's schema in a chat, and the query for the last question: what the embedded model does behind the APIs.

The schema is a CREATE TABLE statement anywhere in the messages, as text-to-SQL prompts have it. Rows aren't needed;
where a CHECK or ENUM lists a column's values, questions may name them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from upwell.analyst.ask import Asker
from upwell.analyst.linking import link
from upwell.analyst.reading import describe
from upwell.analyst.schema import TABLE, TableProfile, profile_column
from upwell.analyst.sql import to_sql

if TYPE_CHECKING:
    from upwell.engine import LLM

MAX_QUESTION = 2000  # characters
MAX_SCHEMA = 20_000
_CREATE = re.compile(r"create\s+(?:or\s+replace\s+)?(?:temp(?:orary)?\s+)?table\b", re.IGNORECASE)
_STORAGE = {
    exp.DataType.Type.BOOLEAN: "boolean", exp.DataType.Type.BIT: "boolean", exp.DataType.Type.DATE: "date",
}  # fmt: skip


class QueryWriter:
    """Writes queries for one model, the embedded one or another of its kind."""

    def __init__(self, llm: LLM | Any) -> None:
        self._asker = Asker(llm)

    def write(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """SQL for the last user message over the schema that the messages show, after a comment that says how it was
        read; the reason, as a comment alone, where there is no query; None where there is no schema."""
        texts = [(str(message.get("role")), _text(message.get("content"))) for message in messages]
        found = None
        for _, text in texts:
            found = find_table(text) or found
        if found is None:
            return None
        name, profile, statement = found
        last = next((text for role, text in reversed(texts) if role == "user"), "")
        question = " ".join(last.replace(statement, " ").replace("```sql", " ").replace("```", " ").split())
        if not question or len(question) > MAX_QUESTION:
            return f"-- Ask one question about {name}, of at most {MAX_QUESTION} characters."
        linked = link(question, profile)
        reading = self._asker.read(profile, linked)
        told = describe(reading.plan, profile, linked.slots)
        if reading.plan.kind == "noans":
            return f"-- {told}"
        return f"-- Read as: {told}\n{_named(to_sql(reading.plan, profile, linked.slots), name)}"


def find_table(text: str) -> tuple[str, TableProfile, str] | None:
    """The last CREATE TABLE of a text: the table's name as SQL, its profile, the statement as it stands there."""
    found = None
    for match in _CREATE.finditer(text[:MAX_SCHEMA]):
        statement = _statement(text[match.start() : MAX_SCHEMA])
        if statement is None:
            continue
        try:
            tree = sqlglot.parse_one(statement)
        except (SqlglotError, RecursionError):
            continue
        table = tree.find(exp.Table)
        columns = list(tree.find_all(exp.ColumnDef))
        if isinstance(tree, exp.Create) and table is not None and columns:
            profiles = tuple(_profile(column, tree) for column in columns)
            found = table.sql(dialect="duckdb"), TableProfile(table.name, 0, profiles), statement
    return found


def _statement(text: str) -> str | None:
    """Up to the parenthesis that closes the first one."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == ")" and depth == 0:
            return text[: at + 1]
    return None


def _profile(column: exp.ColumnDef, tree: exp.Expression) -> Any:
    values = _listed(column, tree)
    kind = column.kind
    storage = "text"
    if kind is not None:
        if kind.this in exp.DataType.INTEGER_TYPES:
            storage = "integer"
        elif kind.this in exp.DataType.NUMERIC_TYPES:
            storage = "real"
        elif kind.this in exp.DataType.TEMPORAL_TYPES:
            storage = "date" if kind.this == exp.DataType.Type.DATE else "timestamp"
        else:
            storage = _STORAGE.get(kind.this, "text")
    return profile_column(column.name, storage, values, len(values), 0, 10 * len(values))


def _listed(column: exp.ColumnDef, tree: exp.Expression) -> list[str]:
    """The values that an ENUM type, or a CHECK (column IN (...)), lists."""
    found: list[str] = []
    if column.kind is not None and column.kind.this == exp.DataType.Type.ENUM:
        found = [value.name for value in column.kind.expressions]
    for test in tree.find_all(exp.In):
        if isinstance(test.this, exp.Column | exp.Identifier) and test.this.name.lower() == column.name.lower():
            found += [value.name for value in test.expressions if isinstance(value, exp.Literal) and value.is_string]
    return list(dict.fromkeys(found))


def _named(sql: str, name: str) -> str:
    """The query with the table's own name in place of the one that every table is queried by."""
    tree = sqlglot.parse_one(sql, dialect="duckdb")
    for table in tree.find_all(exp.Table):
        if table.name == TABLE and not table.db:
            alias = table.args.get("alias")
            table.replace(sqlglot.to_table(name, dialect="duckdb", alias=alias))
    return tree.sql(dialect="duckdb")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if isinstance(part, Mapping) and "text" in part)
    return ""
