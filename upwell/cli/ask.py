"""upwell ask: a question, answered from a table."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upwell.cli.model_flags import add_device_flag
from upwell.errors import InputError

if TYPE_CHECKING:
    from upwell.analyst.ask import Answer

_ROWS = 20  # shown of a result, unless --limit says otherwise
_CELL = 40  # widest cell, in columns of the terminal


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("ask", help="answer a question from a table: CSV, Parquet, JSON, Excel, SQLite")
    parser.add_argument("file", type=Path, help="the table's file")
    parser.add_argument("question", nargs="?", help="in plain English")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="answer one question a line ('-': stdin)")
    parser.add_argument("--table", metavar="NAME", help="table or sheet, where the file has several")
    parser.add_argument("--limit", type=int, default=_ROWS, help=f"rows to show (default: {_ROWS}); --json gives all")
    add_device_flag(parser, default="cpu")  # the embedded model is too small to gain by another
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="one JSON object an answer")
    shape.add_argument("--sql", action="store_true", help="the query alone")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.question is None) == (arguments.questions is None):
        raise InputError("give a question or --questions FILE, one of both", 'upwell ask table.csv "how many rows?"')
    if arguments.limit < 1:
        raise InputError(f"--limit is {arguments.limit}, must be at least 1")
    questions = [arguments.question] if arguments.questions is None else list(_read_questions(arguments.questions))
    from upwell.analyst.ask import Answer, Asker

    asker = Asker(device=arguments.device)
    asker.open(arguments.file, table=arguments.table)
    for k, question in enumerate(questions):
        try:
            answer = asker.ask(question)
        except InputError as error:
            if arguments.questions is None:
                raise
            answer = Answer(question, "refused", message=str(error))  # the other lines still get their answers
        if arguments.json:
            print(json.dumps(as_json(answer), ensure_ascii=False, default=_plain), flush=True)
        elif arguments.sql:
            print(answer.sql or f"-- {answer.status}: {answer.message}", flush=True)
        else:
            if k:
                print()
            if arguments.questions is not None:
                print(f"? {question}")
            print(as_text(answer, arguments.limit), flush=True)
    return 0


def as_json(answer: Answer) -> dict[str, Any]:
    """The fields that scripts rely on."""
    names = ("question", "status", "reading", "sql", "columns", "rows", "confidence", "message")
    return {name: getattr(answer, name) for name in names}


def as_text(answer: Answer, limit: int) -> str:
    """How the question was read, the query, and the result as a table."""
    parts = []
    if answer.reading:
        parts.append(answer.reading)
    if answer.sql:
        parts.append(f"  {answer.sql}")
    if answer.message:
        parts.append(answer.message)
    if answer.columns:
        parts.append(table(answer.columns, answer.rows[:limit]))
        if len(answer.rows) > limit:
            parts.append(f"... {len(answer.rows) - limit} more rows (--limit)")
    return "\n".join(parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in plain text, numbers to the right."""
    cells = [[_shown(value) for value in row] for row in rows]
    heads = [_cut(str(name)) for name in columns]
    widths = [max(map(_width, column)) for column in zip(heads, *cells, strict=True)]
    right = [bool(rows) and all(isinstance(row[c], (int, float, Decimal, type(None))) for row in rows)
             for c in range(len(heads))]  # fmt: skip

    def line(row: Sequence[str]) -> str:
        padded = []
        for text, width, to_right in zip(row, widths, right, strict=True):
            space = " " * (width - _width(text))
            padded.append(space + text if to_right else text + space)
        return "  ".join(padded).rstrip()

    return "\n".join([line(heads), line(["-" * width for width in widths]), *map(line, cells)])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (float, Decimal)):
        number = float(value)
        return f"{number:,.2f}".rstrip("0").rstrip(".") if abs(number) >= 1 else f"{number:.4g}"
    return _cut(str(value))


def _cut(text: str) -> str:
    """On one line, and not wider than a cell; control characters would reach the terminal."""
    text = "".join(" " if unicodedata.category(c).startswith("C") else c for c in text)
    while _width(text) > _CELL:
        text = text[: min(len(text) - 2, _CELL)] + "…"
    return text


def _width(text: str) -> int:
    """Columns a terminal gives this text: Chinese takes two each."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _plain(value: Any) -> Any:
    """A cell's value for JSON."""
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)


def _read_questions(path: Path) -> Iterator[str]:
    if str(path) == "-":
        lines: Sequence[str] = sys.stdin.readlines()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise InputError(f"--questions {path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--questions {path}: can't be read as UTF-8 text: {error}") from None
    return (line.strip() for line in lines if line.strip())
