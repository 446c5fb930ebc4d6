"""What a benchmark leaves: rows with every sample, the machine and build they come from, as JSON and as a table."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import upwell
from upwell.model import Transformer
from upwell.ops import native


def quantile(samples: Sequence[float], q: float) -> float:
    """The smallest sample that at least the share `q` of them doesn't exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * q) - 1)]


def speed_row(name: str, engine: str, tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens a second: `tokens` in each of the samples."""
    return {
        "name": name, "engine": engine, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / statistics.median(seconds),
        "slowest": tokens / max(seconds), "fastest": tokens / min(seconds),
    }  # fmt: skip


def result(
    benchmark: str, command: Sequence[str], model: Transformer, where: str, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The whole record, as it is written to JSON."""
    return {
        "benchmark": benchmark,
        "command": list(command),
        "date": time.strftime("%Y-%m-%d"),
        "build": {"upwell": upwell.__version__, "commit": _commit(), "torch": torch.__version__,
                  "python": platform.python_version(), "kernels": native.describe()},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                    "memory_gib": round(_memory() / 2**30, 1), "system": platform.platform(),
                    "device": str(model.device)},
        "model": {"path": where, "dtype": str(model.dtype)[6:], "products": str(model.products)[6:],
                  "kv_cache_dtype": str(model.cached or model.dtype)[6:], "layers": len(model.layers),
                  "hidden_size": model.config.hidden_size, "vocab_size": model.config.vocab_size},
        "rows": rows,
    }  # fmt: skip


def header(record: dict[str, Any]) -> str:
    """Model, machine and build, two lines."""
    model, machine, build = record["model"], record["machine"], record["build"]
    products = ", products in bfloat16" if model["products"] == "bfloat16" else ""
    products += ", KV cache in int8" if model.get("kv_cache_dtype") == "int8" else ""
    return (
        f"{model['path']}: {model['layers']} layers, hidden {model['hidden_size']}, {model['dtype']}{products} on "
        f"{machine['device']}\n{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; upwell "
        f"{build['upwell']} {build['commit']}, torch {build['torch']}; {build['kernels']}"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def _commit() -> str:
    """The commit that runs, where this is a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "release"
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's model, as its maker calls it where Linux tells, else as Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
