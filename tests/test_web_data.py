"""Ask your data in a real Chromium, against `upwell serve` with the embedded model."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from chromium import Browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

SALES = Path(__file__).parents[1] / "examples" / "sales.csv"
QUESTION = "which region has the highest total revenue?"


def table(browser: Browser) -> list[list[str]]:
    rows = "return [...document.querySelectorAll('.answer tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    return browser.js(rows)  # type: ignore[no-any-return]


def totals(column: str) -> dict[str, float]:
    found: dict[str, float] = {}
    with SALES.open() as file:
        for row in csv.DictReader(file):
            found[row["region"]] = round(found.get(row["region"], 0) + float(row[column]), 2)
    return found


def test_a_file_is_asked(
    browser: Browser, served: str, picture: Callable[[str], None], tmp_path: Path
) -> None:
    browser.requested()
    browser.open(served)
    browser.say("hello")
    browser.see("I'm upwell-nano")  # the embedded model says what it is for
    browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.one('[data-view="data"]').click()
    browser.one("#file").send_keys(str(SALES))
    browser.see("192 rows, 6 columns")
    browser.one(".sample summary").click()
    browser.see("2024-01-27", ".sample table")
    browser.one("#question").send_keys(QUESTION, Keys.ENTER)
    browser.one(".answer")
    best = max(totals("revenue").items(), key=lambda entry: entry[1])
    assert table(browser)[1] == [best[0], f"{best[1]:,}"]
    assert re.search(r"confidence \d+%", browser.text(".badges")) and "Read as:" in browser.text(".reading")

    # The query, changed and run again: a table, and a chart of a bar for each row.
    box = browser.one(".answer textarea")
    assert "SELECT" in box.get_attribute("value")
    box.clear()
    box.send_keys("SELECT region, sum(units) AS units FROM t GROUP BY region ORDER BY region")
    browser.button("Run").click()
    browser.wait(lambda: len(browser.all(".chart svg .mark-rect path")) == 4, "four bars")
    expected = [[k, int(v)] for k, v in sorted(totals("units").items())]
    assert table(browser) == [["region", "units"], *([k, f"{v:,}"] for k, v in expected)]
    labels = browser.js("return [...document.querySelectorAll('.chart svg text')].map((e) => e.textContent)")
    assert {"region", "units", *totals("units")} <= set(labels)
    browser.button("Download CSV").click()
    file = tmp_path / "result.csv"
    browser.wait(file.exists, "result.csv")
    assert file.read_bytes().decode("utf-8-sig") == "".join(f"{a},{b}\r\n" for a, b in [("region", "units"), *expected])
    browser.button("Download PNG").click()
    browser.wait((tmp_path / "chart.png").exists, "chart.png")
    browser.js("document.querySelector('.answer').scrollIntoView()")
    picture("data")
    browser.one('select[aria-label="Chart"]').send_keys("line")
    browser.wait(lambda: browser.all(".chart svg .mark-line"), "a line")

    box.clear()
    box.send_keys("DROP TABLE t", Keys.CONTROL + Keys.ENTER)
    browser.see("DROP may not run", ".answer .error")
    assert browser.elsewhere(served) == []


def test_a_forgotten_table_is_sent_again(browser: Browser, served: str) -> None:
    browser.open(f"{served}/#data")
    browser.requested()
    browser.one("#file").send_keys(str(SALES))
    browser.see("192 rows")
    browser.js("""window.asked = []; const before = window.fetch;
        window.fetch = (...a) => { window.asked.push(a); return before(...a); };""")
    browser.one("#question").send_keys(QUESTION, Keys.ENTER)
    browser.one(".answer")
    used = browser.js("return JSON.parse(window.asked.at(-1)[1].body).table")
    assert httpx.delete(f"{served}/api/tables/{used}").status_code == 204
    browser.button("Run").click()
    browser.see("The result of the query as you changed it")
    assert browser.js("return JSON.parse(window.asked.at(-1)[1].body).table") != used
    browser.one("#question").send_keys(" ", Keys.ENTER)  # nothing to ask
    assert len(browser.all("article.answer")) == 1


def test_a_file_that_is_no_table(browser: Browser, served: str, tmp_path: Path) -> None:
    browser.open(f"{served}/#data")
    picture = tmp_path / "picture.csv"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    browser.one("#file").send_keys(str(picture))
    browser.see("picture.csv is not a table", ".error")
    assert not browser.all("#question")


def test_what_data_holds_cant_run(browser: Browser, served: str) -> None:
    browser.open(f"{served}/#data")
    evil = "<img src=x onerror=window.pwned=1>"
    text = (
        f'"{evil}","n","<script>pwned"\n"{evil}",1,"javascript:window.pwned=1"\n'
        '"b<b>",2,"</textarea><svg onload=window.pwned=1>"\n'
    )
    browser.js(
        """const data = new DataTransfer(); data.items.add(new File([arguments[0]], arguments[1]));
        const drop = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
        document.querySelector('#data').dispatchEvent(drop);""",
        text, f"{evil}.csv",
    )  # fmt: skip
    browser.see("2 rows, 3 columns")
    browser.see(evil, ".columns")
    browser.one("#question").send_keys(f"how many rows {evil}?", Keys.ENTER)
    browser.see(evil, ".answer h3")
    boxes = browser.all(".answer textarea")
    if not boxes:  # refused: the question is odd
        browser.one("#question").send_keys("how many rows are there?", Keys.ENTER)
        boxes = browser.wait(lambda: browser.all(".answer textarea"))
    boxes[0].clear()
    boxes[0].send_keys("SELECT * FROM t ORDER BY n")
    browser.button("Run").click()
    browser.see("</textarea><svg onload", ".answer table")
    boxes[0].clear()
    boxes[0].send_keys(f'SELECT "{evil}", n FROM t ORDER BY n')
    browser.button("Run").click()
    browser.wait(lambda: len(browser.all(".chart svg .mark-rect path")) == 2, "two bars")
    assert evil in browser.js("return [...document.querySelectorAll('.chart svg text')].map((e) => e.textContent)")
    ActionChains(browser.driver).move_to_element(browser.all(".chart svg .mark-rect path")[0]).perform()
    browser.inert()


@pytest.mark.parametrize("languages", ["en-US", "zh-CN"])
def test_on_a_phone(browser: Browser, served: str, languages: str, picture: Callable[[str], None]) -> None:
    browser.size(360, 740)
    browser.open(f"{served}/#data", languages)
    browser.one("#file").send_keys(str(SALES))
    browser.one("#question").send_keys(QUESTION, Keys.ENTER)
    browser.one(".answer")
    for view in ("data", "status", "chat"):
        browser.one(f'[data-view="{view}"]').click()
        browser.wait(lambda view=view: browser.all(f"#{view}"))
        wide = """return [...document.querySelectorAll('body, body *')].filter((e) => e.checkVisibility()
            && !e.closest('.scroll, .chart, pre, svg') && e.getBoundingClientRect().right > 361)
            .map((e) => e.outerHTML.slice(0, 80))"""
        assert browser.js(wide) == [], view
        picture(f"phone-{view}-{languages[:2]}")
    browser.say("hello")
    browser.see("I'm upwell-nano")
    box = browser.one("#composer").rect
    assert box["y"] + box["height"] <= 740  # what is written stays in sight
