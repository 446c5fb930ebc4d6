"""Files become tables: each format, and each way a file can disappoint, in one clear line."""

from __future__ import annotations

import gzip
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import openpyxl
import pytest

from upwell.analyst.query import run_query
from upwell.analyst.sources import OpenTable, open_table
from upwell.errors import DataError

ROWS = [["ant", 1, 1.5, "2020-01-02"], ["bee", 2, None, "2020-01-03"], [None, 3, 2.5, None]]


def rows(opened: OpenTable) -> list[list[Any]]:
    return run_query(opened.connection, "SELECT * FROM t").rows


def _text(sep: str) -> str:
    lines = [["name", "n", "x", "day"], *ROWS]
    return "\n".join(sep.join("" if cell is None else str(cell) for cell in line) for line in lines) + "\n"


def make_csv(path: Path) -> Path:
    path = path / "data.csv"
    path.write_text(_text(","))
    return path


def make_semicolons(path: Path) -> Path:
    path = path / "data.csv"
    path.write_text(_text(";"))
    return path


def make_tsv(path: Path) -> Path:
    path = path / "data.tsv"
    path.write_text(_text("\t"))
    return path


def make_gz(path: Path) -> Path:
    path = path / "data.csv.gz"
    path.write_bytes(gzip.compress(_text(",").encode()))
    return path


def make_parquet(path: Path) -> Path:
    source, path = make_csv(path), path / "data.parquet"
    duckdb.connect().execute(f"COPY (FROM read_csv('{source}')) TO '{path}' (FORMAT parquet)")
    return path


def make_json(path: Path) -> Path:
    source, path = make_csv(path), path / "data.json"
    duckdb.connect().execute(f"COPY (FROM read_csv('{source}')) TO '{path}' (FORMAT json, ARRAY true)")
    return path


def make_jsonl(path: Path) -> Path:
    source, path = make_csv(path), path / "data.jsonl"
    duckdb.connect().execute(f"COPY (FROM read_csv('{source}')) TO '{path}' (FORMAT json)")
    return path


def make_excel(path: Path) -> Path:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    for row in [["name", "n", "x", "day"], *ROWS]:
        sheet.append(row)
    path = path / "data.xlsx"
    book.save(path)
    return path


def make_sqlite(path: Path) -> Path:
    path = path / "data.db"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE animals (name TEXT, n INTEGER, x REAL, day DATE)")
    database.executemany("INSERT INTO animals VALUES (?, ?, ?, ?)", ROWS)
    database.commit()
    database.close()
    return path


MAKERS = [make_csv, make_semicolons, make_tsv, make_gz, make_parquet, make_json, make_jsonl, make_excel, make_sqlite]


@pytest.mark.parametrize("make", MAKERS)
def test_every_format_gives_the_same_table(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    before = {file: file.stat() for file in tmp_path.iterdir()}
    opened = open_table(path)
    assert rows(opened) == ROWS
    assert [c.kind.value for c in opened.profile.columns] == ["key", "num", "num", "date"]
    assert {file: file.stat() for file in tmp_path.iterdir()}.keys() == before.keys()
    for file, stat in before.items():
        assert file.stat().st_mtime_ns == stat.st_mtime_ns


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.csv", b"", "is empty"),
        ("blank.csv", b"\n \n", "is empty"),
        ("header.csv", b"a,b\n", "no rows"),
        ("picture.png", b"\x89PNG\r\n\0\0", "not a table"),
        ("picture.csv", b"\x89PNG\r\n\0\0", "not a table"),
        ("prose.txt", b"Dear all,\nthis is a letter\n", "not a table"),
        ("readme.md", b"# Title\n\nwords, words\n", "not a table"),
        ("fake.parquet", b"a,b\n1,2\n", "no parquet file"),
        ("torn.parquet", b"PAR1 and nothing else", "can't be read"),
        ("fake.xlsx", b"PK\x03\x04 no workbook", "can't be read as Excel"),
        ("fake.db", b"SQLite format 3\0 no pages", "can't be read as SQLite"),
        ("list.json", b"[1, 2, 3]", "holds no records"),
        ("torn.json", b'[{"a": 1', "can't be read as json"),
    ],
)
def test_bad_files_are_refused_in_one_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        open_table(path)
    message = str(caught.value)
    assert "\n" not in message and name in message and caught.value.exit_code == 2


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
        open_table(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="is a directory"):
        open_table(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "text", "said"),
    [
        ("utf-8-sig", "naïve,n\nà,1\nb,2\n", ""),
        ("cp1252", "naïve,n\nà,1\nb,2\n", "cp1252"),
        ("utf-16", "naïve,n\nà,1\nb,2\n", "utf-16"),
        ("gb18030", "城市,n\n北京,1\n上海市,2\n", "gb18030"),
    ],
)
def test_encodings(encoding: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(text.encode(encoding))
    opened = open_table(path)
    lines = [line.split(",") for line in text.split()]
    assert opened.profile.columns[0].name == lines[0][0]
    assert rows(opened) == [[name, int(n)] for name, n in lines[1:]]
    assert said in " ".join(opened.notes) and bool(said) == bool(opened.notes)
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_byte_in_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"name,n\n" + "äöü,1\n".encode() * 20 + b"\xff,2\n")
    opened = open_table(path)
    assert rows(opened)[0] == ["äöü", 1] and "broken bytes" in opened.notes[0]


def test_odd_names(tmp_path: Path) -> None:
    path = tmp_path / "odd [1]*.csv"
    path.write_text('a,A,,"x ""y""",  sp  ace ,销售额\n1,2,3,4,5,6\n')
    opened = open_table(path)
    names = [c.name for c in opened.profile.columns]
    assert names[0] == "a" and len({name.lower() for name in names}) == 6 and all(names)
    assert names[3:] == ['x "y"', "sp ace", "销售额"]
    assert any("more than once" in note for note in opened.notes) and any("no name" in n for n in opened.notes)


def test_text_only_and_headerless(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("name,city\nbob,rome\nann,paris\n")
    assert rows(open_table(path)) == [["bob", "rome"], ["ann", "paris"]]
    path.write_text("1,2\n3,4\n")
    assert rows(open_table(path)) == [[1, 2], [3, 4]]


def test_late_type_change_and_ragged_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("a,b\n" + "1,2\n" * 30000 + "x,3\n")
    assert rows(open_table(path))[-1] != []
    path.write_text("a,b\n1,2\n6\n")
    assert rows(open_table(path)) == [[1, 2], [6, None]]


def test_leading_zeros_stay(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("zip,n\n02139,1\n10001,2\n")
    assert [row[0] for row in rows(open_table(path))] == ["02139", "10001"]


def test_nested_json_and_records_under_a_key(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"rows": [{"a": 1, "b": {"c": 2}}, {"a": 2}]}')
    opened = open_table(path)
    assert [row[0] for row in rows(opened)] == [1, 2] and "rows" in opened.notes[0]


def test_tables_of_a_database(tmp_path: Path) -> None:
    path = make_sqlite(tmp_path)
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE plants (label TEXT, secret BLOB)")
    database.execute("INSERT INTO plants VALUES ('\\N', x'00'), ('', NULL), (NULL, NULL), ('a\"b\n,c', NULL)")
    database.commit()
    database.close()
    with pytest.raises(DataError, match="2 tables: animals, plants") as caught:
        open_table(path)
    assert "--table" in str(caught.value)
    with pytest.raises(DataError, match="no table 'x'"):
        open_table(path, "x")
    opened = open_table(path, "PLANTS")
    assert rows(opened) == [["\\N"], [""], [None], ['a"b\n,c']] and "binary" in opened.notes[0]


def test_a_database_in_use_is_read_from_its_log_untouched(tmp_path: Path) -> None:
    path = tmp_path / "live.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE a (x INTEGER)")
    database.execute("INSERT INTO a VALUES (7)")
    database.commit()
    before = sorted(file.name for file in tmp_path.iterdir())
    assert rows(open_table(path)) == [[7]]
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    database.close()


def test_sheets_of_a_workbook(tmp_path: Path) -> None:
    path = make_excel(tmp_path)
    book = openpyxl.load_workbook(path)
    book.create_sheet("blank")
    second = book.create_sheet("more")
    second.append(["a"])
    second.append([5])
    book.save(path)
    assert "more" in open_table(path).notes[0] and "blank" not in open_table(path).notes[0]
    assert rows(open_table(path, "more")) == [[5]]
    with pytest.raises(DataError, match="no sheet 'x'"):
        open_table(path, "x")


def test_table_name_for_a_file_without_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one table only"):
        open_table(make_csv(tmp_path), "x")


def test_the_connection_is_sealed(tmp_path: Path) -> None:
    connection = open_table(make_csv(tmp_path)).connection
    target = tmp_path / "out.csv"
    for sql in (f"COPY t TO '{target}'", f"SELECT * FROM read_csv('{tmp_path}/data.csv')", "SET threads = 1"):
        with pytest.raises(duckdb.Error):
            connection.execute(sql)
    assert not target.exists()
