"""Which cache blocks (and slots) are free, and how many sequences hold each of the others. A miscount raises."""

from __future__ import annotations

from collections.abc import Sequence

from upwell.config import BLOCK_TOKENS


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class Pool:
    """Ids 0..total-1, handed out, shared and taken back. `holders[i]` sequences hold id i; at 0 it is free."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self.holders = [0] * total

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free ids, the last freed first. The caller has checked `free`."""
        assert count <= len(self._free), f"{count} wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for i in taken:
            self.holders[i] = 1
        return taken

    def share(self, ids: Sequence[int]) -> list[int]:
        """The same ids for one more holder."""
        for i in ids:
            assert self.holders[i], f"{i} is free and can't be shared"
            self.holders[i] += 1
        return list(ids)

    def give_back(self, ids: Sequence[int]) -> None:
        for i in ids:
            assert self.holders[i], f"{i} given back too often"
            self.holders[i] -= 1
            if not self.holders[i]:
                self._free.append(i)
