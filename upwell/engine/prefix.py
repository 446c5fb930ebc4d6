"""The prefix cache: what prompts left in the KV cache, kept in host memory (and on disk) by the hash of their tokens.

Three kinds of entry, each under the hash of all tokens up to its end: a block (the compressed entries of 256 tokens),
the state at a cut (window and compressors' tails; restarts happen there), and a whole prompt (its last partial block,
state and final streams: the same prompt again computes nothing). Prefill stops at the cuts, 256 and every 512, with
and without a hit, so that a hit changes nothing in what is computed after it.

V4's cache is small (entries are 1/4 and 1/128 of the tokens), so entries are copies: the block pool is for running
sequences alone, and a preempted or ended one leaves nothing behind in it.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.engine.prefix_disk import PrefixDisk
from upwell.model import KVCache
from upwell.model.snapshot import put_block, put_state, take_block, take_state

CUT_TOKENS = 2 * BLOCK_TOKENS  # as many as the kernels take at once
PREFIX_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class PrefixKeys:
    """Hashes of a token list's prefixes: blocks[k] of the first 256 * (k + 1) tokens, `whole` of all `length`."""

    length: int
    blocks: tuple[str, ...]
    whole: str

    @staticmethod
    def of(tokens: list[int]) -> PrefixKeys:
        chain, blocks = hashlib.blake2b(digest_size=32), []
        for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
            chain.update(array("I", tokens[end - BLOCK_TOKENS : end]).tobytes())
            blocks.append(chain.hexdigest())
        chain.update(array("I", tokens[len(blocks) * BLOCK_TOKENS :]).tobytes())
        return PrefixKeys(len(tokens), tuple(blocks), chain.hexdigest())

    def shared(self, other: PrefixKeys) -> int:
        """The last cut up to which the other has the same tokens, short of this one's last token."""
        a, b = self.blocks, other.blocks
        same = bisect_left(range(min(len(a), len(b))), True, key=lambda k: a[k] != b[k])
        return last_cut(min(same * BLOCK_TOKENS, self.length - 1))


def next_cut(position: int) -> int:
    """The cut after a position."""
    return BLOCK_TOKENS if position < BLOCK_TOKENS else (position // CUT_TOKENS + 1) * CUT_TOKENS


def last_cut(position: int) -> int:
    """The last cut at or before a position; 0 is one."""
    return BLOCK_TOKENS if BLOCK_TOKENS <= position < CUT_TOKENS else position // CUT_TOKENS * CUT_TOKENS


class PrefixCache:
    """Least recently used entries go first once they are more than `capacity` bytes. Used by the engine's thread."""

    def __init__(self, cache: KVCache, capacity: int, disk: PrefixDisk | None = None) -> None:
        self._cache, self._capacity, self._disk = cache, capacity, disk
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self.nbytes = 0

    def match(self, keys: PrefixKeys) -> int:
        """How many of the tokens need not be computed: all of them, or up to a cut."""
        blocks = bisect_left(range(len(keys.blocks)), True, key=lambda k: not self._has(_block(keys, k)))
        if blocks == len(keys.blocks) and self._has(_whole(keys)):
            return keys.length
        cut = last_cut(min(blocks * BLOCK_TOKENS, keys.length - 1))
        while cut and not self._has(_state(keys, cut)):
            cut = last_cut(cut - 1)
        return cut

    def restore(self, keys: PrefixKeys, slot: int, table: Items[int]) -> tuple[int, Tensor | None]:
        """Fill a sequence's slot and blocks. Returns the tokens restored, and the streams [1, h, D] after the last of
        them if that is all. An entry that turns out missing or damaged is dropped, and a shorter prefix restored."""
        while position := self.match(keys):
            full, rest = divmod(position, BLOCK_TOKENS)
            whole = position == keys.length
            name = _whole(keys) if whole else _state(keys, position)
            end = self._get(name)
            blocks = [self._get(_block(keys, k)) for k in reversed(range(full))][::-1]  # the deepest go first
            if end is None or any(block is None for block in blocks):
                continue  # it was damaged or is gone, and match() knows by now
            for k, block in enumerate(blocks):
                assert block is not None
                put_block(self._cache, table[k], block)
            if not whole:
                put_state(self._cache, slot, position, end)
                return position, None
            sizes = end[:16].view(torch.int64).tolist()
            part, state, streams = end[16:].split([*sizes, len(end) - 16 - sum(sizes)])
            if rest:
                put_block(self._cache, table[full], part, rest)
            put_state(self._cache, slot, position, state)
            return position, streams.clone().view(torch.float32).view(1, self._cache.config.hc_mult, -1)
        return 0, None

    def save_cut(self, keys: PrefixKeys, position: int, slot: int, table: Items[int]) -> None:
        """Keep a sequence that has just been computed up to a cut."""
        self._save_blocks(keys, position, table)
        name = _state(keys, position)
        if not self._has(name):
            self._put(name, take_state(self._cache, slot, position))

    def save_whole(self, keys: PrefixKeys, slot: int, table: Items[int], streams: Tensor) -> None:
        """Keep a prompt that has just been computed; streams [h, D] are those after its last token."""
        self._save_blocks(keys, keys.length, table)
        name = _whole(keys)
        if self._has(name):
            return
        full, rest = divmod(keys.length, BLOCK_TOKENS)
        block = take_block(self._cache, table[full], rest) if rest else torch.empty(0, dtype=torch.uint8)
        state = take_state(self._cache, slot, keys.length)
        sizes = torch.tensor([len(block), len(state)]).view(torch.uint8)
        end = streams.float().contiguous().cpu().view(-1).view(torch.uint8)
        self._put(name, torch.cat((sizes, block, state, end)))

    def clear(self) -> None:
        """Forget all that is in memory, as after a change of the weights. What is on disk has other weights' names."""
        self._entries.clear()
        self.nbytes = 0

    def close(self) -> None:
        """Wait until all is on disk."""
        if self._disk is not None:
            self._disk.close()

    def _save_blocks(self, keys: PrefixKeys, position: int, table: Items[int]) -> None:
        for k in range(position // BLOCK_TOKENS):
            if not self._has(_block(keys, k)):
                self._put(_block(keys, k), take_block(self._cache, table[k]))

    def _has(self, name: str) -> bool:
        return name in self._entries or (self._disk is not None and name in self._disk)

    def _get(self, name: str) -> Tensor | None:
        if name in self._entries:
            self._entries.move_to_end(name)
            return self._entries[name]
        data = None if self._disk is None else self._disk.read(name)
        if data is not None:
            self._keep(name, data)
        return data

    def _put(self, name: str, data: Tensor) -> None:
        self._keep(name, data)
        if self._disk is not None:
            self._disk.write(name, data)

    def _keep(self, name: str, data: Tensor) -> None:
        if data.nbytes > self._capacity:
            return  # it would push out everything else first
        self._entries[name] = data
        self.nbytes += data.nbytes
        while self.nbytes > self._capacity:
            _, dropped = self._entries.popitem(last=False)
            self.nbytes -= dropped.nbytes


def _block(keys: PrefixKeys, k: int) -> str:
    return f"block-{keys.blocks[k]}"


def _state(keys: PrefixKeys, cut: int) -> str:
    return f"state-{keys.blocks[cut // BLOCK_TOKENS - 1]}"


def _whole(keys: PrefixKeys) -> str:
    return f"whole-{keys.whole}"
