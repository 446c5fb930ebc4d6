"""Drafts for nothing: what followed the last two tokens (or the last one) when they stood in the text before.

Answers repeat what they were asked about: names, numbers, code, and nano the plan that its prompt proposes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_REACH = 32768  # tokens of a prompt, its last ones, that are looked at
_BYTES = 4  # of a token in the text that is searched


class Lookup:
    """The text of one sequence, searched from its end: bytes, for a search of bytes takes a microsecond and no index
    has to be made of a prompt whose answer is short."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._text = bytearray(_bytes(tokens[-_REACH:]))
        self._first = len(self._text)

    @property
    def grown(self) -> int:
        """Tokens it was extended by."""
        return (len(self._text) - self._first) // _BYTES

    def extend(self, tokens: Sequence[int]) -> None:
        """The sequence has grown by these."""
        self._text += _bytes(tokens)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none where the end is new."""
        at = self._after(2)
        if at is None:
            at = self._after(1)
        return [] if at is None else list(memoryview(self._text)[at : at + most * _BYTES].cast("i"))

    def _after(self, tokens: int) -> int | None:
        """Where the text goes on after the last time that its last so many tokens stood before."""
        size = tokens * _BYTES
        end, last = len(self._text) - _BYTES, bytes(self._text[-size:])
        while len(last) == size and (at := self._text.rfind(last, 0, end)) >= 0:
            if at % _BYTES == 0:
                return at + size
            end = at + size - 1
        return None


def _bytes(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
