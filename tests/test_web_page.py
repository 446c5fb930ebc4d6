"""The page as a whole in a real Chromium: languages, keyboard, colours; and its modules, one at a time."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from chromium import Browser
from scripted_site import Site
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys


def test_both_languages(browser: Browser, site: Site) -> None:
    browser.open(site.url, languages="zh-CN,en")
    assert browser.js("return document.documentElement.lang") == "zh-CN"
    assert browser.text("nav") == "对话\n问数据\n状态"
    browser.see("写一条消息开始对话")
    browser.say("你好")
    browser.see("You said: 你好")
    browser.one("#language").send_keys("English")
    browser.see("Ask your data", "nav")
    assert browser.text(".composer button") == "Send" and "You said: 你好" in browser.text(".log")
    browser.driver.refresh()
    browser.see("Ask your data", "nav")  # chosen once, kept
    # Enter that ends the input of Chinese characters sends nothing.
    sent = len(site.bodies)
    browser.one("#composer").send_keys("ni")
    browser.js("""const enter = new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true});
        document.querySelector('#composer').dispatchEvent(enter);""")
    assert len(site.bodies) == sent and browser.one("#composer").get_attribute("value") == "ni"


def test_by_keyboard_alone(browser: Browser, site: Site) -> None:
    browser.open(site.url)

    def press(*keys: str) -> None:
        ActionChains(browser.driver).send_keys(*keys).perform()

    def chord(modifier: str, key: str) -> None:
        ActionChains(browser.driver).key_down(modifier).send_keys(key).key_up(modifier).perform()

    focused = "const e = document.activeElement; return e.id || e.dataset.view || e.className"
    assert browser.js(focused) == "composer"
    browser.js("document.querySelector('a, button, input').focus()")
    order = [browser.js(focused)]
    for _ in range(7):
        press(Keys.TAB)
        order.append(browser.js(focused))
    assert order == ["skip", "chat", "data", "status", "settings-button", "theme-button", "language", "help-button"]
    chord(Keys.ALT, "2")
    browser.see("Choose a file, or drop it here")
    assert browser.js(focused) == "file"
    chord(Keys.ALT, "n")
    browser.wait(lambda: browser.js(focused) == "composer")
    press("hello", Keys.ENTER)
    browser.see("You said: hello")
    browser.js("document.activeElement.blur()")
    press("?")
    browser.see("Shortcuts", "dialog")
    press(Keys.ESCAPE)
    browser.wait(lambda: not browser.all("dialog[open]"))
    press("/")
    assert browser.js(focused) == "composer" and browser.one("#composer").get_attribute("value") == ""
    chord(Keys.ALT, ",")
    browser.see("Temperature", "dialog")
    unnamed = """return [...document.querySelectorAll('button, input, select, textarea')]
        .filter((e) => e.checkVisibility() && !e.textContent.trim() && !e.ariaLabel && !e.labels?.length).length"""
    assert browser.js(unnamed) == 0
    press(Keys.ESCAPE)


def test_dark_and_light(browser: Browser, site: Site) -> None:
    browser.open(site.url)

    def brightness() -> int:
        colour = browser.js("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    try:
        for system in ("dark", "light"):
            browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
            assert (brightness() < 150) == (system == "dark")
        browser.one("#theme-button").click()  # light
        browser.one("#theme-button").click()  # dark, whatever the system is
        assert brightness() < 150
        browser.driver.refresh()
        browser.one("#composer")
        assert brightness() < 150
    finally:
        browser.cdp("Emulation.setEmulatedMedia", features=[])


def test_sums_of_metrics(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    before = 'a{x="1"} 1\na{x="2"} 2\nb_bucket{le="1"} 1\nb_bucket{le="2"} 1\nb_bucket{le="+Inf"} 1'
    after = (
        'a{x="1"} 4\na{x="2"} 5 1700000000\n# a 9\n?\n'
        'b_bucket{le="1"} 3\nb_bucket{le="2"} 7\nb_bucket{le="+Inf"} 7'
    )
    both = "...a.map(m.parseMetrics)"
    sums = f"m.growth({both}, 'a'), m.growth({both}.reverse(), 'a'), m.growth({both}, 'c')"
    expression = f"[{sums}, m.quantileBetween({both}, 'b', 0.5)]"
    # Since the first scrape 2 fell into (0, 1] and 4 into (1, 2]: the third of six is a quarter into the latter.
    assert browser.call("prometheus.js", expression, before, after) == [6, 3, None, 1.25]


WEB = 'target="_blank" rel="noopener noreferrer nofollow"'
MARKDOWN = {
    "a *b* **c** `d<e>` ~~f~~ 2*3*4 snake_case_name":
        "<p>a <em>b</em> <strong>c</strong> <code>d&lt;e&gt;</code> <del>f</del> 2*3*4 snake_case_name</p>",
    "## T #\n---\n> q\n> r": "<h4>T</h4><hr><blockquote><p>q\nr</p></blockquote>",
    "- a\n  - b\n- c\n\nd": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul><p>d</p>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "[x](https://a.example/b_(c)) [y](javascript:alert(1)) [z](/local)":
        f'<p><a href="https://a.example/b_(c)" {WEB}>x</a> [y](javascript:alert(1)) [z](/local)</p>',
    "see https://a.example/b.": f'<p>see <a href="https://a.example/b" {WEB}>https://a.example/b</a>.</p>',
    "![i](https://a.example/i.png)": f'<p><a href="https://a.example/i.png" {WEB}>i</a></p>',
    "\\*a\\* <b>&amp;</b>": "<p>*a* &lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
    "**open `never closed": "<p>**open `never closed</p>",
    "a  \nb": "<p>a<br>b</p>",
}  # fmt: skip


def test_markdown(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    html = "(x) => { const e = document.createElement('div'); e.append(m.markdown(x)); return e.innerHTML; }"
    assert browser.call("markdown.js", f"a[0].map({html})", list(MARKDOWN)) == list(MARKDOWN.values())
    table = "| a | b |\n|:--|--:|\n| 1 \\| 2 | `x` |\nafter"
    cells = "[...m.markdown(a[0]).querySelectorAll('th, td')].map((c) => c.textContent + c.className)"
    assert browser.call("markdown.js", cells, table) == ["a", "bright", "1 | 2", "xright"]


def test_markdown_made_to_be_slow_isnt(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    hostile = [
        ">" * 5000, "- " * 3000, "**a " * 12_000, "[" * 20_000, "`" * 20_000 + "a", "*a" * 20_000, "_" * 30_000,
        "|" * 20_000 + "\n" + "|-" * 9000,
    ]  # fmt: skip
    spent = "a.map((x) => { const from = performance.now(); m.markdown(x); return performance.now() - from; })"
    plain, *times = browser.call("markdown.js", spent, "**a** word `b` " * 1000, *hostile)
    assert max(times) < 500 * max(plain, 10), times


CHARTS: list[tuple[list[str], list[list[Any]], dict[str, Any] | None]] = [
    (["region", "total"], [["N", 1], ["S", 2.5]], {"kind": "bar", "x": 0, "y": 1, "colour": None}),
    (["day", "n"], [["2024-01-01", 1], ["2024-01-02", None]], {"kind": "line", "x": 0, "y": 1, "colour": None}),
    (["city", "year", "n"], [["A", 2020, 1], ["B", 2021, 2]], {"kind": "line", "x": 1, "y": 2, "colour": 0}),
    (["city", "year", "n"], [[f"C{k}", 2020, k] for k in range(11)], {"kind": "point", "x": 1, "y": 2, "colour": None}),
    (["weight", "height"], [[1.5, 2], [3, 4]], {"kind": "point", "x": 0, "y": 1, "colour": None}),
    (["total"], [[1], [2]], None), (["a", "b"], [["x", "y"], ["z", "w"]], None), (["a", "n"], [["x", 1]], None),
]  # fmt: skip


def test_a_chart_suits_its_columns(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    results = [(columns, rows) for columns, rows, _ in CHARTS]
    suggested = browser.call("chart.js", "a.map(([columns, rows]) => m.suggest(columns, rows))", *results)
    assert suggested == [wanted for _, _, wanted in CHARTS]


def test_csv(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    rows: list[list[Any]] = [["a,b", 1.5, None], ['say "x"', -2, "two\nlines"], [" padded ", True, "中文"]]
    text = browser.call("csv.js", "m.toCsv(a[0], a[1])", ["x", "y", "z"], rows)
    read = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")))
    assert text.startswith("\ufeff")
    assert read == [["x", "y", "z"], ["a,b", "1.5", ""], ['say "x"', "-2", "two\nlines"], [" padded ", "true", "中文"]]
