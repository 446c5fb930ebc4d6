"""How many tokens to draft: what has paid so far, by measured acceptance and time.

A step that drafts k tokens brings 1 + a1 + a1 a2 + ... tokens a sequence, where a_d is how often the d-th draft is
accepted once those before it were. Divided by what such a step takes, that is a speed; the fastest k is taken, 0 if
that is none. Now and then a neighbour is tried again, for acceptance and times change.
"""

from __future__ import annotations

from collections import deque
from statistics import median

_KEPT = 9  # times of each k, of which the median counts
_FIRST = 3  # steps of each k before it is judged
AGAIN = 64  # steps between trials
_DECAY = 0.98  # of acceptance, a draft
_HOPELESS = 0.85  # of the best speed: deeper drafting isn't even tried


class Pace:
    """The choice for steps of one batch size. `most`: drafts a step."""

    def __init__(self, most: int, acceptance: Acceptance) -> None:
        self.most, self.acceptance = most, acceptance
        self._times: list[deque[float]] = [deque(maxlen=_KEPT) for _ in range(most + 1)]
        self._counts = [0] * (most + 1)
        self._since = 0

    def choose(self) -> int:
        """How many tokens to draft in the next step."""
        best, speed = 0, 0.0
        for k in range(self.most + 1):
            if self._counts[k] < _FIRST:
                return k
            if self._speed(k) > speed:
                best, speed = k, self._speed(k)
            elif self._speed(k) < _HOPELESS * speed:
                break
        self._since += 1
        if self._since >= AGAIN:
            self._since = 0
            near = [k for k in (best - 1, best + 1) if 0 <= k <= self.most and self._counts[k]]
            return min(near, key=lambda k: self._counts[k], default=best)
        return best

    def idle(self) -> int:
        """A step in which nothing could be drafted: drafts 0."""
        self._since += 1
        return 0

    def took(self, k: int, seconds: float) -> None:
        """A step that drafted k tokens took this long."""
        self._counts[k] += 1
        if self._counts[k] > 1:  # the first one warms up
            self._times[k].append(seconds)

    def _speed(self, k: int) -> float:
        return self.acceptance.tokens(k) / median(self._times[k])


class Acceptance:
    """How often the d-th draft was accepted after the (d-1)-th was; recent ones count more."""

    def __init__(self, most: int) -> None:
        self._tried, self._taken = [1.0] * most, [0.7] * most  # before anything is known

    def saw(self, drafted: int, accepted: int) -> None:
        for d in range(min(accepted + 1, drafted, len(self._tried))):
            self._tried[d] = self._tried[d] * _DECAY + 1
            self._taken[d] = self._taken[d] * _DECAY + (d < accepted)

    def tokens(self, k: int) -> float:
        """Expected tokens of a step that drafts k."""
        total = chain = 1.0
        for tried, taken in zip(self._tried[:k], self._taken[:k], strict=True):
            chain *= taken / tried
            total += chain
        return total
