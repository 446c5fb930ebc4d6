"""Decode steps captured as device graphs: one for each bucket of batch size and table width, replayed on new numbers.

A decode step launches thousands of small kernels; replaying a graph launches one. The step's shapes depend on its
bucket alone (model/cache.py, DecodeInputs), and it never waits for the device, so it can be captured. A batch is
filled up to its bucket with copies of its first sequence, which compute and store the same values again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upwell.errors import InputError
from upwell.model import KVCache, Step, Transformer
from upwell.model.cache import DecodeInputs

WARM_UP = 2  # runs before capture, so that the allocator and lazily built tables are settled


@dataclass
class _Captured:
    graph: Any
    ids: Tensor
    inputs: DecodeInputs
    streams: Tensor


class DecodeGraphs:
    """Runs decode steps of one model over one cache through graphs, capturing each bucket when it is first met."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.backend = getattr(torch, model.device.type, None)
        if not hasattr(self.backend, "graph"):
            raise InputError(f"graphs aren't possible on {model.device.type}", "they are for npu and cuda")
        self._buckets: dict[tuple[int, int], _Captured] = {}

    def streams(self, ids: list[int], step: Step) -> Tensor:
        """One token a sequence, ids [B] -> the final streams [B, h, D] (Transformer.streams)."""
        batch = bucket(len(ids))
        width = bucket(max(len(table) for table in step.tables))
        filled = [*range(len(ids)), *[0] * (batch - len(ids))]
        tables = [step.tables[b] + [0] * (width - len(step.tables[b])) for b in filled]
        numbers = [[ids[b]] for b in filled], [step.slots[b] for b in filled], [step.starts[b] for b in filled], tables
        new_ids, slots, positions, new_tables = (torch.tensor(n, dtype=torch.long) for n in numbers)
        captured = self._buckets.get((batch, width))
        if captured is None:
            captured = self._capture(new_ids, DecodeInputs(slots, positions, new_tables))
            self._buckets[batch, width] = captured
        captured.ids.copy_(new_ids, non_blocking=True)
        captured.inputs.slots.copy_(slots, non_blocking=True)
        captured.inputs.positions.copy_(positions, non_blocking=True)
        captured.inputs.tables.copy_(new_tables, non_blocking=True)
        captured.graph.replay()
        return captured.streams[: len(ids)].clone()  # the next replay writes over them

    def _capture(self, ids: Tensor, numbers: DecodeInputs) -> _Captured:
        device = self.model.device
        slots, positions, tables = (t.to(device) for t in (numbers.slots, numbers.positions, numbers.tables))
        ids = ids.to(device)
        # The warm-up computes this very step, so what it stores is what the replay stores again.
        for _ in range(WARM_UP):
            self._run(ids, DecodeInputs(slots, positions, tables))
        self.backend.synchronize()  # type: ignore[union-attr]
        graph = (self.backend.NPUGraph if device.type == "npu" else self.backend.CUDAGraph)()  # type: ignore[union-attr]
        inputs = DecodeInputs(slots, positions, tables)
        with self.backend.graph(graph):  # type: ignore[union-attr]
            streams = self._run(ids, inputs)
        return _Captured(graph, ids, inputs, streams)

    def _run(self, ids: Tensor, inputs: DecodeInputs) -> Tensor:
        batch = ids.shape[0]
        zeros = [0] * batch
        step = Step(zeros, zeros, [1] * batch, [[]] * batch, ids.device, on_device=inputs)
        return self.model.streams(ids, self.cache, step)


def bucket(n: int) -> int:
    """The least power of two that isn't below n."""
    return 1 << max(0, n - 1).bit_length()
