"""A sequence's cache as bytes: taken out of its slot and blocks, put back into others, or copied between slots.

At position p (tokens computed) a sequence needs its complete entries, which lie in blocks, and its state: the window's
last W - 1 latents and, in each compressor's tail, the open window's tokens (CSA: and those of the window before).
At a multiple of 256 no window is open, so HCA's tails are empty there. Nothing else of the rings is ever read again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upwell.config import BLOCK_TOKENS
from upwell.model.cache import KVCache, LayerCache

Place = tuple[Tensor, Tensor | slice]  # a tensor and which of its rows


def take_block(cache: KVCache, block: int, tokens: int = BLOCK_TOKENS) -> Tensor:
    """The entries that `tokens` tokens of a block completed, of all layers: [bytes] uint8 in host memory."""
    return _take(_in_block(cache, block, tokens))


def put_block(cache: KVCache, block: int, data: Tensor, tokens: int = BLOCK_TOKENS) -> None:
    """Fill a block with what `take_block` took at as many tokens. Raises ValueError if it isn't that long."""
    cache.told("put_block", {"block": block, "tokens": tokens}, data)
    _put(_in_block(cache, block, tokens), data)


def take_state(cache: KVCache, slot: int, position: int) -> Tensor:
    """What a slot holds of a sequence of `position` tokens: [bytes] uint8 in host memory."""
    return _take(_in_slot(cache, slot, position))


def put_state(cache: KVCache, slot: int, position: int, data: Tensor) -> None:
    """Fill a slot with what `take_state` took at the same position. Raises ValueError if it isn't that long."""
    cache.told("put_state", {"slot": slot, "position": position}, data)
    _put(_in_slot(cache, slot, position), data)


def copy_slot(cache: KVCache, source: int, target: int) -> None:
    """Copy a sequence's state from slot to slot, on the device."""
    cache.told("copy_slot", {"source": source, "target": target})
    for layer in (*cache.layers, *cache.mtp):
        layer.window[target] = layer.window[source]
        for tail in (layer.tail, layer.index_tail):
            if tail is not None:
                tail.kv[target], tail.gate[target] = tail.kv[source], tail.gate[source]


def copy_block(cache: KVCache, source: int, target: int) -> None:
    """Copy a block's entries to another block, on the device."""
    cache.told("copy_block", {"source": source, "target": target})
    for layer in cache.layers:
        for pool in (layer.entries, layer.index_keys):
            if pool is not None:
                pool[target] = pool[source]


def _in_block(cache: KVCache, block: int, tokens: int) -> list[Place]:
    places: list[Place] = []
    for layer in cache.layers:
        for pool in (layer.entries, layer.index_keys):
            if pool is not None:
                places.append((pool[block], slice(0, tokens * pool.shape[1] // BLOCK_TOKENS)))
    return places


def _in_slot(cache: KVCache, slot: int, position: int) -> list[Place]:
    places: list[Place] = []
    for layer in (*cache.layers, *cache.mtp):
        width = layer.window.shape[1]
        places.append((layer.window[slot], _ring(max(0, position - width + 1), position, width, layer)))
        for tail in (layer.tail, layer.index_tail):
            if tail is not None and layer.entries is not None:
                ratio = BLOCK_TOKENS // layer.entries.shape[1]
                before = tail.ring - ratio  # of the window before the open one: all of it in CSA, nothing in HCA
                rows = _ring(max(0, position // ratio * ratio - before), position, tail.ring, layer)
                places += [(tail.kv[slot], rows), (tail.gate[slot], rows)]
    return places


def _ring(start: int, stop: int, size: int, layer: LayerCache) -> Tensor:
    return torch.arange(start, stop, device=layer.window.device) % size


def _take(places: list[Place]) -> Tensor:
    parts = [tensor[rows].reshape(-1).view(torch.uint8) for tensor, rows in places]
    return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.uint8)


def _put(places: list[Place], data: Tensor) -> None:
    rows_of = [len(range(*rows.indices(len(t)))) if isinstance(rows, slice) else len(rows) for t, rows in places]
    sizes = [n * t[0].numel() * t.element_size() for n, (t, _) in zip(rows_of, places, strict=True)]
    if sum(sizes) != len(data):
        raise ValueError(f"{len(data)} bytes where {sum(sizes)} belong")
    for n, (tensor, rows), part in zip(rows_of, places, data.split(sizes), strict=True):
        # A part may begin at any byte: a copy of its own is aligned.
        tensor[rows] = part.clone().view(tensor.dtype).view(n, *tensor.shape[1:]).to(tensor.device)
