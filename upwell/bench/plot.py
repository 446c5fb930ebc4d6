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
    waits = [row for row in record["rows"] if row["name"].startswith("between tokens")]
    heights = [1.2 + 0.5 * len(rows)] + ([0.8 + 0.4 * len(waits)] if waits else [])
    figure, panels = pyplot.subplots(
        len(heights), figsize=(7, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    axes = panels[0][0]
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
    if waits:
        _draw_waits(panels[1][0], waits)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {file}: {error}", "name a .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)


def _draw_waits(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Median (bar) and 99th percentile (whisker) of the time between tokens."""
    middle = [1000 * row["p50"] for row in rows]
    rest = [1000 * row["p99"] - m for row, m in zip(rows, middle, strict=True)]
    axes.barh([row["name"] for row in rows], middle, 0.6, xerr=[[0.0] * len(rows), rest], capsize=2, color="tab:green")
    axes.invert_yaxis()
    axes.set_xlabel("ms between tokens (median; whisker: 99th percentile)")


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    if "samples" in row:
        return min(row["samples"]), max(row["samples"])
    return row["slowest"], row["fastest"]
