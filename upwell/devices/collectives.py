"""Exchanges between the ranks that share a model, by torch.distributed: gloo on the CPU, HCCL on npu, NCCL on cuda."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from upwell.errors import RankError

BACKENDS = {"cpu": "gloo", "npu": "hccl", "cuda": "nccl"}
# torch 2.13 has new names for these two, and warns of the old ones; 2.10 to 2.12 have only the old ones.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _unknown() -> RankError:
    return RankError("an exchange between the ranks failed")


class Group:
    """Ranks that exchange tensors of equal shape; this one is number `rank` of `size`.

    `why` makes the error of a failed exchange. Without a process group (size 1) every exchange is the identity.
    """

    def __init__(self, rank: int = 0, size: int = 1, why: Callable[[], RankError] = _unknown) -> None:
        self.rank, self.size, self._why = rank, size, why
        self.process_group: Any = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            self._run(dist.all_reduce, x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, ...] of each rank, in their order: [size * n, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._run(_all_gather, out, x.contiguous())
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Of the sum of x [size * n, ...] the rank's own rows [n, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        self._run(_reduce_scatter, out, x.contiguous())
        return out

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """send[r] of the rows [sum(send), ...], in order, go to rank r; receive[r] come from it. Zeros are fine."""
        if self.size == 1:
            return rows
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        self._run(dist.all_to_all_single, out, rows.contiguous(), receive, send)
        return out

    def _run(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments, group=self.process_group)
        except RuntimeError as error:  # as all of torch.distributed's are
            raise self._why() from error
