"""Routed experts that lie on different ranks: tokens go to them, and weighted sums come back.

A token goes once to each rank that has experts of it, with the places and weights of these experts beside it. Ranks may
have any number of tokens to send or compute, none included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from upwell.devices.collectives import Group
from upwell.model.placement import Placement

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [P, D], a place [P, 1] and a weight [P, 1] each -> [P, D]."""


class Places:
    """Where each expert of a layer is: of experts with several copies, tokens take them in turn."""

    def __init__(self, placement: Placement, experts: int, rank: int) -> None:
        self.ranks, self.rank = len(placement), rank
        held = [[(r, own.index(e)) for r, own in enumerate(placement) if e in own] for e in range(experts)]
        most = max(len(copies) for copies in held)
        self._copies = torch.tensor([len(copies) for copies in held], device="cpu")
        # [E, most] the rank and the place there of an expert's copies
        padded = [copies + copies[:1] * (most - len(copies)) for copies in held]
        self._rank, self._place = torch.tensor(padded, device="cpu").unbind(-1)  # whatever the module is built on

    def find(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Ranks [T, k] and places there [T, k] of experts [T, k]. The t-th token takes an expert's copy t mod n."""
        if self._rank.device != experts.device:
            self._copies, self._rank, self._place = (
                t.to(experts.device) for t in (self._copies, self._rank, self._place)
            )
        turn = torch.arange(experts.shape[0], device=experts.device).unsqueeze(1) % self._copies[experts]
        return self._rank[experts, turn], self._place[experts, turn]

    def own(self, experts: Tensor) -> Tensor:
        """Places [T, k] of the experts that this rank is to compute; -1 for others."""
        ranks, places = self.find(experts)
        return places.masked_fill(ranks != self.rank, -1)


def compute_own(compute: Experts, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sum of each token's experts that are here: x [T, D], places [T, k] (-1: not here), weights [T, k] -> [T, D],
    FP32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    token, column = (places >= 0).nonzero(as_tuple=True)
    if token.numel():
        pairs = compute(x[token], places[token, column].unsqueeze(1), weights[token, column].unsqueeze(1))
        out.index_add_(0, token, pairs.float())
    return out


def exchange(
    world: Group, where: Places, compute: Experts, x: Tensor, experts: Tensor, weights: Tensor
) -> tuple[Tensor, int]:
    """All-to-all: x [T, D] of this rank's own tokens, experts and weights [T, k] -> [T, D] FP32, and how many pairs of
    token and expert this rank computed."""
    k = experts.shape[1]
    ranks, places = where.find(experts)
    to = torch.zeros(x.shape[0], where.ranks, dtype=torch.bool, device=x.device).scatter_(1, ranks, True)
    target, token = to.t().nonzero(as_tuple=True)  # by rank, then by token
    going = torch.bincount(target, minlength=where.ranks)
    coming = world.all_to_all(going, [1] * where.ranks, [1] * where.ranks)
    send, receive = going.tolist(), coming.tolist()
    here = ranks[token] == target.unsqueeze(1)
    rows = _join(x[token], places[token].masked_fill(~here, -1), weights[token])
    arrived = world.all_to_all(rows, send, receive)
    x_in, places_in, weights_in = _part(arrived, x, k)
    done = compute_own(compute, x_in, places_in, weights_in)
    back = world.all_to_all(done, receive, send)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, token, back)
    return out, int((places_in >= 0).sum())


def _join(x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """One row of bytes a token: [R, D * item + 8 k]."""
    parts = (x, places.to(torch.int32), weights.float())
    return torch.cat([p.contiguous().view(torch.uint8) if p.numel() else _none(p) for p in parts], dim=1)


def _none(p: Tensor) -> Tensor:
    return p.new_empty(0, p.shape[1] * p.element_size(), dtype=torch.uint8)


def _part(rows: Tensor, like: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [like.shape[1] * like.element_size(), 4 * k, 4 * k]
    dtypes = (like.dtype, torch.int32, torch.float32)
    x, places, weights = (
        part.contiguous().view(dtype) if part.numel() else part.new_empty(0, n // dtype.itemsize, dtype=dtype)
        for part, dtype, n in zip(rows.split(sizes, dim=1), dtypes, sizes, strict=True)
    )
    return x, places.long(), weights
