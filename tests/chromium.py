"""Debian's Chromium without a window, driven by selenium; used by the web page's tests.

Where it isn't installed, tests are skipped, but not in CI: there they fail.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 120  # seconds, for a busy machine
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--force-color-profile=srgb", "--lang=en-US",
)  # fmt: skip


def paths() -> tuple[str, str]:
    """Chromium and its driver. Skips the test, or in CI fails it, where one is missing."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium and driver:
        return chromium, driver
    missing = "the page's tests need chromium and chromedriver: apt-get install chromium chromium-driver"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


class Browser:
    """One window. What the page does is waited for, what it may never do is kept and asked for by `complaints`."""

    def __init__(self, profile: Path) -> None:
        chromium, driver = paths()
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.driver.set_script_timeout(PATIENCE)

    def quit(self) -> None:
        self.driver.quit()

    def open(self, address: str, languages: str = "en-US") -> None:
        """The page as someone sees it who was never here."""
        agent = self.driver.execute_script("return navigator.userAgent")
        self.cdp("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=languages)
        self.cdp("Storage.clearDataForOrigin", origin=address, storageTypes="all")
        self.driver.get("about:blank")
        self.driver.get(address)
        self.js("sessionStorage.clear()")
        self.wait(lambda: self.js("return document.documentElement.dataset.ready === 'true'"))

    def size(self, width: int, height: int) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def call(self, module: str, expression: str, *arguments: Any) -> Any:
        """An expression over `m`, a module of the page, and `a`, the arguments; awaited."""
        script = (
            "const [path, a, done] = arguments;"
            f"import(path).then((m) => ({expression})).then((v) => done({{v}}), (e) => done({{e: String(e)}}))"
        )
        answer = self.driver.execute_async_script(script, f"/assets/{module}", list(arguments))
        assert "e" not in answer, answer["e"]
        return answer.get("v")

    def all(self, selector: str) -> list[WebElement]:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

    def one(self, selector: str) -> WebElement:
        """The first that is shown, once it is."""
        return self.wait(lambda: next(iter(self.all(selector)), None), selector)

    def button(self, text: str) -> WebElement:
        return self.wait(lambda: next((b for b in self.all("button") if b.text == text), None), f"a button {text!r}")

    def text(self, selector: str = "main") -> str:
        return "\n".join(e.text for e in self.all(selector))

    def see(self, text: str, selector: str = "main") -> None:
        self.wait(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def wait(self, ready: Callable[[], Any], what: str = "") -> Any:
        wait = WebDriverWait(self.driver, PATIENCE, 0.05, ignored_exceptions=[StaleElementReferenceException])
        try:
            return wait.until(lambda _: ready())
        except TimeoutException:
            pytest.fail(f"never there: {what}\nthe page: {self.text('body')[:2000]}")

    def complaints(self) -> list[str]:
        """Errors of scripts and broken policies since the last time. A refused request alone is none."""
        entries = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in entries if "Failed to load resource" not in message]

    def requested(self) -> set[str]:
        """The addresses asked for since the last time."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}

    def elsewhere(self, site: str) -> list[str]:
        """Of these, the ones that go over the network to anyone but the site."""
        asked = self.requested()
        return sorted(a for a in asked if a.startswith(("http:", "https:", "ws:", "wss:")) and not a.startswith(site))

    def say(self, text: str) -> None:
        """Send a chat message."""
        self.one("#composer").send_keys(text, Keys.ENTER)

    def inert(self) -> None:
        """Nothing that was smuggled in runs, loads, or leads to a script."""
        assert self.js("return window.pwned") is None
        smuggled = "main :is(img, script, iframe, object, embed, [onerror], [onload])"
        assert self.js("return document.querySelectorAll(arguments[0]).length", smuggled) == 0
        links = self.js("return [...document.querySelectorAll('main a')].map((a) => a.protocol)")
        assert set(links) <= {"http:", "https:", "mailto:"}
