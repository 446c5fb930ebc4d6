"""The web page's server side: its files and their headers, and the tables that people upload."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from upwell.analyst.ask import Answer, Asker
from upwell.engine import LLM
from upwell.errors import QueueFullError
from upwell.server import errors, tables, web
from upwell.server.tables import Tables

SALES = Path(__file__).parents[1] / "examples" / "sales.csv"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The page's endpoints, without a model: no question is asked here (test_web_data.py asks the real one)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    app = FastAPI()
    errors.install(app)
    web.install(app, Tables(lambda: cast(LLM, None), clock))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def upload(client: TestClient, name: str, content: bytes, **more: str) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"}
    return client.post("/api/tables", params={"filename": name, **more}, content=content, headers=headers)


def sales(client: TestClient) -> str:
    answer = upload(client, "sales.csv", SALES.read_bytes())
    assert answer.status_code == 200, answer.text
    return cast(str, answer.json()["id"])


def query(client: TestClient, table: str, sql: str) -> httpx.Response:
    return client.post("/api/query", json={"table": table, "sql": sql})


def refused(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return cast(str, answer.json()["error"]["message"])


def test_a_csv_is_described_and_queried(client: TestClient) -> None:
    answer = upload(client, "sales.csv", SALES.read_bytes()).json()
    assert (answer["name"], answer["rows"], answer["tables"], answer["table"]) == ("sales.csv", 192, [], None)
    assert [c["name"] for c in answer["columns"]] == SALES.read_text().split("\n")[0].split(",")
    assert {c["name"]: c["type"] for c in answer["columns"]} == {
        "date": "date", "region": "text", "product": "text", "units": "integer", "unit_price": "real",
        "revenue": "real",
    }  # fmt: skip
    assert answer["sample"][0] == ["2024-01-27", "North", "Espresso", 75, 2.8, 210] and len(answer["sample"]) == 5
    expected: dict[str, int] = {}
    with SALES.open() as file:
        for row in csv.DictReader(file):
            expected[row["region"]] = expected.get(row["region"], 0) + int(row["units"])
    result = query(client, answer["id"], "SELECT region, sum(units) AS n FROM t GROUP BY region ORDER BY 1").json()
    assert result == {"columns": ["region", "n"], "rows": [[k, expected[k]] for k in sorted(expected)],
                      "truncated": False}  # fmt: skip


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The same three rows in each format."""
    rows = [("Oslo", 1), ("Bern", 2), ("Wien", 3)]
    yield "x.csv", b"city,n\nOslo,1\nBern,2\nWien,3\n"
    yield "x.tsv", b"city\tn\nOslo\t1\nBern\t2\nWien\t3\n"
    yield "x.jsonl", "".join(json.dumps({"city": c, "n": n}) + "\n" for c, n in rows).encode()
    pq.write_table(pa.table({"city": [c for c, _ in rows], "n": [n for _, n in rows]}), folder / "p")
    yield "x.parquet", (folder / "p").read_bytes()
    book = openpyxl.Workbook()
    book.active.title = "empty"  # type: ignore[union-attr]
    for sheet in ("first", "second"):
        page = book.create_sheet(sheet)
        for row in [("city", "n"), *rows]:
            page.append(row)
    book.save(folder / "x.xlsx")
    yield "x.xlsx", (folder / "x.xlsx").read_bytes()
    with sqlite3.connect(folder / "d") as database:
        for name in ("first", "second"):
            database.execute(f"CREATE TABLE {name} (city TEXT, n INTEGER)")
            database.executemany(f"INSERT INTO {name} VALUES (?, ?)", rows)
    database.close()
    yield "x.db", (folder / "d").read_bytes()


def test_every_format(client: TestClient, tmp_path_factory: pytest.TempPathFactory) -> None:
    seen = {}
    for name, content in files(tmp_path_factory.mktemp("files")):
        answer = upload(client, name, content)
        assert answer.status_code == 200, (name, answer.text)
        body = answer.json()
        result = query(client, body["id"], "SELECT city, n FROM t ORDER BY n").json()
        assert result["rows"] == [["Oslo", 1], ["Bern", 2], ["Wien", 3]], name
        seen[name] = (body["table"], body["tables"])
        if body["tables"]:
            again = upload(client, name, content, table="second").json()
            assert again["table"] == "second" and again["id"] != body["id"]
            assert "absent" in refused(upload(client, name, content, table="absent"), 400)
    assert seen["x.db"] == ("first", ["first", "second"])
    assert seen["x.xlsx"] == ("first", ["empty", "first", "second"])  # the first with something in it


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE t", "INSERT INTO t SELECT * FROM t", "SELECT 1; SELECT 2", "COPY t TO '/tmp/stolen'",
        "PRAGMA version",
        "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM '/etc/passwd'", "SELECT getenv('HOME')",
        "SET memory_limit = '1TB'", "ATTACH '/tmp/x.db'", "INSTALL httpfs", "SELECT", "", "no such thing",
        "SELECT nothing FROM t", "SELECT " + "(" * 4000 + "1" + ")" * 4000, "x" * 20_000,
    ],
)  # fmt: skip
def test_only_one_plain_select_runs(client: TestClient, sql: str) -> None:
    table = sales(client)
    assert refused(query(client, table, sql), 400)
    assert query(client, table, "SELECT count(*) FROM t").json()["rows"] == [[192]]


def test_a_long_query_is_stopped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "QUERY_SECONDS", 0.3)
    slow = "SELECT count(*) FROM t a, t b, t c, t d, t e WHERE a.units + b.units + c.units + d.units = e.units"
    assert "took longer than" in refused(query(client, sales(client), slow), 400)


def test_many_rows_are_cut_and_long_whole_numbers_survive_javascript(client: TestClient) -> None:
    table = upload(client, "n.csv", b"id\n9007199254740993\n-9007199254740995\n7\n").json()["id"]
    rows = query(client, table, "SELECT id FROM t").json()["rows"]
    assert rows == [["9007199254740993"], ["-9007199254740995"], [7]]
    cut = query(client, sales(client), "SELECT a.units FROM t a, t b").json()
    assert len(cut["rows"]) == 1000 and cut["truncated"]


def test_tables_expire_are_replaced_and_forgotten(client: TestClient, clock: Clock) -> None:
    first = sales(client)
    clock.now += tables.KEEP - 1
    assert query(client, first, "SELECT 1 FROM t LIMIT 1").status_code == 200  # and counts as used
    clock.now += tables.KEEP - 1
    assert query(client, first, "SELECT 1 FROM t LIMIT 1").status_code == 200
    clock.now += tables.KEEP + 1
    assert "upload the file again" in refused(query(client, first, "SELECT 1 FROM t"), 404)

    kept, oldest = sales(client), sales(client)
    for _ in range(tables.MAX_TABLES - 2):
        sales(client)
    assert query(client, kept, "SELECT 1 FROM t LIMIT 1").status_code == 200  # now `oldest` is the longest unused
    sales(client)
    assert query(client, kept, "SELECT 1 FROM t LIMIT 1").status_code == 200
    assert query(client, oldest, "SELECT 1 FROM t LIMIT 1").status_code == 404
    assert client.delete(f"/api/tables/{kept}").status_code == 204
    assert query(client, kept, "SELECT 1 FROM t LIMIT 1").status_code == 404
    assert refused(client.post("/api/ask", json={"table": "nobody's", "question": "how many?"}), 404)


def test_uploads_that_are_no_tables(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {
        "a.csv": b"", "b.csv": b"a,b\n", "c.parquet": b"PAR1 not really", "d.xlsx": b"PK\x03\x04 not really",
        "e.db": b"SQLite format 3\x00 not really", "f.png": b"\x89PNG\r\n\x1a\n\0\0\0", "g.json": b"[1, 2",
    }.items():  # fmt: skip
        message = refused(upload(client, name, content), 400)
        assert name in message and str(tmp_path) not in message, message
    huge = b'note,n\n"' + b"x" * (tables.MAX_CELL + 1) + b'",1\n'
    assert "'note' has a cell of 100001 characters" in refused(upload(client, "h.csv", huge), 400)
    headers = {"content-type": "text/plain"}
    plain = client.post("/api/tables", params={"filename": "x.csv"}, content=b"a\n1\n", headers=headers)
    assert "application/octet-stream" in refused(plain, 400)
    assert "filename" in refused(client.post("/api/tables", content=b"a\n1\n"), 400)
    monkeypatch.setattr(web, "MAX_UPLOAD", 1 << 20)
    assert "more than 1 MB" in refused(upload(client, "big.csv", b"a\n" + b"1\n" * (1 << 20)), 413)
    monkeypatch.setattr(tables, "MAX_UNPACKED", 100)
    book = openpyxl.Workbook()
    book.save(tmp_path / "w.xlsx")
    content = (tmp_path / "w.xlsx").read_bytes()
    (tmp_path / "w.xlsx").unlink()
    assert "unpacks to more" in refused(upload(client, "w.xlsx", content), 400)
    assert not list(tmp_path.iterdir()), "something stayed on disk"


def test_damaged_files_are_refused_or_read(client: TestClient, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut, changed and lengthened at random places: never a failure of the server."""
    whole = list(files(tmp_path_factory.mktemp("files")))
    rng = random.Random(0)
    for k in range(120):
        name, content = whole[k % len(whole)]
        damaged = bytearray(content)
        at = rng.randrange(len(damaged))
        if k % 3 == 0:
            del damaged[at:]
        elif k % 3 == 1:
            damaged[at:at] = rng.randbytes(20)
        else:
            for _ in range(5):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        answer = upload(client, name, bytes(damaged))
        assert answer.status_code in (200, 400), (k, name, answer.text)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd.csv", "passwd.csv"), ("C:\\data\\x.csv", "x.csv"), ("..", "table"),
        ("销售 2024.csv", "销售 2024.csv"), ("<img src=x>.csv", "_img src_x_.csv"),
        ("a" * 300 + ".csv", "a" * 40 + ".csv"), ("a\x00b*[1].csv", "a_b__1_.csv"),
    ],
)  # fmt: skip
def test_a_file_name_stays_a_name(client: TestClient, given: str, shown: str) -> None:
    answer = upload(client, given, b"city,n\nBern,1\n")
    assert answer.json()["name"] == shown


def test_turns_are_one_at_a_time_and_few_wait() -> None:
    turns = tables.Turns(0)
    with turns.take("questions"), pytest.raises(QueueFullError, match="too many questions"), turns.take("questions"):
        pass
    with turns.take("questions"):
        pass  # the place is free again


def test_ask_gives_what_the_analyst_says(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Answer("q?", "unsure", "read so", "SELECT 1", ["n"], [[1 << 60]], 0.5, "sure?")
    monkeypatch.setattr(Asker, "ask", lambda self, question: said)
    answer = client.post("/api/ask", json={"table": sales(client), "question": "q?"}).json()
    assert answer == {"question": "q?", "status": "unsure", "reading": "read so", "sql": "SELECT 1", "columns": ["n"],
                      "rows": [[str(1 << 60)]], "confidence": 0.5, "message": "sure?"}  # fmt: skip


PLAIN: dict[str, Any] = {"/": "text/html", "/assets/app.js": "text/javascript", "/assets/style.css": "text/css",
                         "/assets/i18n/zh.json": "application/json", "/favicon.ico": "image/svg+xml"}  # fmt: skip


def test_files_come_with_the_policy(client: TestClient) -> None:
    for path, kind in PLAIN.items():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind), path
        policy = answer.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "style-src 'self'" in policy
        assert not any("unsafe" in part or "http" in part for part in policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/assets/%2e%2e/web.py").status_code == 404
    assert client.get("/assets/none.js").status_code == 404


def test_no_file_of_ours_reaches_elsewhere() -> None:
    own = [path for path in web.FILES.rglob("*") if path.is_file() and path.parent.name != "vendor"]
    for path in own:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"""https?://\w|["'(]//\w""", text), path.name
        assert "innerHTML" not in text and "eval(" not in text and "style=" not in text, path.name


def test_vendored_files_are_what_is_said() -> None:
    vendor = web.FILES / "vendor"
    said = dict(re.findall(r"\| ([\w.-]+\.js) \|.*\| ([0-9a-f]{64}) \|", (vendor / "README.md").read_text()))
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendor.glob("*.js")}
    assert said == there and len(there) == 3
    licences = (vendor / "LICENSES.txt").read_text(encoding="utf-8")
    assert "vega 6.4.0" in licences and "Redistribution and use" in licences and "d3-array" in licences
    assert sum(path.stat().st_size for path in web.FILES.rglob("*") if path.is_file()) < 2e6


def test_both_languages_say_everything() -> None:
    folder = web.FILES / "i18n"
    english, chinese = (json.loads((folder / f"{k}.json").read_text(encoding="utf-8")) for k in ("en", "zh"))
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
    source = "".join(path.read_text(encoding="utf-8") for path in web.FILES.glob("*.js"))
    page = (web.FILES / "index.html").read_text(encoding="utf-8")
    used = set(re.findall(r"""\bt\("(\w+)"[,)]""", source)) | set(re.findall(r'data-i18n(?:-label)?="(\w+)"', page))
    assert used <= english.keys()
