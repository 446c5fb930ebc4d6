"""How many prompt tokens a step may compute beside decoding: so many that no one who reads along sees it stall, and
that those who still wait for a first token, if they are more than the readers, get their share of its time.

A step that decodes d sequences beside p prompt tokens takes about a + b d + c p seconds. The three are fitted to the
steps that were, as a share of what each was expected to take, the latest most. Steps of either kind, with prompt
tokens and without, fade only as others of their kind come: hours of plain decoding don't make it forget what a
prompt's token takes.
"""

from __future__ import annotations

from collections import deque

STRETCH = 2.0, 8.0  # times as long as decoding alone a step may take that computes prompts too: one, and very many
LEAST = 8  # prompt tokens, whatever they take: a prompt must get done
_KEEP = 0.9  # of what is known, a step
_LATEST = 128  # steps of a kind; what came before them has faded
_HICCUP = 2.0  # times as long as expected: what a step takes beyond that doesn't count
_RIDGE = (1e-3, 1e-3, 1e-9)  # what steps haven't told apart goes to the prompt tokens' account

Row = list[float]


class ChunkBudget:
    """Follows measured times, whatever the model and machine. `most`: tokens it never goes beyond."""

    def __init__(self, most: int) -> None:
        self._most = most
        # Normal equations, of steps without prompt tokens and of those with: rows a, b, c; the last column is the time.
        self._sums: tuple[list[Row], list[Row]] = (_zeros(), _zeros())
        self._fit = [0.0, 0.0, 0.0]
        # Steps that aren't counted yet, of either kind: they cost a small model's step less so.
        self._steps = tuple(deque[tuple[int, int, float]](maxlen=_LATEST) for _ in self._sums)

    def tokens(self, decoding: int, prompts: int = 1) -> int:
        """Prompt tokens for a step that decodes `decoding` sequences while `prompts` prompts aren't through."""
        self._learn()
        self._fit = _solved([[x + y for x, y in zip(*rows, strict=True)] for rows in zip(*self._sums, strict=True)])
        fixed, each, prompt = self._fit
        few, many = STRETCH
        stretch = min(many, few * max(1.0, prompts / decoding))  # those who wait for a first token, by their number
        room = (stretch - 1) * (fixed + each * decoding)
        return min(self._most, max(LEAST, int(room / prompt) if prompt > 0 else 0))

    def measured(self, decoding: int, tokens: int, seconds: float) -> None:
        """A step decoded `decoding` sequences beside `tokens` prompt tokens in `seconds`."""
        self._steps[tokens > 0].append((decoding, tokens, seconds))

    def _learn(self) -> None:
        """Count the steps that were since the last fit, by which they are judged."""
        for steps, sums in zip(self._steps, self._sums, strict=True):
            for decoding, tokens, seconds in steps:
                step = (1.0, float(decoding), float(tokens))
                expected = sum(value * x for value, x in zip(self._fit, step, strict=True))
                if expected <= 0:
                    expected = seconds
                if expected <= 0:
                    continue
                equation = [x / expected for x in (*step, min(seconds, _HICCUP * expected))]
                for row, x in zip(sums, equation, strict=False):
                    for k, y in enumerate(equation):
                        row[k] = _KEEP * row[k] + x * y
            steps.clear()


def _zeros() -> list[Row]:
    return [[0.0] * 4 for _ in range(3)]


def _solved(rows: list[Row]) -> list[float]:
    """The solution of three equations with non-negative unknowns: one that would be negative is left out."""
    scale = [max(rows[i][i], 1e-300) ** 0.5 for i in range(3)]
    kept = [0, 1, 2]
    while True:
        system = [
            [rows[i][k] / scale[i] / scale[k] + _RIDGE[i] * (i == k) for k in kept] + [rows[i][3] / scale[i]]
            for i in kept
        ]
        values = [0.0, 0.0, 0.0]
        for i, value in zip(kept, _eliminated(system), strict=True):
            values[i] = value / scale[i]
        worst = min(kept, key=lambda i: values[i] * scale[i])
        if values[worst] >= 0:
            return values
        kept.remove(worst)


def _eliminated(system: list[Row]) -> list[float]:
    """The solution of n positive definite equations, rows of n + 1."""
    n = len(system)
    for i in range(n):
        for j in range(i + 1, n):
            share = system[j][i] / system[i][i]
            system[j] = [y - share * x for x, y in zip(system[i], system[j], strict=True)]
    values = [0.0] * n
    for i in reversed(range(n)):
        values[i] = (system[i][n] - sum(system[i][k] * values[k] for k in range(i + 1, n))) / system[i][i]
    return values
