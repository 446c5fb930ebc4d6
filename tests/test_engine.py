"""The engine: greedy output is the model's argmax, batches don't mix, nothing leaks, requests end once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import path
from tiny_v4 import EOS, VOCAB, build_llm, build_model, save, save_transformers

from upwell import LLM, SamplingParams
from upwell.engine import Delta, Engine, EngineThread
from upwell.engine.blocks import Pool, blocks_for
from upwell.engine.outputs import TokenLogprob
from upwell.errors import CheckpointError, DeviceError, EngineError, InputError, ShuttingDownError
from upwell.model import KVCache, Step

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return build_llm(max_num_seqs=4, cache_tokens=4096)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_greedy(model: Callable[[torch.Tensor], torch.Tensor], prompt: list[int], output: list[int]) -> None:
    """Each token is the argmax of a whole forward, without a cache, over all tokens before it.

    The forward is causal: one over prompt and output gives what every step would have given.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output]))[0]
    assert output == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), f"prompt of {len(prompt)}"


def assert_idle(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert not engine.has_work and not engine._requests
    assert scheduler.blocks.free == scheduler.blocks.total
    assert scheduler.slots.free == scheduler.slots.total


def test_greedy_equals_transformers_step_by_step(tmp_path: Path) -> None:
    twin = save_transformers(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype=torch.float32)
    prompts = [ids(n, n) for n in (1, 5, 127, 130, 300)]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(lambda x: twin(x, use_cache=False).logits, prompt, output.token_ids)
        assert output.outputs[0].finish_reason == "length"


def test_chunked_prefill_and_batching_change_nothing(llm: LLM) -> None:
    lengths = [700, 3, 1100, 64, 513, 1, 200]
    prompts = [ids(n, 100 + n) for n in lengths]
    together = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)
    for prompt, output in zip(prompts, together, strict=True):
        assert_greedy(llm.model, prompt, output.token_ids)
    assert_idle(llm.engine)


@pytest.mark.parametrize("kind", ["kernels", "modules"])
def test_a_ragged_step_is_the_padded_one(kind: str) -> None:
    """Prompts and decoded tokens in one forward, one after another or padded: the same streams and cache."""
    model = build_model()
    lengths, starts, tables = [7, 1, 300, 1], [0, 4, 0, 130], [[3], [1], [4, 0], [2]]
    tokens = [ids(7, 1), ids(1, 2), ids(300, 3), ids(1, 4)]
    found = []
    with path(kind), torch.inference_mode():
        for ragged in (True, False):
            cache = KVCache(model.config, 5, 4, torch.float32)
            for slot in (1, 3):
                before = Step([slot], [0], [starts[slot]], [tables[slot]])
                model.streams(torch.tensor([ids(starts[slot], 9)]), cache, before)
            step = Step([0, 1, 2, 3], starts, lengths, tables)
            if ragged:
                streams = model.streams(torch.tensor([[t for part in tokens for t in part]]), cache, step)
            else:
                padded = torch.tensor([t + [0] * (300 - len(t)) for t in tokens])
                whole = model.streams(padded, cache, step).unflatten(0, (4, 300))
                streams = torch.cat([whole[b, :n] for b, n in enumerate(lengths)])
            after = Step([0, 1, 2, 3], [s + n for s, n in zip(starts, lengths, strict=True)], [1] * 4, tables)
            found.append((streams, model.streams(torch.tensor([[5], [6], [7], [8]]), cache, after)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_seed_gives_the_same_output_alone_and_in_a_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True, top_p=0.9, n=2)
    prompt = {"prompt_token_ids": ids(30)}
    alone = llm.generate(prompt, params)[0]
    crowd = llm.generate([{"prompt_token_ids": ids(50, 3)}, prompt, {"prompt_token_ids": ids(9, 4)}], params)[1]
    assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in crowd.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids
    assert llm.generate(prompt, SamplingParams(seed=8, max_tokens=20, ignore_eos=True))[0].token_ids != alone.token_ids


def test_preemption_by_recompute_changes_nothing() -> None:
    # Three sequences grow over a block boundary in a pool of four blocks: one has to give way.
    prompts = [ids(250, k) for k in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    roomy = build_llm(max_num_seqs=3, cache_tokens=4096)
    tight = build_llm(max_num_seqs=3, cache_tokens=4 * 256)
    evictions = []
    evict = tight.engine.scheduler._evict
    tight.engine.scheduler._evict = lambda s: (evictions.append(s.finish_reason), evict(s))[1]  # type: ignore[func-returns-value,method-assign]
    batch = [{"prompt_token_ids": p} for p in prompts]
    expected = [o.token_ids for o in roomy.generate(batch, params)]
    assert [o.token_ids for o in tight.generate(batch, params)] == expected
    assert None in evictions, "nothing was preempted: the test tests nothing"
    assert_idle(tight.engine)


def test_random_arrivals_and_cancels_leak_nothing() -> None:
    rng = random.Random(5)
    engine = Engine(build_model(), None, max_num_seqs=3, cache_tokens=3 * 256, chunk=64)
    ends: dict[int, list[str | None]] = {}
    live = {}
    for k in range(24):
        ends[k] = []

        def sink(delta: Delta, k: int = k) -> None:
            if delta.finish_reason is not None:
                ends[k].append(delta.finish_reason)

        params = SamplingParams(max_tokens=rng.randint(1, 30), seed=k, n=rng.randint(1, 2))
        live[k] = engine.request(ids(rng.randint(1, 300), k), params, sink)
        engine.add(live[k])
        for _ in range(rng.randint(0, 6)):
            engine.step()
            scheduler = engine.scheduler
            held = [b for s in scheduler.running for b in s.table]
            assert len(held) == len(set(held)) == scheduler.blocks.total - scheduler.blocks.free
        if rng.random() < 0.3:
            engine.cancel(live[rng.choice(list(live))])
    while engine.has_work:
        engine.step()
    assert_idle(engine)
    assert all(len(ends[k]) == live[k].params.n for k in ends)


def test_streaming_adds_up_and_closing_cancels(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    whole = llm.generate("hello", params)[0]
    deltas = list(llm.stream("hello", params))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    stream = llm.stream("hello", params)
    next(stream)
    assert llm.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm.engine)


def test_ends(llm: LLM) -> None:
    prompt = {"prompt_token_ids": ids(20)}
    free = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))[0]
    third = free.token_ids[2]
    first_at = free.token_ids.index(third)
    params = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=[third], ignore_eos=True)
    stopped = llm.generate(prompt, params)[0]
    assert stopped.token_ids == free.token_ids[: first_at + 1]
    assert stopped.outputs[0].finish_reason == "stop"
    # The end-of-sequence token ends it, ignore_eos doesn't let it, min_tokens puts it off.
    bias = {EOS: 100.0}
    ended = llm.generate(prompt, SamplingParams(max_tokens=30, logit_bias=bias))[0]
    assert ended.token_ids == [EOS] and ended.text == "" and ended.outputs[0].finish_reason == "stop"
    ignored = llm.generate(prompt, SamplingParams(max_tokens=5, logit_bias=bias, ignore_eos=True))[0]
    assert ignored.token_ids == [EOS] * 5 and ignored.outputs[0].finish_reason == "length"
    late = llm.generate(prompt, SamplingParams(max_tokens=30, logit_bias=bias, min_tokens=4))[0]
    assert len(late.token_ids) == 4 and EOS not in late.token_ids[:3] and late.token_ids[3] == EOS


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
    text = llm.generate("abc", params)[0].text
    stop = text[10:13]
    cut = llm.generate("abc", SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True, stop=stop))[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop"


def test_token_mask_and_its_logprobs(llm: LLM) -> None:
    seen = []

    def mask(output: list[int]) -> list[int] | None:
        seen.append(list(output))
        return [[40, 50, 60], [70], None, [EOS]][len(output)]  # type: ignore[return-value]

    params = SamplingParams(temperature=0.0, max_tokens=9, logprobs=5)
    output = llm.generate({"prompt_token_ids": ids(12)}, params, token_mask=mask)[0]
    assert output.token_ids[0] in (40, 50, 60) and output.token_ids[1] == 70 and output.token_ids[3] == EOS
    assert seen == [output.token_ids[:k] for k in range(4)]
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and [entry.token_id for entry in logprobs] == output.token_ids
    with torch.no_grad():
        logits = llm.model(torch.tensor([ids(12)]))[0, -1]
    expected = logits[[40, 50, 60]].log_softmax(0)
    assert sorted(v for _, v in logprobs[0].top) == pytest.approx(sorted(expected.tolist()), abs=1e-4)
    assert logprobs[1].logprob == pytest.approx(0.0) and len(logprobs[2].top) == 5


@pytest.mark.parametrize("drafts", [0, 7])
def test_an_end_without_a_choice_needs_no_forward(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build_llm(speculative_tokens=drafts)
    written, forwards = [7, 8, 9], []
    extend = llm.engine.runner._extend
    monkeypatch.setattr(llm.engine.runner, "_extend", lambda *a, **k: (forwards.append(1), extend(*a, **k))[1])

    def mask(output: list[int]) -> list[int]:
        return [written[len(output)], written[len(output)] + 10] if len(output) < len(written) else [EOS]

    bias = {"logit_bias": dict.fromkeys(written, 100.0)}
    for length, asked in ((4, {"temperature": 0.0}), (5, {"seed": 3, "logprobs": 2})):
        forwards.clear()
        params = SamplingParams(max_tokens=20, **asked, **bias)  # type: ignore[arg-type]
        out = llm.generate({"prompt_token_ids": ids(length)}, params, token_mask=mask)[0].outputs[0]
        assert out.token_ids == [*written, EOS] and out.finish_reason == "stop"
        assert len(forwards) == 3, "the prompt's, and one for each token but the first and the end"
        if out.logprobs is not None:
            assert out.logprobs[-1] == TokenLogprob(EOS, 0.0, ((EOS, 0.0),))
    assert llm.engine.stats().generated_tokens == 8


def test_a_failing_mask_ends_its_own_request_only(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": ids(5)}, {"prompt_token_ids": ids(6)}]
    with pytest.raises(EngineError, match="allows nothing after 2 tokens"):
        llm.generate(prompts, GREEDY, token_mask=[lambda out: None if len(out) < 2 else [], None])
    assert_idle(llm.engine)
    deltas: dict[int, list[Delta]] = {0: [], 1: []}
    masks = [lambda out: [] if out else None, None]
    for k in (0, 1):
        engine = llm.engine
        engine.add(engine.request(prompts[k]["prompt_token_ids"], GREEDY, deltas[k].append, token_mask=masks[k]))
    while llm.engine.has_work:
        llm.engine.step()
    assert isinstance(deltas[0][-1].error, EngineError)
    assert deltas[1][-1].finish_reason == "length" and len(deltas[1]) == 12


def test_a_directory_without_tokenizer_works_on_ids(tmp_path: Path) -> None:
    llm = LLM(save(tmp_path, with_tokenizer=False), device="cpu")
    output = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0.0, ignore_eos=True))[0]
    assert_greedy(llm.model, [1, 2, 3], output.token_ids)
    assert len(output.token_ids) == 16 and output.text == ""
    with pytest.raises(InputError, match=r"no tokenizer\.json .*prompt_token_ids"):
        llm.generate("text")
    with pytest.raises(InputError, match="stop is"):
        llm.generate({"prompt_token_ids": [1]}, SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ({"prompt_token_ids": []}, {}, "no tokens"),
        ({"prompt_token_ids": [VOCAB]}, {}, f"token id {VOCAB} isn't in the vocabulary"),
        ({"prompt_token_ids": [-1]}, {}, "token id -1"),
        ({"prompt_token_ids": [3.5]}, {}, "isn't an integer"),
        ({"tokens": [1]}, {}, r"keys \['tokens'\]"),
        ({"prompt_token_ids": [1]}, {"logit_bias": {VOCAB: 1}}, f"token id {VOCAB}"),
        ({"prompt_token_ids": [1] * 4000}, {"max_tokens": 97}, "4000 tokens and 97 new ones"),
    ],
)
def test_refused_prompts(llm: LLM, prompt: dict[str, list[int]], params: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    assert_idle(llm.engine)


def test_max_tokens_none_goes_to_the_end_of_the_context() -> None:
    llm = build_llm(max_num_seqs=1, cache_tokens=256)
    output = llm.generate({"prompt_token_ids": ids(200)}, SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(output.token_ids) == 56 and output.outputs[0].finish_reason == "length"


def test_thread_serves_cancels_and_drains(llm: LLM) -> None:
    engine = build_llm(max_num_seqs=2, cache_tokens=2048).engine
    thread = EngineThread(engine)
    finished: list[Delta] = []
    gone: list[Delta] = []
    kept = engine.request(ids(10), GREEDY, finished.append)
    cancelled = engine.request(ids(10), SamplingParams(max_tokens=None, ignore_eos=True), gone.append)
    thread.submit(cancelled)
    thread.submit(kept)
    thread.cancel(cancelled)
    thread.stop()
    assert not thread.is_alive
    assert finished[-1].finish_reason == "length" and gone[-1].finish_reason == "abort"
    expected = llm.generate({"prompt_token_ids": ids(10)}, GREEDY)[0].token_ids
    assert [t for d in finished for t in d.token_ids] == expected
    assert_idle(engine)
    with pytest.raises(ShuttingDownError):
        thread.submit(kept)


def test_a_bug_in_the_scheduler_leaves_no_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_llm(max_num_seqs=2, cache_tokens=512).engine
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 / 0)
    thread = EngineThread(engine)
    deltas: list[Delta] = []
    thread.submit(engine.request(ids(3), GREEDY, deltas.append))
    thread._thread.join(10)
    assert not thread.is_alive and isinstance(deltas[0].error, EngineError)
    with pytest.raises(ShuttingDownError):
        thread.submit(engine.request(ids(3), GREEDY, deltas.append))


def test_a_model_error_ends_its_request_and_the_engine_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "logits", lambda streams: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            llm.generate("abc", GREEDY)
    assert_idle(llm.engine)
    assert len(llm.generate("abc", GREEDY)[0].token_ids) == 12


def test_devices_that_are_not_here() -> None:
    with pytest.raises(DeviceError, match="no device 'tpu'"):
        LLM("x", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="'cuda' isn't usable here"):
            LLM("x", device="cuda:1")


def test_missing_directory() -> None:
    with pytest.raises(CheckpointError):
        LLM("/nowhere/at/all", device="cpu")


def test_pool_refuses_what_would_corrupt_it() -> None:
    pool = Pool(3)
    taken = pool.take(2)
    pool.give_back(taken[:1])
    with pytest.raises(AssertionError):
        pool.give_back(taken[:1])
    with pytest.raises(AssertionError):
        pool.take(3)
    assert [blocks_for(n) for n in (1, 256, 257)] == [1, 1, 2]
