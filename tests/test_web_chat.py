"""Chat and status in a real Chromium, against a scripted stand-in for a model (scripted_site.py)."""

from __future__ import annotations

from collections.abc import Callable

from chromium import Browser
from scripted_site import Site
from selenium.webdriver.common.keys import Keys


def test_a_reply_streams_reasons_and_is_kept(browser: Browser, site: Site, picture: Callable[[str], None]) -> None:
    site.go_on.clear()
    browser.open(site.url)
    browser.say("think")
    browser.see("The **answer")  # half of it has come, and stands there as it is
    assert browser.one(".composer button").text == "Stop"
    reasoning = browser.one("details.reasoning")
    assert "forty-two" not in reasoning.text  # folded
    reasoning.find_element("css selector", "summary").click()
    browser.see("Six times seven is forty-two.")
    site.go_on.set()
    browser.see("7 tokens")
    assert "forty-two" in browser.text(".reasoning")  # what was unfolded stays so
    message = browser.one(".message.assistant > .markdown")
    assert message.find_element("css selector", "strong").text == "answer"
    assert [item.text for item in message.find_elements("css selector", "ol > li")] == ["one", "two"]
    assert message.find_element("css selector", "pre code").text == "print(42)"
    assert browser.one(".composer button").text == "Send"
    picture("chat")
    browser.say("again")
    browser.see("You said: again")
    assert [m["role"] for m in site.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert site.bodies[-1]["messages"][1]["reasoning_content"] == "Six times seven is forty-two."
    browser.driver.refresh()
    browser.see("You said: again")  # saved in the browser
    browser.button("New conversation").click()
    assert "You said" not in browser.text(".log")
    browser.button("think").click()
    browser.see("You said: again")
    browser.one('[aria-label="Delete think"]').click()
    browser.driver.refresh()
    browser.see("Write a message to begin")


def test_a_tool_call_is_shown_and_answered(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    browser.say("tool")
    browser.see("weather", ".call")
    assert browser.one(".call pre").text == '{\n  "city": "Bern"\n}'
    browser.one(".call textarea").send_keys("21 degrees")
    browser.button("Send results").click()
    browser.see("The tool says: 21 degrees")
    user, assistant, tool = site.bodies[-1]["messages"]
    assert user["content"] == "tool" and tool == {"role": "tool", "tool_call_id": "call_0", "content": "21 degrees"}
    function = {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert assistant["tool_calls"] == [{"id": "call_0", "type": "function", "function": function}]


def test_stop_ends_the_request(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    for stop in (lambda: browser.button("Stop").click(), lambda: browser.one("#composer").send_keys(Keys.ESCAPE)):
        site.left.clear()
        browser.say("endless")
        browser.see("more and more and")
        stop()
        assert site.left.wait(60), "the server still writes"
        browser.see("Stopped.")
        browser.button("New conversation").click()


def test_errors_are_shown_and_tried_again(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    browser.say("busy")
    browser.see("the queue is full (try again in a moment)", ".error")
    browser.button("Try again").click()
    busy = {"role": "user", "content": "busy"}
    browser.wait(lambda: [b["messages"] for b in site.bodies].count([busy]) == 2, "a second try")
    browser.see("the queue is full", ".error")
    browser.button("New conversation").click()
    browser.say("break")
    browser.see("the model failed", ".error")
    assert "Half of" in browser.text(".message.assistant")


def test_settings_reach_the_request_and_a_key_is_asked_for(browser: Browser, site: Site) -> None:
    site.key = "s3cret"
    try:
        browser.open(site.url)
        browser.say("hello")
        browser.see("This server wants an API key", ".error")
        browser.button("Settings").click()
        browser.wait(lambda: len(browser.js("return [...document.querySelectorAll('#setting-model option')]")) == 3)
        tools = '[{"type": "function", "function": {"name": "weather"}}]'
        for name, value in {
            "model": "v4-other", "thinking": "max", "temperature": "0.5", "maxTokens": "64", "system": "Be brief.",
            "tools": "[nonsense", "apiKey": "s3cret",
        }.items():  # fmt: skip
            browser.one(f"#setting-{name}").send_keys(value)
        browser.button("Save").click()
        browser.see("Tools aren't JSON", "dialog")
        browser.js("document.querySelector('#setting-tools').value = arguments[0]", tools)
        browser.button("Save").click()
        browser.button("Try again").click()
        browser.see("You said: hello")
        assert site.bodies[-1] == {
            "model": "v4-other", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5,
            "max_tokens": 64, "reasoning_effort": "max",
            "tools": [{"type": "function", "function": {"name": "weather"}}],
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        }  # fmt: skip
        assert "s3cret" not in browser.js("return JSON.stringify(localStorage)")
    finally:
        site.key = None


def test_what_a_model_writes_cant_run(browser: Browser, site: Site) -> None:
    browser.open(site.url)
    browser.requested()
    browser.say("evil")
    browser.see("<script>window.pwned = 1</script>")
    browser.one(".reasoning summary").click()
    browser.see('onerror="window.pwned = 1"', ".reasoning")
    browser.see("<iframe srcdoc", ".message table")
    browser.inert()
    browser.say("<img src=x onerror='window.pwned=1'>")
    browser.see("You said: <img src=x")
    browser.driver.refresh()  # titles and messages from storage
    browser.see("You said: <img src=x")
    browser.inert()
    assert browser.elsewhere(site.url) == []


def test_a_script_that_got_in_would_not_run(browser: Browser, site: Site) -> None:
    """The second line of defence: the policy, against markup and scripts put in by hand."""
    browser.open(site.url)
    as_markup = "try { document.body.innerHTML = '<b>x</b>'; return 'set'; } catch (e) { return e.name; }"
    assert browser.js(as_markup) == "TypeError"
    browser.js("""
        const add = (name, set) => { const e = document.createElement(name); set(e); document.body.append(e); };
        add('img', (e) => { e.setAttribute('src', 'http://elsewhere.invalid/x.png'); });
        add('a', (e) => { e.id = 'bad'; e.href = 'javascript:window.pwned=1'; e.textContent = 'bad'; });
        add('style', (e) => { e.textContent = 'body { --pwned: 1; }'; });
        document.querySelector('#bad').click();
    """)
    browser.wait(lambda: sum("Content Security Policy" in line for line in browser.complaints()) or True)
    assert browser.js("return window.pwned") is None
    assert browser.js("return getComputedStyle(document.body).getPropertyValue('--pwned')") == ""
    browser.driver.get("about:blank")
    browser.complaints()


METRICS = """# HELP vllm:num_requests_running x
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="v4 \\"tiny\\", with a comma"} 3.0
vllm:num_requests_waiting{model_name="v4"} 2.0
vllm:kv_cache_usage_perc{model_name="v4"} 0.25
vllm:generation_tokens_total{model_name="v4"} {N}
vllm:prefix_cache_queries_total 0
vllm:prefix_cache_hits_total 0
vllm:time_to_first_token_seconds_bucket{le="0.1"} 0
vllm:time_to_first_token_seconds_bucket{le="0.3"} {N}
vllm:time_to_first_token_seconds_bucket{le="+Inf"} {N}
"""


def test_status_plots_what_the_server_reports(browser: Browser, site: Site, picture: Callable[[str], None]) -> None:
    def value(plot: str) -> str:
        return browser.text(f'[data-plot="{plot}"] .value')

    site.metrics = METRICS
    browser.open(f"{site.url}/#status")
    browser.wait(lambda: len(browser.all(".sparkline")) >= 5, "sparklines")
    assert "Serving" in browser.text()
    assert (value("runningRequests"), value("queue"), value("cacheUse")) == ("3", "2", "25 %")
    assert float(value("generated").split()[0].replace(",", "")) > 0
    assert value("firstToken") == "200 ms"  # all between 100 and 300: the median half way
    assert value("firstTokenSlow") == "290 ms"
    assert value("prefixHits") == "–" and value("perToken") == "not reported"
    picture("status")
    site.metrics = None
    browser.see("This server reports no metrics.")
    assert "Serving" in browser.text()
