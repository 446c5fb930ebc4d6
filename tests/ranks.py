"""Ranks as threads of one process, over gloo: what they compute is what processes would, without their start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from upwell.checkpoint.load import load_part
from upwell.config import ModelConfig
from upwell.devices.collectives import Group
from upwell.devices.control import Follow, Lead
from upwell.engine import LLM
from upwell.engine.ranks import Follower
from upwell.model.parallel import ParallelTransformer, Ranks
from upwell.model.placement import Placement
from upwell.model.sharding import Shard

T = TypeVar("T")
Models = list[ParallelTransformer]


def process_group(store: dist.Store, name: str, rank: int, size: int) -> Any:
    """torch's own group object over gloo, which isn't the process's one."""
    group = dist.ProcessGroup(dist.PrefixStore(name, store), rank, size)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore(name + "/gloo", store), rank, size, timedelta(seconds=120))
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group


class Threads:
    """`world` ranks; `run` gives each rank's result in order, or raises the first failure."""

    def __init__(self, tp: int = 1, ep: int = 1) -> None:
        self.tp, self.ep, self.world = tp, ep, max(tp, ep)
        self._store = dist.HashStore()
        self._groups = self.run(self._join)

    def run(self, work: Callable[[int], T]) -> list[T]:
        results: list[Any] = [None] * self.world
        failures: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not failures:
                thread.join(0.05)
        if failures:
            raise failures[0]
        return results

    def ranks(self, rank: int, config: ModelConfig, placement: dict[str, Placement] | None = None) -> Ranks:
        return Ranks(Shard(config, rank, self.tp, self.ep, placement or {}), *self._groups[rank])

    def load(self, path: Path, placement: dict[str, Placement] | None = None, **options: Any) -> Models:
        return [
            load_part(path, lambda config, r=r: self.ranks(r, config, placement), **options)  # type: ignore[misc]
            for r in range(self.world)
        ]

    def llm(self, path: Path, placement: dict[str, Placement] | None = None, **options: Any) -> LLM:
        """Rank 0's LLM; the other ranks follow it over its lines, as processes do."""
        models = self.load(path, placement, dtype=torch.float32)
        lead = Lead(self.world)
        address = lead.listen("127.0.0.1")

        def one(rank: int) -> None:
            follower = Follower(Follow(address, rank, ended=lambda: None), self._store, rank)
            follower.model = models[rank]
            follower.serve()

        for rank in range(1, self.world):
            threading.Thread(target=one, args=(rank,), daemon=True).start()
        lead.accept(60, lambda: None)
        models[0].lead = lead
        llm = LLM.from_model(models[0], None, **options)
        llm.engine.at_close.append(lead.close)
        return llm

    def _join(self, rank: int) -> tuple[Group, Group]:
        world, heads = Group(rank, self.world), Group(rank % self.tp, self.tp)
        if self.world > 1:
            world.process_group = process_group(self._store, "world", rank, self.world)
        if self.tp > 1:
            heads.process_group = process_group(self._store, f"heads{rank // self.tp}", rank % self.tp, self.tp)
        return world, heads
