"""How many tokens to draft: what has paid so far, by measured acceptance and time.

A step that drafts k tokens brings 1 + a1 + a1 a2 + ... tokens a sequence, where a_d is how often the d-th draft is
accepted once those before it were. Divided by what such a step takes, that is a speed; the fastest k is taken, 0 if
that is none. Now and then a neighbour is tried again, for acceptance and times change. Times are kept as multiples of
what a step without drafts took just then: a machine that others use becomes slower and faster by itself, and what is
seldom tried shouldn't be judged by that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

AGAIN = 128  # steps between trials
_KEPT = 9  # times of each choice, of which the median counts
_FIRST = 3  # steps of each choice before it is judged; the first of them warms up
_DECAY = 0.98  # of acceptance, a draft
_HOPELESS = 0.85  # of the best speed: drafting more isn't even tried


class Acceptance:
    """How often the d-th draft was accepted after the (d-1)-th was; recent ones count more."""

    def __init__(self, most: int) -> None:
        self._tried, self._taken = [1.0] * most, [0.7] * most  # before anything is known
        self.tokens = self._expected()  # of a step that drafts k, by k

    def saw(self, drafted: int, accepted: int) -> None:
        for d in range(min(accepted + 1, drafted, len(self._tried))):
            self._tried[d] = self._tried[d] * _DECAY + 1
            self._taken[d] = self._taken[d] * _DECAY + (d < accepted)
        self.tokens = self._expected()

    def _expected(self) -> list[float]:
        shares = (taken / tried for tried, taken in zip(self._tried, self._taken, strict=True))
        return list(accumulate(accumulate(shares, mul, initial=1.0)))


class Pace:
    """The choice for steps of one batch size among `choices`, numbers of drafts that rise from 0, which comes first."""

    def __init__(self, choices: Sequence[int], acceptance: Acceptance) -> None:
        self.choices, self._acceptance = tuple(choices), acceptance
        self._times: list[deque[float]] = [deque(maxlen=_KEPT) for _ in choices]  # of the first in seconds
        self._without = 0.0  # seconds, the median of the first's
        self._usual = [1.0] * len(self.choices)  # medians of the others', which are multiples of that
        self._counts = [0] * len(choices)
        self._since = 0

    def choose(self) -> int:
        """How many tokens to draft in the next step."""
        best, fastest = 0, 0.0
        for i, k in enumerate(self.choices):
            if self._counts[i] < _FIRST:
                return k
            speed = self._acceptance.tokens[k] / self._usual[i]
            if speed > fastest:
                best, fastest = i, speed
            elif speed < _HOPELESS * fastest:
                break
        self._since += 1
        if self._since >= AGAIN:
            self._since = 0
            near = [i for i in (best - 1, best + 1) if 0 <= i < len(self.choices) and self._counts[i]]
            best = min(near, key=lambda i: self._counts[i], default=best)
        return self.choices[best]

    def idle(self) -> None:
        """A step in which nothing could be drafted."""
        self._since += 1

    def took(self, k: int, seconds: float) -> None:
        """A step that drafted k tokens took this long."""
        i = self.choices.index(k)
        self._counts[i] += 1
        if self._counts[i] == 1:
            return
        if i == 0:
            self._without = _median(self._times[0], seconds)
        elif self._without > 0:
            self._usual[i] = _median(self._times[i], seconds / self._without)


def _median(kept: deque[float], value: float) -> float:
    """Of what is kept with this value; of an even number, the lower of the two."""
    kept.append(value)
    return sorted(kept)[(len(kept) - 1) // 2]
