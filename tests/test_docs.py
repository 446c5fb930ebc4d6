"""What README shows can be typed: its commands exist and parse, its files are there, its Python compiles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from upwell.cli.main import COMMANDS, _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> Iterator[str]:
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                yield line.strip()


@pytest.mark.parametrize("line", commands())
def test_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"no make target {target}"
    elif words[0] == "upwell" and words[1] in COMMANDS:
        _parser(words[1]).parse_args(words[1:])
        for word in words:
            if word.startswith("examples/"):
                assert (ROOT / word).is_file(), f"{word} isn't there"
    else:
        assert line in ("upwell --version", "pip install .") or words[0] == "git", f"unknown command in README: {line}"


@pytest.mark.parametrize("source", blocks("python"))
def test_python(source: str) -> None:
    compile(source, "README.md", "exec")


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_link(target: str) -> None:
    if not target.startswith("http"):
        assert (ROOT / target).exists(), f"README links to {target}, which isn't there"


def test_ci_runs_what_readme_says() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in README
