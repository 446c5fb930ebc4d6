"""How the tokens of one forward lie on the ranks between the parts that ranks compute together.

Few tokens are on every rank: partial sums are added up on all of them. Many are split, each rank its own rows, so that
hyper-connections, norms and routing are computed once; a part that needs all tokens gathers them and scatters its sums.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn.functional import pad

from upwell.devices.collectives import Group

SPLIT_TOKENS = 8  # a rank: of fewer tokens, an exchange costs more than computing them on every rank


class Share(Protocol):
    is_split: bool

    def take(self, x: Tensor) -> Tensor:
        """The rank's own rows of x [T, ...]."""

    def gather(self, own: Tensor) -> Tensor:
        """All rows [T, ...] from each rank's own."""

    def reduce(self, partial: Tensor, among: Group | None = None) -> Tensor:
        """The own rows of the sum of each rank's partial [T, ...]; `among`: only these ranks have different parts."""


class Whole:
    """All tokens are every rank's own."""

    is_split = False

    def __init__(self, world: Group) -> None:
        self._world = world

    def take(self, x: Tensor) -> Tensor:
        return x

    def gather(self, own: Tensor) -> Tensor:
        return own

    def reduce(self, partial: Tensor, among: Group | None = None) -> Tensor:
        return (among or self._world).all_reduce(partial.contiguous())


class Split:
    """ceil(T / size) tokens a rank, in order; the last ranks may have fewer, or none."""

    is_split = True

    def __init__(self, world: Group, tokens: int) -> None:
        self._world, self._tokens = world, tokens
        self._each = -(-tokens // world.size)
        self._start = min(tokens, self._each * world.rank)
        self._stop = min(tokens, self._start + self._each)

    def take(self, x: Tensor) -> Tensor:
        return x[self._start : self._stop]

    def gather(self, own: Tensor) -> Tensor:
        return self._world.all_gather(self._padded(own, self._each))[: self._tokens]

    def reduce(self, partial: Tensor, among: Group | None = None) -> Tensor:
        if among is not None and among.size < self._world.size:
            return self.take(among.all_reduce(partial.contiguous()))
        own = self._world.reduce_scatter(self._padded(partial, self._each * self._world.size))
        return own[: self._stop - self._start]

    @staticmethod
    def _padded(x: Tensor, rows: int) -> Tensor:
        missing = rows - x.shape[0]
        return pad(x, [0, 0] * (x.dim() - 1) + [0, missing]) if missing else x


def share(world: Group, tokens: int) -> Share:
    return Split(world, tokens) if world.size > 1 and tokens >= SPLIT_TOKENS * world.size else Whole(world)
