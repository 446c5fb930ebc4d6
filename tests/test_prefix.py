"""The prefix cache: what is restored is exact, damage is noticed, bounds hold, and outputs stay what they were."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_v4
import torch
from models import path
from tiny_v4 import VOCAB, build_model

from upwell import LLM, SamplingParams
from upwell.engine.blocks import blocks_for
from upwell.engine.fingerprint import fingerprint
from upwell.engine.prefix import PrefixCache, PrefixKeys, last_cut, next_cut
from upwell.engine.prefix_disk import PrefixDisk
from upwell.errors import InputError
from upwell.model import KVCache, Step, Transformer
from upwell.model.snapshot import copy_block, copy_slot, put_block, put_state, take_block, take_state
from upwell.ops import native

PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def build_llm(**options: Any) -> LLM:
    """Without drafts: how many tokens share a forward, and so the last bits, would depend on measured times."""
    return tiny_v4.build_llm(speculative_tokens=0, **options)


def answer(llm: LLM, prompt: list[int], params: SamplingParams = PARAMS) -> list[Any]:
    """Tokens and log-probabilities of every completion: equal only where the logits are equal to the last bit."""
    output = llm.generate({"prompt_token_ids": prompt}, params)[0]
    return [(o.token_ids, [(e.logprob, e.top) for e in o.logprobs or []]) for o in output.outputs]


def hits(llm: LLM) -> int:
    return llm.engine.stats().prefix_hit_tokens


def noisy_cache(model: Transformer) -> KVCache:
    cache = model.new_cache(8, 3)
    for layer in (*cache.layers, *cache.mtp):
        for tensor in layer.tensors():
            generator = torch.Generator().manual_seed(1)
            if tensor.is_floating_point():
                tensor.normal_(0, 30, generator=generator)
            else:
                tensor.random_(-128, 128, generator=generator)
    return cache


@torch.inference_mode()
def feed(
    model: Transformer, cache: KVCache, slot: int, table: list[int], tokens: list[int], start: int
) -> torch.Tensor:
    step = Step([slot], [start], [len(tokens)], [table])
    return model.logits(model.streams(torch.tensor([tokens]), cache, step))


@pytest.mark.parametrize("kind", ["kernels", "modules", "bfloat16", "int8"])
def test_a_restored_or_copied_sequence_goes_on_bit_for_bit(kind: str) -> None:
    """Into a cache full of noise, another slot and other blocks: whatever isn't restored would show."""
    model = build_model()
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    if kind == "int8" and native.library() is None:
        pytest.skip("such a cache is the kernels'; none are built here")
    model.cache_in(torch.int8 if kind == "int8" else None)
    tokens = ids(540)
    with path("kernels" if kind in ("kernels", "int8") else "modules"):
        for position in (1, 6, 127, 129, 255, 256, 300, 512):
            cache, table = noisy_cache(model), [5, 2, 7]
            feed(model, cache, 2, table, tokens[:position], 0)
            full, rest = divmod(position, 256)
            blocks = [take_block(cache, table[k]) for k in range(full)]
            part, state = take_block(cache, table[full], rest), take_state(cache, 2, position)
            copy_slot(cache, 2, 0)
            if rest:
                copy_block(cache, table[full], 6)
            other = noisy_cache(model)
            for k, data in enumerate(blocks):
                put_block(other, [1, 4, 3][k], data)
            put_block(other, [1, 4, 3][full], part, rest)
            put_state(other, 1, position, state)
            follow = table[:full] + [6, 3][: 3 - full] + [1]
            for more in (7, 1, 20):
                following = tokens[position : position + more]
                expected = feed(model, cache, 2, table, following, position)
                assert torch.equal(feed(model, other, 1, [1, 4, 3], following, position), expected), position
                assert torch.equal(feed(model, cache, 0, follow, following, position), expected), position
                position += more


def test_bytes_of_another_length_are_refused() -> None:
    cache = KVCache(build_model().config, 2, 1, torch.float32)
    with pytest.raises(ValueError, match="bytes where"):
        put_state(cache, 0, 9, take_state(cache, 0, 10))


def test_cuts() -> None:
    assert [next_cut(p) for p in (0, 255, 256, 511, 512, 800, 1024)] == [256, 256, 512, 512, 1024, 1024, 1536]
    assert [last_cut(p) for p in (0, 255, 256, 511, 512, 800, 1024)] == [0, 0, 256, 256, 512, 512, 1024]


def test_keys_are_those_of_prefixes() -> None:
    tokens = ids(1300)
    keys, other = PrefixKeys.of(tokens), PrefixKeys.of([*tokens[:1100], 7, *tokens[1101:]])
    assert [a == b for a, b in zip(keys.blocks, other.blocks, strict=True)] == [True] * 4 + [False]
    assert keys.whole != other.whole and keys.shared(other) == 1024
    assert PrefixKeys.of(tokens[:1024]).shared(keys) == 512, "a token must be left to compute"
    assert PrefixKeys.of(tokens[:512]).whole == keys.blocks[1]


@pytest.mark.parametrize("length", [3, 256, 300, 1024, 1100])
def test_the_same_prompt_again_computes_nothing_and_says_the_same(length: int) -> None:
    llm = build_llm(max_num_seqs=4, cache_tokens=4096)
    first = answer(llm, ids(length))
    assert hits(llm) == 0
    assert answer(llm, ids(length)) == first
    assert hits(llm) == length
    assert answer(build_llm(enable_prefix_caching=False), ids(length))[0][0] == first[0][0]


def test_a_prompt_that_begins_alike_goes_on_from_the_last_cut() -> None:
    llm = build_llm(max_num_seqs=4, cache_tokens=4096)
    answer(llm, ids(1200))
    longer = ids(1200)[:1100] + ids(50, 1)
    assert answer(llm, longer) == answer(build_llm(max_num_seqs=4, cache_tokens=4096), longer)
    assert hits(llm) == 1024
    answer(llm, ids(1200)[:300])
    assert hits(llm) == 1024 + 256


def test_requests_that_come_together_share_one_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    streams = Transformer.streams
    monkeypatch.setattr(Transformer, "streams", lambda self, x, cache, step, last: (
        computed.append(sum(n for n in step.lengths if n > 1)), streams(self, x, cache, step, last)
    )[1])  # fmt: skip
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=5, ignore_eos=True)
    for caching in (True, False):
        computed.clear()
        llm = build_llm(max_num_seqs=8, cache_tokens=16 * 256, enable_prefix_caching=caching)
        outputs = llm.generate([{"prompt_token_ids": ids(300)}] * 2, params)
        assert sum(computed) == 300, "six completions of one prompt"
        assert len({tuple(o.token_ids) for o in outputs[0].outputs}) == 3
        assert [o.token_ids for o in outputs[0].outputs] == [o.token_ids for o in outputs[1].outputs]
        one_by_one = build_llm(max_num_seqs=1, enable_prefix_caching=False)
        assert [o.token_ids for o in one_by_one.generate({"prompt_token_ids": ids(300)}, params)[0].outputs] == [
            o.token_ids for o in outputs[0].outputs
        ]
    computed.clear()
    llm = build_llm(max_num_seqs=8, cache_tokens=16 * 256)
    llm.generate([{"prompt_token_ids": ids(512) + ids(10, k)} for k in range(4)], PARAMS)
    assert sum(computed) == 512 + 4 * 10


def test_full_blocks_are_shared_by_forks() -> None:
    llm = build_llm(max_num_seqs=4, cache_tokens=6 * 256)
    engine = llm.engine
    engine.add(engine.request(ids(520), SamplingParams(n=4, max_tokens=8, ignore_eos=True), lambda delta: None))
    while len(engine.scheduler.running) < 4:
        engine.step()
    # Two full blocks held by all, and a partial one each: 6 in all, where copies would take 12.
    assert sorted(engine.scheduler.blocks.holders) == [1, 1, 1, 1, 4, 4]
    while engine.has_work:
        engine.step()
    assert engine.scheduler.blocks.free == 6 and engine.scheduler.preemptions == 0


def test_it_outlives_the_process(tmp_path: Path) -> None:
    first = build_llm(prefix_cache_dir=tmp_path)
    prompt, longer = ids(700), ids(700)[:600] + ids(40, 1)
    expected = answer(first, prompt)
    first.engine.close()
    again = build_llm(prefix_cache_dir=tmp_path)
    assert answer(again, prompt) == expected and hits(again) == 700
    assert answer(again, longer) == answer(build_llm(), longer) and hits(again) == 700 + 512
    again.engine.close()
    other = build_llm(seed=1, prefix_cache_dir=tmp_path)
    answer(other, prompt)
    assert hits(other) == 0, "another model's cache was used"
    other.engine.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("kind", ["whole", "block"])
def test_damage_is_noticed_and_computed_again(
    tmp_path: Path, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = build_llm(prefix_cache_dir=tmp_path)
    expected = answer(first, ids(600))
    first.engine.close()
    again = build_llm(prefix_cache_dir=tmp_path)
    for file in tmp_path.glob(f"*/{kind}-*"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes({"flip": bytes(raw), "cut": bytes(raw[:-9]), "empty": b"", "gone": b""}[damage])
        if damage == "gone":
            file.unlink()
    assert answer(again, ids(600)) == expected
    assert hits(again) == (512 if kind == "whole" else 0)
    assert ("damaged entry" in caplog.text) == (damage in ("flip", "cut"))
    assert answer(again, ids(600)) == expected and hits(again) == (512 if kind == "whole" else 0) + 600
    again.engine.close()
    healed = build_llm(prefix_cache_dir=tmp_path)
    assert answer(healed, ids(600)) == expected and hits(healed) == 600, "the damaged entry wasn't replaced"
    healed.engine.close()


def test_memory_is_bounded_and_the_least_used_goes_first() -> None:
    model = build_model()
    cache = PrefixCache(KVCache(model.config, 2, 1, torch.float32), 1000)
    entries = {name: torch.full((300,), k, dtype=torch.uint8) for k, name in enumerate("abcd")}
    for name in "abc":
        cache._put(name, entries[name])
    assert cache._get("a") is not None
    cache._put("d", entries["d"])
    assert [name for name in "abcd" if cache._has(name)] == ["a", "c", "d"] and cache.nbytes == 900
    cache._put("e", torch.zeros(1001, dtype=torch.uint8))
    assert not cache._has("e") and cache.nbytes == 900
    tight = build_llm(max_num_seqs=4, cache_tokens=4096, prefix_cache_bytes=400_000)
    for seed in range(4):
        expected = answer(tight, ids(600, seed))
        assert answer(tight, ids(600, seed)) == expected
        assert tight.engine.prefix is not None and 0 < tight.engine.prefix.nbytes <= 400_000


def test_the_disk_is_bounded_and_a_crash_leaves_nothing(tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path, "model", 1000)
    for k in range(6):
        disk.write(f"block-{k}", torch.full((268,), k, dtype=torch.uint8))  # 300 bytes with the checksum
    disk.close()
    folder = tmp_path / "model"
    assert sorted(f.name for f in folder.iterdir()) == ["block-3", "block-4", "block-5"]
    os.utime(folder / "block-3", (time.time() + 5, time.time() + 5))
    half, fresh = folder / "block-6.1-1.tmp", folder / "block-7.1-1.tmp"
    half.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(half, (1, 1))
    again = PrefixDisk(tmp_path, "model", 700)
    assert sorted(f.name for f in folder.iterdir()) == ["block-3", "block-5", "block-7.1-1.tmp"]
    assert again.nbytes == 600 and "block-4" not in again
    assert again.read("block-5").tolist() == [5] * 268  # type: ignore[union-attr]
    again.close()
    again.close()


def test_a_lost_disk_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = build_llm(prefix_cache_dir=tmp_path / "cache")
    folder = next((tmp_path / "cache").iterdir())
    folder.rmdir()
    expected = answer(llm, ids(300))
    llm.engine.close()
    assert "writes no more" in caplog.text
    assert answer(llm, ids(300)) == expected


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"prefix cache can't use .*file"):
        build_llm(prefix_cache_dir=tmp_path / "file")
    with pytest.raises(InputError, match="prefix caching is off"):
        build_llm(prefix_cache_dir=tmp_path, enable_prefix_caching=False)
    with pytest.raises(InputError, match="prefix_cache_bytes is 0"):
        build_llm(prefix_cache_bytes=0)


def test_fingerprints_tell_models_apart() -> None:
    a, b = build_model(), build_model()
    assert fingerprint(a) == fingerprint(b)
    b.layers[3].ffn.experts.w2.data[7, 5, 3] += 1e-3
    c = build_model()
    c.numerics = "official"
    assert len({fingerprint(m) for m in (a, b, c, build_model().to(torch.bfloat16))}) == 4


def test_reset_forgets() -> None:
    llm = build_llm()
    answer(llm, ids(300))
    llm.reset_prefix_cache()
    answer(llm, ids(300))
    assert hits(llm) == 0


def test_blocks_for_prompt_of_whole_blocks() -> None:
    assert blocks_for(512) == 2
    llm = build_llm(max_num_seqs=3, cache_tokens=5 * 256)
    params = SamplingParams(temperature=0.0, n=3, max_tokens=3, ignore_eos=True)
    outputs = llm.generate({"prompt_token_ids": ids(512)}, params)[0].outputs  # a fork takes no block of its own
    assert len({tuple(o.token_ids) for o in outputs}) == 1
