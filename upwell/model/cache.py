"""What a sequence leaves behind in each layer, and where it lies.

Compressed entries and indexer keys grow with the sequence: they live in pools of blocks, 256 tokens each, found
through a block table. The window's latents and the compressor's open windows are of fixed size: they live in one
slot a sequence, as rings by position. Order inside a ring doesn't matter to attention, so nothing is ever shifted.

Drafted tokens that are rejected leave two kinds of traces. Entries they completed are written again before anyone sees
them. In the rings they took the places of old tokens that are still needed: those are saved before and put back.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS, ModelConfig
from upwell.ops import native
from upwell.ops.memory import untouched


class Tail:
    """The compressor's recent tokens: kv and gate [slots, ring, coff*d] FP32, by position modulo the ring.

    The ring holds the open window, and for CSA also the window before, whose a half the next entry needs.
    """

    def __init__(self, slots: int, ring: int, width: int, device: torch.device) -> None:
        self.kv = torch.zeros(slots, ring, width, dtype=torch.float32, device=device)
        self.gate = torch.zeros(slots, ring, width, dtype=torch.float32, device=device)

    @property
    def ring(self) -> int:
        return self.kv.shape[1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return untouched(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def row_width(dim: int, dtype: torch.dtype) -> int:
    """Elements that a row of `dim` takes in a cache. In INT8 it is the CPU kernels' (csrc/attention_bytes.h): its step
    in FP32 and the sum of its integers in 32 bits, then these, padded to 16."""
    return dim if dtype != torch.int8 else 8 + (dim + 15) // 16 * 16


class LayerCache:
    """One layer's cache: window [slots, W, d]; where compressed, entries [blocks, 256/ratio, d] and a tail; in CSA
    also index_keys [blocks, 64, c] with a tail of their own. In INT8 d and c are `row_width`s."""

    def __init__(
        self, config: ModelConfig, ratio: int, blocks: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = row_width(config.head_dim, dtype)
        self.window = torch.zeros(slots, config.sliding_window, width, dtype=dtype, device=device)
        self.entries: Tensor | None = None
        self.index_keys: Tensor | None = None
        self.tail: Tail | None = None
        self.index_tail: Tail | None = None
        if ratio:
            per_block = BLOCK_TOKENS // ratio
            overlap = 2 if ratio == config.csa_ratio else 1
            self.entries = _zeros((blocks, per_block, width), dtype, device)
            self.tail = Tail(slots, overlap * ratio, overlap * config.head_dim, device)
            if ratio == config.csa_ratio:
                c = config.index_head_dim
                self.index_keys = _zeros((blocks, per_block, row_width(c, dtype)), dtype, device)
                self.index_tail = Tail(slots, 2 * ratio, 2 * c, device)

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer holds, for counting bytes."""
        tails = [t for t in (self.tail, self.index_tail) if t is not None]
        own = [self.window, self.entries, self.index_keys]
        return [t for t in own if t is not None] + [t for tail in tails for t in (tail.kv, tail.gate)]


class KVCache:
    """The caches of all layers and of the MTP blocks (sliding ones), for `slots` sequences and `blocks` blocks."""

    def __init__(
        self, config: ModelConfig, blocks: int, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        where = torch.device(device)
        self.config, self.blocks, self.slots, self.dtype, self.device = config, blocks, slots, dtype, where
        self.layers = [LayerCache(config, r, blocks, slots, dtype, where) for r in config.compress_ratios]
        self.mtp = [LayerCache(config, 0, 0, slots, dtype, where) for _ in range(config.num_nextn_predict_layers)]
        self._rings = self._stack_rings()
        # Indexing takes five times as long as the kernels' copy, which is a twentieth of a small model's step.
        self._native: Any = None
        if where.type == "cpu" and native.library() is not None:
            rings = [native.Ring(r.data_ptr(), *r.shape[:3], r.shape[3] * r.dtype.itemsize) for r in self._rings]
            self._native = (native.Ring * len(rings))(*rings)
        self._row_bytes = sum(ring.layers * ring.bytes for ring in self._native or ())  # of a token in all rings
        self._kept = array("b")  # what the kernels saved last: memory that is new each time takes longer than they do
        # What changes the cache outside a forward is told before it is done, so that other ranks do it too.
        self.tell: Callable[[str, dict[str, Any], tuple[Tensor, ...]], None] | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in (*self.layers, *self.mtp) for t in layer.tensors())

    def save(self, slots: list[int], positions: list[int]) -> SavedRings:
        """What the rings hold where tokens at these positions of these slots (pairs) will go, until the next is saved.
        As many positions of a slot as its shortest ring has places (2 * csa_ratio), at most."""
        self.told("save", {"slots": slots, "positions": positions})
        if self._native is not None:
            pairs = array("q", slots), array("q", positions)
            nbytes = len(slots) * self._row_bytes
            if len(self._kept) < nbytes:
                self._kept = array("b", bytes(nbytes))
            native.copy_rings(self._native, *pairs, None, self._kept)
            return SavedRings(*pairs, self._kept)
        at = torch.tensor(slots, device=self.device), torch.tensor(positions, device=self.device)
        return SavedRings(*at, [ring[:, at[0], at[1] % ring.shape[2]] for ring in self._rings])

    def restore(self, saved: SavedRings, which: list[int]) -> None:
        """Put back the saved pairs numbered `which`."""
        if not which:
            return
        self.told("restore", {"which": which})
        if self._native is not None:
            native.copy_rings(self._native, saved.slots, saved.positions, array("q", which), saved.rows)
            return
        slots, positions = saved.slots[which], saved.positions[which]
        for ring, rows in zip(self._rings, saved.rows, strict=True):
            ring[:, slots, positions % ring.shape[2]] = rows[:, which]

    def told(self, name: str, values: dict[str, Any], *tensors: Tensor) -> None:
        if self.tell is not None:
            self.tell(name, values, tensors)

    def _stack_rings(self) -> list[Tensor]:
        """Lay rings of one shape behind each other, [n, slots, ring, width], so that one call saves them all."""
        owners: dict[tuple[torch.Size, torch.dtype], list[tuple[LayerCache | Tail, str]]] = {}
        for layer in (*self.layers, *self.mtp):
            rings: list[tuple[LayerCache | Tail, str]] = [(layer, "window")]
            rings += [(tail, name) for tail in (layer.tail, layer.index_tail) if tail for name in ("kv", "gate")]
            for owner, name in rings:
                ring = getattr(owner, name)
                owners.setdefault((ring.shape, ring.dtype), []).append((owner, name))
        stacks: list[Tensor] = []
        for (shape, dtype), rings in owners.items():
            stack = _zeros((len(rings), *shape), dtype, self.layers[0].window.device)
            for part, (owner, name) in zip(stack, rings, strict=True):
                setattr(owner, name, part)
            stacks.append(stack)
        return stacks


@dataclass(slots=True)
class SavedRings:
    """Rows of all rings at N pairs of slot and position: rows of each stack [n, N, width]."""

    slots: Any  # [N], as positions: tensors, or arrays where the kernels copy
    positions: Any
    rows: Any  # a list of them, or an array of bytes


class DecodeInputs:
    """What one decode step is told, as tensors on the device: slots [B], positions [B], tables [B, blocks], all INT64.

    Their shapes alone decide the shapes of the step, so it can be captured as a graph and replayed on new numbers.
    `longest` (eager steps only) cuts the tables to the entries that the longest sequence has.
    """

    def __init__(self, slots: Tensor, positions: Tensor, tables: Tensor, longest: int | None = None) -> None:
        self.slots, self.positions, self.tables, self.longest = slots, positions, tables, longest
        self._rows: dict[int, Tensor] = {}

    def visible(self, ratio: int) -> Tensor:
        """How many entries each query sees, the one that this step completes included: [B]."""
        return (self.positions + 1) // ratio

    def rows(self, ratio: int) -> Tensor:
        """Pool rows of the sequences' entries in order, [B, N]; those from `visible` on mean nothing."""
        if ratio not in self._rows:
            per_block = BLOCK_TOKENS // ratio
            inside = torch.arange(per_block, device=self.tables.device)
            rows = (self.tables.unsqueeze(-1) * per_block + inside).flatten(1)
            self._rows[ratio] = rows if self.longest is None else rows[:, : self.longest // ratio]
        return self._rows[ratio]

    def open_row(self, ratio: int) -> Tensor:
        """Pool row of the entry that each token belongs to, [B]. It is nobody's but the sequence's own."""
        per_block = BLOCK_TOKENS // ratio
        blocks = self.tables.gather(1, (self.positions // BLOCK_TOKENS).unsqueeze(1)).squeeze(1)
        return blocks * per_block + self.positions // ratio % per_block


@dataclass(slots=True)  # frozen ones take several times as long to make
class Step:
    """Which cached sequences one forward extends: input_ids [B, S] hold lengths[b] new tokens each, padded right, or
    [1, T] hold all sequences' tokens one after another (ragged).

    starts[b] tokens are in the cache already; slots[b] is the sequence's slot, tables[b] its block table (long
    enough for the new tokens too). All host values, so that no step waits for the device. A decode step can instead
    be given its numbers as tensors (`on_device`), the lists then being of the right length only.
    """

    slots: list[int]
    starts: list[int]
    lengths: list[int]
    tables: list[list[int]]
    device: torch.device | str = "cpu"
    on_device: DecodeInputs | None = None
    _rows: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)
    _inputs: list[DecodeInputs] = field(default_factory=list, repr=False)

    def is_ragged(self, input_ids: Tensor) -> bool:
        return input_ids.shape[0] != len(self.lengths)

    def last_rows(self, input_ids: Tensor) -> Tensor:
        """Of the flattened input_ids, the row of each sequence's last new token: [B]."""
        width = 0 if self.is_ragged(input_ids) else input_ids.shape[1]
        ends = [b * width + n for b, n in enumerate(self.lengths)] if width else list(accumulate(self.lengths))
        return torch.tensor(ends, device=input_ids.device) - 1

    @property
    def is_decode(self) -> bool:
        """Every sequence brings exactly one token."""
        return all(n == 1 for n in self.lengths)

    @property
    def decode(self) -> DecodeInputs:
        """A decode step's numbers on the device, sent there once a step."""
        if self.on_device is not None:
            return self.on_device
        if not self._inputs:
            width = max(len(table) for table in self.tables)
            tables = torch.tensor([table + [0] * (width - len(table)) for table in self.tables], dtype=torch.long)
            host = (torch.tensor(self.slots), torch.tensor(self.starts), tables)
            slots, starts, tables = (t.to(self.device, non_blocking=True) for t in host)
            self._inputs.append(DecodeInputs(slots, starts, tables, longest=max(self.starts) + 1))
        return self._inputs[0]

    def may_complete(self, ratio: int) -> bool:
        """Some sequence of this decode step completes an entry; a captured step has to assume it."""
        return self.on_device is not None or any((start + 1) % ratio == 0 for start in self.starts)

    def positions(self, steps: int) -> Tensor:
        """[B, steps] positions of the input tokens (padding counts on)."""
        if self.is_decode and steps == 1:
            return self.decode.positions.unsqueeze(1)
        starts = torch.tensor(self.starts, device=self.device)
        return starts[:, None] + torch.arange(steps, device=self.device)

    def entry_rows(self, ratio: int) -> list[Tensor]:
        """For each sequence the pool rows of its entries, those that this step completes included: B x [N_b]."""
        if ratio not in self._rows:
            per_block = BLOCK_TOKENS // ratio
            rows = []
            for table, start, length in zip(self.tables, self.starts, self.lengths, strict=True):
                entry = torch.arange((start + length) // ratio)
                blocks = torch.tensor(table, dtype=torch.long)
                rows.append((blocks[entry // per_block] * per_block + entry % per_block).to(self.device))
            self._rows[ratio] = rows
        return self._rows[ratio]
