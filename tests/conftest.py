"""Settings of all tests, and what the kernels' and the web page's tests share."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from upwell.ops import native

if TYPE_CHECKING:
    from chromium import Browser
    from scripted_site import Site

# A busy machine may take its time: a slow example is no failure.
settings.register_profile("upwell", deadline=None)
settings.load_profile("upwell")


def chosen() -> str:
    library = native.library()
    return "plain" if library is None else str(library.upwell_isa().decode())


def sets_here() -> list[str]:
    """The kernels' instruction sets that this machine has; where there are no kernels, the plain operations."""
    before = chosen()
    found = [name for name in native.ISAS if native.set_isa(name)]
    native.set_isa(before)
    return found or ["plain"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own is the same in each run."""
    torch.manual_seed(0)


@pytest.fixture(params=sets_here())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the kernels in turn."""
    before = chosen()
    native.set_isa(request.param)
    assert chosen() == request.param
    yield request.param
    native.set_isa(before)


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from chromium import Browser

    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """The window, of a laptop's size. Whatever a test does, no script failed and no policy was broken."""
    window.size(1200, 800)
    window.complaints()
    yield window
    assert window.complaints() == []


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    from scripted_site import Site

    site = Site()
    yield site
    site.stop()


@pytest.fixture(scope="session")
def served() -> Iterator[str]:
    """The address of `upwell serve`, started as a user starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "upwell.cli", "serve", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.search(r"on (http://\S+) ", line)
    assert found, line + process.stderr.read()
    yield found[1]
    process.terminate()
    process.communicate(timeout=60)


@pytest.fixture
def picture(browser: Browser, tmp_path: Path) -> Callable[[str], None]:
    """Takes a screenshot, which has to show something; UPWELL_SCREENSHOTS names a folder to keep it in."""
    from PIL import Image

    def take(name: str) -> None:
        image = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
        assert len(image.getcolors(1 << 24) or []) > 20  # a blank page has few colours, text has many greys
        image.quantize(64).save(Path(os.environ.get("UPWELL_SCREENSHOTS", tmp_path)) / f"{name}.png", optimize=True)

    return take


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint as released, for the tests of upwell convert."""
    from conversions import save_official

    return save_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def weights(official: Path) -> dict[str, Tensor]:
    """The linear weights of `official` in FP32."""
    from conversions import dense

    from upwell import load_model

    return dense(load_model(official, dtype=torch.float32))
