"""Drafts for nothing: what followed the last two tokens (or the last one) when they stood in the text before.

Answers repeat what they were asked about: names, numbers, code, and nano the plan that its prompt proposes.
"""

from __future__ import annotations

from collections.abc import Sequence

_REACH = 32768  # tokens of a prompt, its last ones, that are looked at


class Lookup:
    """Where each token and each pair of tokens last stood in one sequence."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[int | tuple[int, int], int] = {}
        self.extend(tokens[-_REACH:])
        self._first = len(self._tokens)

    @property
    def grown(self) -> int:
        """Tokens it was extended by."""
        return len(self._tokens) - self._first

    def extend(self, tokens: Sequence[int]) -> None:
        """The sequence has grown by these."""
        own, after = self._tokens, self._after
        for token in tokens:
            at = len(own)
            # What ends just before this token has only now something after it.
            if at > 0:
                after[own[-1]] = at
            if at > 1:
                after[own[-2], own[-1]] = at
            own.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none where the end is new."""
        own = self._tokens
        at = self._after.get((own[-2], own[-1])) if len(own) > 1 else None
        if at is None:
            at = self._after.get(own[-1])
        return [] if at is None else own[at : at + most]
