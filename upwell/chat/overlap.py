"""How much of a text's end may be the beginning of something that is still coming."""

from __future__ import annotations


def overlap(text: str, target: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `target`."""
    for size in range(min(len(text), len(target) - 1), 0, -1):
        if target.startswith(text[len(text) - size :]):
            return size
    return 0
