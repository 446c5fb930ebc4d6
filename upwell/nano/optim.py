"""Muon for matrices, AdamW for the rest, as V4 itself is trained (paper section 3); sharded over ranks.

Muon orthogonalises the momentum of each matrix by Newton-Schulz steps, so every direction learns at one rate. Each
rank does its share of the matrices; the updates are summed. Scale 0.2 sqrt(max(m, n)) gives them AdamW's usual RMS.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# AdamW moves every entry of a row alike, so a row's output moves with its length: these would swing too fast.
SLOW = ("gate.weight", ".fn")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards U V^T of each matrix: [N, m, n] -> [N, m, n], computed in BF16."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if transposed else x).float()


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon's parameters: the projections inside blocks. Tables, routers, gains and mHC stay with AdamW."""
    if parameter.dim() == 3:
        return True
    skip = ("embed", "head", "ape", "gate.weight", "hc_", "weights_proj")
    return parameter.dim() == 2 and not any(part in name for part in skip)


class Optimizer:
    """`step(lr)` applies the gradients of `named` parameters, the same on every rank."""

    def __init__(self, named: dict[str, nn.Parameter], weight_decay: float = 0.05, momentum: float = 0.95) -> None:
        self.matrices = {n: p for n, p in named.items() if is_matrix(n, p)}
        self.weight_decay, self.momentum = weight_decay, momentum
        self.velocity = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        rest = {n: p for n, p in named.items() if n not in self.matrices}
        slow = [p for n, p in rest.items() if n.endswith(SLOW)]
        usual = [p for n, p in rest.items() if not n.endswith(SLOW)]
        groups = [{"params": usual, "factor": 1.0}, {"params": slow, "factor": 0.1}]
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = lr * group["factor"]
        self.adam.step()
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        updates: dict[str, Tensor] = {}
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name, parameter in self.matrices.items():
            velocity = self.velocity[name]
            assert parameter.grad is not None
            velocity.lerp_(parameter.grad, 1 - self.momentum)
            updates[name] = torch.zeros_like(parameter)
            by_shape.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(name)
        for (rows, cols), names in by_shape.items():
            stacked = torch.cat([
                self._nesterov(n).view(-1, rows, cols) for n in names
            ])  # fmt: skip
            owner = torch.arange(stacked.shape[0]) % world == rank
            flat = torch.zeros_like(stacked)
            flat[owner] = orthogonalise(stacked[owner]) * (0.2 * max(rows, cols) ** 0.5)
            for name, part in zip(names, flat.split([self.matrices[n].numel() // (rows * cols) for n in names]),
                                  strict=True):  # fmt: skip
                updates[name] = part.view_as(self.matrices[name])
        reduce_sum([*updates.values()])
        for name, parameter in self.matrices.items():
            parameter.mul_(1 - lr * self.weight_decay).add_(updates[name], alpha=-lr)

    def _nesterov(self, name: str) -> Tensor:
        gradient = self.matrices[name].grad
        assert gradient is not None
        return self.velocity[name].lerp(gradient, 1 - self.momentum)

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self.velocity, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, velocity in state["velocity"].items():
            self.velocity[name].copy_(velocity)
        self.adam.load_state_dict(state["adam"])


def reduce_sum(tensors: list[Tensor]) -> None:
    """Sum each tensor over ranks in place, as one message."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
