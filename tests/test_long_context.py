"""64k tokens through nano's geometry in chunks: memory follows the chunk and the cache, and an entry deep in the cache
is what the tokens there make of themselves."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_v4 import PlainV4

from upwell.config import BLOCK_TOKENS, ModelConfig
from upwell.engine.engine import PREFILL_CHUNK
from upwell.model import KVCache, Step, Transformer
from upwell.model.init import init_weights
from upwell.nano.geometry import NANO

LONG, SHORT = 65536, 16384
NEEDLE = 41_237


def peak_bytes() -> int:
    """Most of this process's memory that was resident since `forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def forget_peak() -> int:
    """What is resident now, from which the peak is measured anew; freed memory is given back first."""
    ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


@torch.inference_mode()
def prefill(model: Transformer, ids: torch.Tensor) -> tuple[KVCache, list[int], int]:
    """A cache with all of ids, its block table, and the bytes that were needed for it at most."""
    blocks = -(-len(ids) // BLOCK_TOKENS)
    table = list(reversed(range(blocks)))
    before = forget_peak()
    cache = model.new_cache(blocks, 1)
    for start in range(0, len(ids), PREFILL_CHUNK):
        part = ids[start : start + PREFILL_CHUNK]
        model.streams(part[None], cache, Step([0], [start], [len(part)], [table]))
    return cache, table, peak_bytes() - before


def test_memory_of_a_long_prompt_is_its_chunk_and_its_cache() -> None:
    """In a process of its own: what other tests freed would be taken first, and not be seen."""
    done = subprocess.run([sys.executable, __file__, "prompt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_long_prompt() -> None:
    model = init_weights(Transformer(NANO).eval(), seed=0, std=0.06)
    ids = torch.randint(2, NANO.vocab_size, (LONG,), generator=torch.Generator().manual_seed(0))
    prefill(model, ids[:1024])  # what is made once: packed weights, threads
    short_cache, _, short = prefill(model, ids[:SHORT])
    short_bytes = short_cache.nbytes
    del short_cache
    cache, table, long = prefill(model, ids)
    # Beside the cache, a sequence four times as long costs only scores and pointers of its entries, a thread: 16 rows
    # of FP32 scores, 16 lanes of probabilities, a pointer, for 12,288 more; old and new workspace are there at once.
    assert long - cache.nbytes <= short - short_bytes + (16 << 20)
    assert long - cache.nbytes < 64 << 20
    check_needle(model, ids, cache, table)


def check_needle(model: Transformer, ids: torch.Tensor, cache: KVCache, table: list[int]) -> None:
    """The first CSA layer's entry over a token depends on the tokens of two windows, and through the sliding layer
    below on those in its window before: a plain float64 V4 makes it from these alone, at other positions."""
    config = model.config
    ratio, dim = config.csa_ratio, config.head_dim
    entry = NEEDLE // ratio
    first = (entry - 1) * ratio - config.sliding_window + 1
    tokens = ids[first : (entry + 1) * ratio].tolist()
    plain = PlainV4(model)
    streams = [np.tile(plain.w["embed.weight"][t], (config.hc_mult, 1)) for t in tokens]
    streams = plain.block("layers.0", streams, tokens, 0)[-2 * ratio :]
    xs = [plain.rms(plain.connect("layers.1.hc_attn", x)[0], "layers.1.attn_norm") for x in streams]
    for name, pool, width in (("compressor", cache.layers[1].entries, dim),
                              ("indexer.compressor", cache.layers[1].index_keys, config.index_head_dim)):  # fmt: skip
        alone = plain.entries(f"layers.1.attn.{name}", xs, ratio, width, width != dim)[1]
        want = plain.rotate(alone, (entry - 1) * ratio, True)  # there it is entry 1, at position 4
        assert pool is not None
        per_block = BLOCK_TOKENS // ratio
        got = pool[table[entry // per_block], entry % per_block].double().numpy()
        off, size = np.abs(got - want), np.abs(want).max()
        assert off[: width - config.qk_rope_head_dim].max(initial=0) < 1e-4 * size
        assert off.max() < NEEDLE * 2**-23 * size  # an angle in FP32 is that exact, of a position so far out
        neighbour = pool[table[(entry + 1) // per_block], (entry + 1) % per_block].double().numpy()
        assert np.abs(neighbour - want).max() > 0.1 * np.abs(want).max()


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_a_million_tokens_take_memory_as_they_are_written(name: str) -> None:
    """ARCHITECTURE.md, 10: in BF16 6,885 bytes a token for Flash, 9,856 for Pro, beside windows and tails. Reckoned
    for a cache of one sequence of max_position_embeddings, which is allocated but not touched."""
    config = ModelConfig.preset(name)
    assert config.max_position_embeddings == 1_048_576
    each = {"v4-flash": 21 * 320 + 20 * 8, "v4-pro": 30 * 320 + 31 * 8}[name]
    # In a process of its own: where memory was freed before, zeros are written into it.
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    entries, beside, spent = map(int, done.stdout.split())
    assert entries == each * config.max_position_embeddings
    assert beside < 96 << 20
    assert spent < 256 << 20  # of 7 and 10 GB


def print_memory_of_a_full_cache(name: str) -> None:
    """Bytes of the entries, of the rest, and what became resident."""
    config = ModelConfig.preset(name)
    before = forget_peak()
    cache = KVCache(config, config.max_position_embeddings // BLOCK_TOKENS, 1, torch.bfloat16)
    entries = sum(t.nbytes for layer in cache.layers for t in (layer.entries, layer.index_keys) if t is not None)
    print(entries, cache.nbytes - entries, peak_bytes() - before)


if __name__ == "__main__":
    if sys.argv[1] == "prompt":
        check_long_prompt()
    else:
        print_memory_of_a_full_cache(sys.argv[1])
