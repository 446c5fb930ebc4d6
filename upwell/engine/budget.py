"""How many prompt tokens a step may compute beside decoding: so many that no one who reads along sees it stall."""

from __future__ import annotations

STRETCH = 3.0  # times as long as decoding alone a step may take that computes prompt tokens too
LEAST = 16  # prompt tokens, whatever they take: a prompt must get done
_REFRESH = 32  # such steps after which decoding alone is measured again


class ChunkBudget:
    """Follows measured times, whatever the model and machine. `most`: tokens it never goes beyond."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tokens = float(min(most, 4 * LEAST))
        self._alone = (0, 0.0)  # sequences decoded without prompt tokens beside them, and in how many seconds
        self._age = 0

    def tokens(self, decoding: int) -> int:
        """Prompt tokens for a step that decodes `decoding` sequences; 0 where it must first learn how long that takes
        alone: for the first time, for a batch of another size, and now and then."""
        sequences, _ = self._alone
        if not sequences <= decoding <= 1.25 * sequences + 1 or not sequences or self._age >= _REFRESH:
            return 0
        return self._clamped(self._tokens)

    def measured(self, decoding: int, tokens: int, seconds: float) -> None:
        """A step decoded `decoding` sequences beside `tokens` prompt tokens in `seconds`.

        One step moves the budget by a factor of 2 at most, and half of that way, as its time has a fixed part: so a
        hiccup of the machine costs little. A chunk shorter than the budget (a prompt's end) may only lower it.
        """
        if not decoding:
            return
        sequences, alone = self._alone
        if not tokens:
            smooth = sequences == decoding and self._age == 0
            self._alone, self._age = (decoding, (alone + seconds) / 2 if smooth else seconds), 0
            return
        self._age += 1
        if not alone:
            return
        room = STRETCH * alone / seconds
        wanted = tokens * min(2.0, max(0.5, room))
        if tokens >= self._clamped(self._tokens) or room < 1:
            self._tokens = float(min(self._most, max(LEAST, (self._tokens + wanted) / 2)))

    def _clamped(self, tokens: float) -> int:
        return min(self._most, max(LEAST, int(tokens)))
