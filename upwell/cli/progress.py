"""A progress bar of bytes with the time left, on stderr, and only where a person sees it."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH, _EVERY = 30, 0.2  # characters; seconds between redraws


class Bar:
    """`with Bar("converting") as bar: bar.show(done, total)`; the first call sets what was there already."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.visible = sys.stderr.isatty()
        self.begun, self.first, self.drawn = 0.0, 0, 0.0

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self.begun:
            self.begun, self.first = now, done
        if not self.visible or (now - self.drawn < _EVERY and done < total):
            return
        self.drawn = now
        share = done / total if total else 1.0
        rate = (done - self.first) / (now - self.begun) if now > self.begun else 0.0
        left = f"{(total - done) / rate:,.0f} s left" if rate else ""
        full = "#" * round(share * _WIDTH)
        line = f"\r{self.label} [{full:<{_WIDTH}}] {share:4.0%} {done / 1e9:,.1f}/{total / 1e9:,.1f} GB {left:<14}"
        sys.stderr.write(line)
        sys.stderr.flush()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.visible and self.drawn:
            sys.stderr.write("\n")
