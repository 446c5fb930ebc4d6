"""The one-way import order of the packages, and which of them know no torch. See docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "upwell"
ORDER = [
    "errors", "config", "formats", "devices", "ops", "model", "checkpoint", "chat", "engine", "analyst", "server",
    "planner", "deploy", "bench", "cli",
]  # fmt: skip
# The recipe that trains the embedded model stands outside the order: it may use all of it, and nothing imports it.
OUTSIDE = "nano"
WITHOUT_TORCH = ["chat", "planner"]
# analyst reaches a model only through the engine's public entry or the API.
ANALYST_MAY = {"errors", "config", "engine", "analyst"}

FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file; relative imports are resolved."""
    package = ("upwell", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(module: str) -> str | None:
    """'engine' for upwell.engine.llm; None for what isn't ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "upwell" and len(parts) > 1 else None


def own(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_before_it(path: Path) -> None:
    here = own(path)
    if here in (OUTSIDE, "__init__", "__main__"):
        return
    known = [name for name in map(layer, imports(path)) if name in ORDER or name == OUTSIDE]
    assert here in ORDER, f"{here} has no place in the order"
    late = {name for name in known if name == OUTSIDE or ORDER.index(name) > ORDER.index(here)}
    assert not late, f"{path.name} imports from {late}, which come after {here}"
    if here == "analyst":
        assert set(known) <= ANALYST_MAY


@pytest.mark.parametrize("path", [p for p in FILES if own(p) in WITHOUT_TORCH], ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_without_torch(path: Path) -> None:
    heavy = {module for module in imports(path) if module.split(".")[0] in ("torch", "numpy")}
    with_torch = ("devices", "ops", "model", "checkpoint", "engine")
    reached = {name for name in map(layer, imports(path)) if name in with_torch}
    assert not heavy and not reached
