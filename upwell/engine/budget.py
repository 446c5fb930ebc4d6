"""How many prompt tokens a step may compute beside decoding: so many that no one who reads along sees it stall."""

from __future__ import annotations

STRETCH = 1.5  # a step's prompt tokens may take this many times as long as its decoding
LEAST = 16  # tokens, whatever they take: a prompt must get done


class ChunkBudget:
    """Follows measured times, whatever the model and machine. `tokens` lies in LEAST..most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tokens = float(min(most, 4 * LEAST))

    @property
    def tokens(self) -> int:
        return min(self._most, max(LEAST, int(self._tokens)))

    def measured(self, decode: float, prefill: float, tokens: int) -> None:
        """A step decoded for `decode` seconds and computed `tokens` prompt tokens in `prefill` seconds.

        One step moves the budget by a factor of 2 at most, so a hiccup of the machine costs little; a chunk that was
        shorter than the budget (a prompt's end) may only lower it.
        """
        if prefill <= 0 or tokens <= 0:
            return
        factor = min(2.0, max(0.5, STRETCH * decode / prefill))
        wanted = tokens * factor
        if tokens >= self.tokens or wanted < self._tokens:
            # Half way there: a chunk's time has a fixed part, so the whole way would overshoot.
            self._tokens = min(float(self._most), max(float(LEAST), (self._tokens + wanted) / 2))
