"""Which cache blocks (and slots) are free. Every id is either free or held once; anything else is a bug and raises."""

from __future__ import annotations

from collections.abc import Sequence

from upwell.config import BLOCK_TOKENS


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class Pool:
    """Ids 0..total-1, handed out and taken back."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._is_free = [True] * total

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` ids, lowest of the recently freed first. The caller has checked `free`."""
        assert count <= len(self._free), f"{count} wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for i in taken:
            self._is_free[i] = False
        return taken

    def give_back(self, ids: Sequence[int]) -> None:
        for i in ids:
            assert not self._is_free[i], f"{i} given back twice"
            self._is_free[i] = True
            self._free.append(i)
