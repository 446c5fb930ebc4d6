"""Routed experts paged in from a checkpoint's shards, within a fixed number of bytes of memory.

The memory is cut into slots of one expert each. A layer that needs an expert finds it in a slot (a hit) or has it read
into the slot whose expert was used least, by counts that fade with the steps; so the hot ones stay. Experts that a
layer is expected to need are read ahead, after all that is needed now.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from upwell.checkpoint.expert_reads import Extent, Load, Readers
from upwell.checkpoint.match import Weight
from upwell.errors import CheckpointError, EngineError, InputError
from upwell.ops.experts_native import LEAVES, Places

logger = logging.getLogger(__name__)

HALF_LIFE = 64  # steps after which a use counts half
_LARGEST = 1e200


@dataclass
class PageCounts:
    """What happened since the start. A request is one expert of one layer in one step."""

    requests: int = 0
    hits: int = 0  # it was in memory before the step
    expected: int = 0  # experts read ahead in a step
    needed: int = 0  # of these, those that were needed
    read_bytes: int = 0


class ExpertPages:
    """model.offload.Pages over shards. `layers`: for each layer w1, w2, w3 -> each expert's weight and scale."""

    def __init__(
        self, layers: list[dict[str, list[Weight]]], memory: int, per_token: int, usage: Path | None = None,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        first = layers[0]["w1"][0][0]
        self.kind = torch.float8_e4m3fn if first.dtype == "F8_E4M3" else torch.uint8
        self.count = len(layers[0]["w1"])
        self._shapes = [shape for leaf in LEAVES for shape in _shapes(layers[0][leaf][0])]
        self._extents = [
            Extent.of([tensor for leaf in LEAVES for tensor in parts[leaf][e] if tensor is not None])
            for parts in layers
            for e in range(self.count)
        ]
        self._names = [f"{parts['w1'][e][0]}" for parts in layers for e in range(self.count)]
        self.slot_bytes = max(extent.nbytes for extent in self._extents)
        self.slots = min(memory // self.slot_bytes, len(self._extents))
        if self.slots < per_token:
            raise InputError(
                f"expert_memory is {memory:,} bytes, a token takes {per_token} experts of {self.slot_bytes:,} at once",
                f"give at least {-(-per_token * self.slot_bytes // 2**20)}MiB",
            )
        size = self.slots * self.slot_bytes
        if size > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            raise InputError(f"expert_memory is {size:,} bytes, this machine has {there:,}", "give it less")
        try:
            arena = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise InputError(f"expert_memory: {size:,} bytes can't be had: {error}") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a read pins its pages: few large ones
            arena.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(arena, dtype=torch.uint8)
        self._files = sorted({run.file for extent in self._extents for run in extent.runs})
        self.lock = threading.RLock()
        self.counts = PageCounts()
        self._guard = threading.Lock()
        self._changed = threading.Condition(self._guard)
        self._slot_of = np.full(len(self._extents), -1, np.int64)  # by key: layer * count + expert
        self._key_of = np.full(self.slots, -1, np.int64)
        self._busy = np.zeros(self.slots, bool)  # is read into, or used by the visit
        self._ahead = np.zeros(self.slots, bool)  # kept for a layer that is expected to need it
        self._fresh = np.zeros(self.slots, bool)  # read ahead, not asked for yet
        self._uses = np.zeros(len(self._extents))
        self._weight, self._last_layer = 1.0, -1
        self._loads: dict[int, Load] = {}
        self._missing: list[int] = []  # of the visit: no slot yet
        self._wanted: set[int] = set()  # of the visit: not given yet
        self._given: list[int] = []
        self._failed: Load | None = None
        finished = weakref.WeakMethod(self._finished)
        self._readers = Readers(
            memoryview(arena), self._guard, lambda load: (done := finished()) and done(load),
            **({} if threads is None else {"threads": threads}),
        )  # fmt: skip
        weakref.finalize(self, self._readers.close)
        self._usage = usage
        if usage is not None and not usage.parent.is_dir():
            raise InputError(f"expert_usage {usage}: no such directory", "make it first")
        if usage is not None and usage.exists():
            self._read_usage(usage)

    # A visit of a layer.

    def begin(self, layer: int, experts: list[int]) -> None:
        with self._guard:
            self._end()
            if layer <= self._last_layer:
                self._step()
            self._last_layer = layer
            keys = [layer * self.count + e for e in experts]
            self._wanted, self._missing = set(keys), []
            self._forget(layer)
            for key in keys:
                self._uses[key] += self._weight
                slot, load = self._slot_of[key], self._loads.get(key)
                self.counts.requests += 1
                if slot < 0:
                    self._missing.append(key)
                    continue
                self._busy[slot] = True
                if load is not None:
                    self._readers.hurry(load)
                self.counts.needed += int(self._fresh[slot])
                self.counts.hits += int(load is None and not self._fresh[slot])
                self._fresh[slot] = False
            self._missing.reverse()
            self._fill()

    def next(self) -> list[int]:
        with self._guard:
            self._give_back()
            while True:
                if self._failed is not None:
                    name, error = self._names[self._failed.key], self._failed.error
                    self._end()
                    raise EngineError(f"an expert can't be read from disk: {name}: {getattr(error, 'strerror', error)}")
                ready = [key for key in self._wanted if self._slot_of[key] >= 0 and key not in self._loads]
                if ready:
                    break
                assert self._missing or self._loads, "nothing is left to wait for"
                self._changed.wait()
            self._wanted.difference_update(ready)
            self._given = ready
            return [key % self.count for key in ready]

    def end(self) -> None:
        with self._guard:
            self._end()

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        with self._guard:
            for e in sorted(set(experts)):
                key = layer * self.count + e
                slot = int(self._slot_of[key])
                if slot < 0:
                    slot = self._take_slot(spare_ahead=True)
                    if slot < 0:
                        return
                    self._load(key, slot, urgent=False)
                    self._fresh[slot] = True
                    self.counts.expected += 1
                self._ahead[slot] = True

    # Where an expert is.

    def places(self, layer: int, expert: int) -> Places:
        key = layer * self.count + expert
        base = self._bytes.data_ptr() + int(self._slot_of[key]) * self.slot_bytes
        w1, s1, w3, s3, w2, s2 = (base + place for place in self._extents[key].places)
        return w1, s1, w3, s3, w2, s2

    def weights(self, layer: int, expert: int) -> dict[str, tuple[Tensor, Tensor]]:
        key = layer * self.count + expert
        base = int(self._slot_of[key]) * self.slot_bytes
        tensors = []
        for place, (dtype, shape, nbytes) in zip(self._extents[key].places, self._shapes, strict=True):
            tensors.append(self._bytes[base + place : base + place + nbytes].view(dtype).view(shape))
        return {leaf: (tensors[2 * i], tensors[2 * i + 1]) for i, leaf in enumerate(LEAVES)}

    def identity(self) -> str:
        """Of the files, by name, size and time: reading the weights would take long."""
        told = blake2b(digest_size=16)
        for file in self._files:
            status = file.stat()
            told.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        return told.hexdigest()

    def close(self) -> None:
        """Keep the counts, if a file was given for them."""
        if self._usage is not None:
            layers = self._uses.reshape(-1, self.count) / max(self._uses.max(), 1e-300)
            new = self._usage.with_name(self._usage.name + ".new")
            try:
                new.write_text(json.dumps({"uses": [[round(u, 6) for u in row] for row in layers.tolist()]}) + "\n")
                os.replace(new, self._usage)
            except OSError as error:
                logger.warning("experts' uses aren't kept: %s", error)

    # All below runs under the guard.

    def _step(self) -> None:
        self._weight *= 2 ** (1 / HALF_LIFE)
        if self._weight > _LARGEST:
            self._uses /= self._weight
            self._weight = 1.0

    def _fill(self) -> None:
        """Have missing experts read, as far as there are slots."""
        while self._missing:
            slot = self._take_slot(spare_ahead=False)
            if slot < 0:
                return
            self._load(self._missing.pop(), slot, urgent=True)

    def _take_slot(self, spare_ahead: bool) -> int:
        """An empty slot, or that of the expert that was used least; -1 where none can be had."""
        value = np.where(self._key_of < 0, -1.0, self._uses[self._key_of])
        value[self._busy] = np.inf
        if spare_ahead:
            value[self._ahead] = np.inf
        elif self._ahead.any():
            value[self._ahead] += 1e280
        slot = int(value.argmin())
        if np.isinf(value[slot]):
            return -1
        if self._key_of[slot] >= 0:
            self._slot_of[self._key_of[slot]] = -1
        self._ahead[slot] = self._fresh[slot] = False
        return slot

    def _load(self, key: int, slot: int, urgent: bool) -> None:
        self._key_of[slot], self._slot_of[key], self._busy[slot] = key, slot, True
        self._loads[key] = self._readers.submit(key, self._extents[key], slot * self.slot_bytes, urgent)

    def _forget(self, layer: int) -> None:
        """What was expected of this layer: it now says itself what it needs."""
        of_layer = self._key_of // self.count == layer
        for key in self._key_of[of_layer & self._busy].tolist():
            load = self._loads.get(key)
            if load is not None and key not in self._wanted and self._readers.drop(load):
                self._clear(key)
        self._ahead[of_layer] = False

    def _clear(self, key: int) -> None:
        slot = self._slot_of[key]
        del self._loads[key]
        self._slot_of[key] = self._key_of[slot] = -1
        self._busy[slot] = self._ahead[slot] = self._fresh[slot] = False

    def _finished(self, load: Load) -> None:
        self.counts.read_bytes = self._readers.read_bytes
        if load.error is not None:
            self._clear(load.key)
            if load.key in self._wanted:
                self._failed = load
        else:
            del self._loads[load.key]
            self._busy[self._slot_of[load.key]] = load.key in self._wanted
        self._fill()
        self._changed.notify_all()

    def _give_back(self) -> None:
        for key in self._given:
            self._busy[self._slot_of[key]] = False
        self._given = []
        self._fill()

    def _end(self) -> None:
        self._missing = []
        self._given += [key for key in self._wanted if self._slot_of[key] >= 0 and key not in self._loads]
        self._wanted, self._failed = set(), None
        self._give_back()

    def _read_usage(self, file: Path) -> None:
        """The counts of an earlier run; as many of the most used experts as fit are read at once."""
        try:
            uses = np.array(json.loads(file.read_text(encoding="utf-8"))["uses"], float)
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{file}: isn't a record of experts' uses", "remove it, it is made anew") from None
        if uses.shape != (len(self._extents) // self.count, self.count) or not np.isfinite(uses).all():
            raise CheckpointError(f"{file}: is the record of another model, {list(uses.shape)}", "name another file")
        with self._guard:
            self._uses = uses.flatten() * HALF_LIFE
            for key in np.argsort(-self._uses, kind="stable")[: self.slots].tolist():
                if self._uses[key] > 0:
                    self._load(key, self._take_slot(spare_ahead=True), urgent=False)


def _shapes(weight: Weight) -> list[tuple[torch.dtype, tuple[int, ...], int]]:
    tensor, scale = weight
    assert scale is not None
    kind = torch.float8_e4m3fn if tensor.dtype == "F8_E4M3" else torch.uint8
    return [(kind, tensor.shape, tensor.nbytes), (torch.uint8, scale.shape, scale.nbytes)]
