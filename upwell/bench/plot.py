"""A benchmark's record as a picture: what was measured, with its spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upwell.errors import InputError


def plot(record: dict[str, Any], file: Path) -> None:
    """Draw a record (as `upwell bench --json` writes it) to a PNG, SVG or PDF. Raises InputError."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise InputError("--plot: matplotlib isn't installed", "pip install matplotlib") from None
    rows = [row for row in record["rows"] if "tokens_per_second" in row]
    names = list(dict.fromkeys(row["name"] for row in rows))
    engines = list(dict.fromkeys(row.get("engine", "upwell") for row in rows))
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.5 * len(rows)), layout="constrained")
    height = 0.8 / len(engines)
    for k, engine in enumerate(engines):
        own = [row for row in rows if row.get("engine", "upwell") == engine]
        at = [names.index(row["name"]) + (k - (len(engines) - 1) / 2) * height for row in own]
        speeds = [row["tokens_per_second"] for row in own]
        ends = [_ends(row) for row in own]
        spread = [[s - low for s, (low, _) in zip(speeds, ends, strict=True)],
                  [high - s for s, (_, high) in zip(speeds, ends, strict=True)]]  # fmt: skip
        bars = axes.barh(at, speeds, height, xerr=spread, label=engine, capsize=2)
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("tokens a second (median; whiskers: slowest and fastest)")
    axes.set_title(f"{record['model']['path']}, {record['machine']['cpu']}, {record['date']}", fontsize=9)
    if len(engines) > 1:
        axes.legend()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {file}: {error}", "name a .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    if "samples" in row:
        return min(row["samples"]), max(row["samples"])
    return row["slowest"], row["fastest"]
