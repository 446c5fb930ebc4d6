"""One model on several processes: rank 0 schedules, samples and serves; the others repeat its calls of the model.

Rank 0 starts the others itself (python -m upwell.engine.ranks), or torchrun starts all. Whichever rank dies or fails,
the others end within seconds, and rank 0's requests with a RankError.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from upwell.checkpoint.load import load_part
from upwell.checkpoint.match import read_config
from upwell.config import ModelConfig, Numerics
from upwell.devices import resolve_device
from upwell.devices.collectives import BACKENDS, Group
from upwell.devices.control import Follow, Lead, Message
from upwell.errors import DeviceError, InputError, RankError
from upwell.model import snapshot
from upwell.model.cache import KVCache, SavedRings, Step
from upwell.model.compiled import precision
from upwell.model.parallel import ParallelTransformer, Ranks
from upwell.model.placement import Placement
from upwell.model.sharding import Shard
from upwell.ops import native

START_SECONDS = 300.0  # a process has to come
COLLECTIVE_SECONDS = 600.0  # an exchange may wait for a rank that is slower
_LEADER = "UPWELL_LEADER"  # in a follower's environment: where rank 0 listens
_MAKES_TENSORS = ("load", "new_cache", "count_experts")  # that outlive the message
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, None: None}


@dataclass(frozen=True)
class Sharing:
    """How a model is shared: `tp` and `ep` ranks (the same ones), and where each layer's experts lie."""

    tp: int = 1
    ep: int = 1
    placement: dict[str, Placement] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return max(self.tp, self.ep)


def launched() -> int:
    """The world's size where torchrun has started this process; else 0."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 0


class Job:
    """Rank 0's side: the model's first part, the line to the others, and those that it has started."""

    def __init__(
        self, path: Path, device: str, dtype: torch.dtype | None, numerics: Numerics, sharing: Sharing,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.sharing = sharing
        kind = _kind(device)
        Shard(read_config(path), 0, sharing.tp, sharing.ep)  # refused before anything is started
        if launched() and launched() != sharing.world:
            raise InputError(
                f"tp {sharing.tp} and ep {sharing.ep} are {sharing.world} ranks, torchrun has started {launched()}",
                "start as many as --tp or --ep says",
            )
        self.lead = Lead(sharing.world)
        self._children: list[subprocess.Popen[bytes]] = []
        about = {
            "path": str(path), "kind": kind, "dtype": _name(dtype), "kv_cache_dtype": _name(kv_cache_dtype),
            "numerics": numerics, "tp": sharing.tp, "ep": sharing.ep, "placement": sharing.placement,
        }  # fmt: skip
        atexit.register(self.close)
        try:
            store = self._gather(kind)
            self.lead.tell("load", about)
            self.model = _load(about, 0, store, self.lead.reason)
            kernels = {rank: answer.values["kernels"] for rank, answer in self.lead.answers().items()}
            odd = next((rank for rank, name in kernels.items() if name != _kernels()), None)
            if odd is not None:
                raise RankError(f"rank {odd} has {kernels[odd]} kernels, rank 0 {_kernels()}")
            self.lead.tell("join", {})
            _join(self.model.ranks, store, kind)
        except BaseException:
            self.close()
            raise
        self.model.lead = self.lead

    def expert_load(self) -> tuple[Tensor, list[int]]:
        """What all ranks have counted: tokens by expert [layers + MTP blocks, E], and the pairs each computed."""
        self.lead.tell("counts", {})
        own = _counts(self.model)
        answers = self.lead.answers()
        total = own[0] + sum(answers[r].tensors[0] for r in sorted(answers))
        return total, [own[1], *(int(answers[r].values["computed"]) for r in sorted(answers))]

    def count_experts(self) -> None:
        self.lead.tell("count_experts", {})
        self.model.count_experts()

    def close(self) -> None:
        """End the others; those that don't go are ended."""
        atexit.unregister(self.close)
        self.lead.close()
        if dist.is_initialized() and self.lead.error is None:
            dist.destroy_process_group()
        until = time.monotonic() + 10
        for child in self._children:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()

    def _gather(self, kind: str) -> Store:
        """Start the others where torchrun hasn't, and let them in."""
        if launched():
            store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS))))
            store.set(_LEADER, self.lead.listen(os.environ["MASTER_ADDR"]))
        else:
            store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            if "lo" in (name for _, name in socket.if_nameindex()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            threads = max(1, torch.get_num_threads() // self.sharing.world)
            if "OMP_NUM_THREADS" not in os.environ and kind == "cpu":
                torch.set_num_threads(threads)
            address = self.lead.listen("127.0.0.1")
            for rank in range(1, self.sharing.world):
                own = {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.sharing.world), _LEADER: address,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
                    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                }  # fmt: skip
                environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **own}
                command = [sys.executable, "-m", "upwell.engine.ranks"]
                null = subprocess.DEVNULL
                child = subprocess.Popen(command, env=environment, stdin=null, stdout=null)
                self._children.append(child)
        self.lead.accept(START_SECONDS, self._check_children)
        return store

    def _check_children(self) -> None:
        for rank, child in enumerate(self._children, 1):
            if child.poll() is not None:
                raise RankError(f"rank {rank} of {self.sharing.world} ended at its start, with {child.returncode}")


class Follower:
    """A rank that repeats what rank 0 does. Each method is a message's name."""

    def __init__(self, line: Follow, store: Store, rank: int) -> None:
        self.line, self.store, self.rank = line, store, rank
        self.model: ParallelTransformer
        self.cache: KVCache
        self.saved: SavedRings
        self.kind = "cpu"

    def serve(self) -> None:
        """Until rank 0 says stop."""
        while (message := self.line.receive()).name != "stop":
            with torch.inference_mode(message.name not in _MAKES_TENSORS):
                getattr(self, message.name)(message)

    def load(self, m: Message) -> None:
        self.kind = m.values["kind"]
        self.model = _load(m.values, self.rank, self.store, lambda: RankError("an exchange between the ranks failed"))
        self.line.answer({"kernels": _kernels()})

    def join(self, m: Message) -> None:
        _join(self.model.ranks, self.store, self.kind)

    def new_cache(self, m: Message) -> None:
        self.cache = self.model.new_cache(**m.values)

    def streams(self, m: Message) -> None:
        step = self._step(m)
        self.model.streams(self._here(m.tensors[0]), None if step is None else self.cache, step)

    def draft_streams(self, m: Message) -> None:
        next_ids, streams = map(self._here, m.tensors)
        block: Any = self.model.mtp[m.values["depth"]]
        for projection in (block.e_proj, block.h_proj):
            projection.keep_decoded_once(self.model.dtype)
        self.model.draft_streams(next_ids, streams, self.cache, self._step(m), m.values["depth"])

    def logits(self, m: Message) -> None:
        self.model.logits(self._here(m.tensors[0]))

    def draft_logits(self, m: Message) -> None:
        self.model.draft_logits(self._here(m.tensors[0]), m.values["depth"])

    def save(self, m: Message) -> None:
        self.saved = self.cache.save(**m.values)

    def restore(self, m: Message) -> None:
        self.cache.restore(self.saved, m.values["which"])

    def copy_slot(self, m: Message) -> None:
        snapshot.copy_slot(self.cache, **m.values)

    def copy_block(self, m: Message) -> None:
        snapshot.copy_block(self.cache, **m.values)

    def put_block(self, m: Message) -> None:
        snapshot.put_block(self.cache, m.values["block"], m.tensors[0], m.values["tokens"])

    def put_state(self, m: Message) -> None:
        snapshot.put_state(self.cache, m.values["slot"], m.values["position"], m.tensors[0])

    def count_experts(self, m: Message) -> None:
        self.model.count_experts()

    def counts(self, m: Message) -> None:
        load, computed = _counts(self.model)
        self.line.answer({"computed": computed}, [load])

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device)

    def _step(self, m: Message) -> Step | None:
        if m.values["step"] is None:
            return None
        slots, starts, lengths, tables = m.values["step"]
        return Step(slots, starts, lengths, tables, self.model.device)


def follow() -> int:
    """Be a follower until rank 0 is done; the exit code. Its environment says where rank 0 is."""
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when this ends, or its end does
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    if _LEADER in os.environ:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False)
        line = Follow(os.environ[_LEADER], rank)
    else:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS))))
        line = Follow(store.get(_LEADER).decode(), rank)
    try:
        Follower(line, store, rank).serve()
    except RankError:
        time.sleep(30)  # another rank has ended: rank 0 knows, and closes the line
        return 1
    except Exception as error:
        line.fail(f"{type(error).__name__}: {error}")
        return 1
    line.close()
    return 0


def _kind(device: str) -> str:
    kind, _, index = device.partition(":")
    if index:
        raise DeviceError(f"device {device!r} is one device, for one rank", f"with tp or ep, give --device {kind}")
    return resolve_device(device).type


def _kernels() -> str:
    library = native.library()
    return "no" if library is None else str(library.upwell_isa().decode())


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _load(about: dict[str, Any], rank: int, store: Store, why: Callable[[], RankError]) -> ParallelTransformer:
    kind, tp = about["kind"], int(about["tp"])
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = resolve_device(kind if kind == "cpu" else f"{kind}:{local}")
    if kind != "cpu":
        getattr(torch, kind).set_device(local)
    placement = {k: tuple(tuple(own) for own in v) for k, v in about["placement"].items()}

    def ranks(config: ModelConfig) -> Ranks:
        shard = Shard(config, rank, tp, int(about["ep"]), placement)
        return Ranks(shard, Group(rank, shard.world, why), Group(rank % tp, tp, why))

    held, products = precision(device, _DTYPES[about["dtype"]], about["numerics"])
    part = load_part(about["path"], ranks, held, device, about["numerics"])
    part.multiply_in(products)
    part.cache_in(_DTYPES[about["kv_cache_dtype"]])
    return part


def _join(ranks: Ranks, store: Store, kind: str) -> None:
    """Make the process groups, all ranks at once."""
    world, tp = ranks.world, ranks.heads.size
    dist.init_process_group(
        BACKENDS[kind], store=PrefixStore("upwell", store), rank=world.rank, world_size=world.size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )  # fmt: skip
    world.process_group = dist.group.WORLD
    for first in range(0, world.size, tp):
        members = list(range(first, first + tp))
        group = dist.group.WORLD if tp == world.size else dist.new_group(members)
        if world.rank in members:
            ranks.heads.process_group = group


def _counts(model: ParallelTransformer) -> tuple[Tensor, int]:
    blocks: list[Any] = [*model.layers, *model.mtp]
    assert model.expert_load is not None
    return model.expert_load.cpu(), sum(block.ffn.computed for block in blocks)


if __name__ == "__main__":
    code = follow()
    os._exit(code)  # torch.distributed's threads may wait for ranks that are gone
