"""Speculative decoding changes nothing but speed: the same tokens, greedy and seed by seed, and the cache as it was."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jsonschema
import pytest
import torch
from models import fill
from tiny_v4 import VOCAB, build_tokenizer, config

from upwell import LLM, SamplingParams
from upwell.engine import StructuredOutputs, Tokenizer, speculative
from upwell.engine.lookup import Lookup
from upwell.engine.pace import Acceptance, Pace
from upwell.engine.sampler import Draw, sample
from upwell.errors import EngineError, InputError
from upwell.model import KVCache, Step, Transformer

GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


class Always(Pace):
    """Drafts as many as it may, whatever that takes."""

    def choose(self) -> int:
        return self.choices[-1]


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(config().with_mtp(1)).eval()
    fill(made, 1, made.config.n_routed_experts)
    with torch.no_grad():
        made.head.weight *= 2.0  # no near-ties
    return made


Answers = dict[tuple[tuple[int, ...], int], list[int]]  # by prompt and index: what will be written


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Every step drafts by MTP as deep as it can. A random MTP is never right: where the answer is given, two of three
    of its drafts are replaced by what the model will say."""
    monkeypatch.setattr(speculative, "Pace", Always)
    monkeypatch.setattr(speculative, "_LOOKUPS", (0,))
    answers: Answers = {}
    count = [0]

    def drafts(logits: Any, sequences: Any, allowed: Any, ahead: Any, **options: Any) -> list[Draw]:
        drawn = sample(logits, sequences, allowed, ahead, **options)
        for k, (sequence, tokens) in enumerate(zip(sequences, ahead, strict=True)):
            answer = answers.get((tuple(sequence.request.prompt_token_ids), sequence.index), [])
            at = len(sequence.output) + len(tokens)
            count[0] += 1
            if count[0] % 3 and at < len(answer):
                drawn[k] = Draw(answer[at], None)
        return drawn

    monkeypatch.setattr(speculative, "sample", drafts)
    return answers


def remember(answers: Answers, prompts: list[list[int]], outputs: list[list[list[int]]]) -> None:
    for prompt, completions in zip(prompts, outputs, strict=True):
        answers |= {(tuple(prompt), k): output for k, output in enumerate(completions)}


def llm_of(model: Transformer, drafts: int, **options: Any) -> LLM:
    options = {"max_num_seqs": 4, "cache_tokens": 4096, **options}
    return LLM.from_model(model, Tokenizer(build_tokenizer()), speculative_tokens=drafts, **options)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tokens(llm: LLM, prompts: list[list[int]], **params: Any) -> list[list[list[int]]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], SamplingParams(**{**GREEDY, **params}))
    return [[o.token_ids for o in output.outputs] for output in outputs]


PROMPTS = [ids(n, n) for n in (1, 126, 250)]  # over a window, an HCA entry and a block


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.4, "seed": 4}, {"temperature": 1.0, "seed": 5, "top_p": 0.9, "presence_penalty": 1.0}],
    ids=["greedy", "cool", "penalties"],
)
def test_mtp_changes_no_token(model: Transformer, drafting: Answers, params: dict[str, Any]) -> None:
    expected = tokens(llm_of(model, 0), PROMPTS, **params)
    remember(drafting, PROMPTS, expected)
    llm = llm_of(model, 3)
    assert [tokens(llm, [prompt], **params)[0] for prompt in PROMPTS] == expected
    assert tokens(llm, PROMPTS, **params) == expected
    stats = llm.engine.stats()
    assert stats.draft_proposed > 100 and 0 < stats.draft_accepted < stats.draft_proposed


def test_lookups_change_no_token(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "Pace", Always)
    monkeypatch.setattr(speculative, "_MTP_DEPTH", 0)
    once = tokens(llm_of(model, 0), [ids(60)])[0][0]
    prompt = ids(60) + once + ids(60)  # what was written once may well be written again
    prompts = [prompt, prompt[:100]]
    bias = {"logit_bias": dict.fromkeys(once[:6], 4.0), "max_tokens": 40}
    llm = llm_of(model, 7)
    assert tokens(llm, prompts, **bias) == tokens(llm_of(model, 0), prompts, **bias)
    assert llm.engine.stats().draft_accepted > 0


def test_with_preemption_forks_and_the_prefix_cache(model: Transformer, drafting: Answers) -> None:
    prompts, params = [ids(250, k) for k in range(3)], {"seed": 3, "temperature": 1.0, "n": 2, "max_tokens": 12}
    expected = tokens(llm_of(model, 0, max_num_seqs=8), prompts, **params)
    remember(drafting, prompts, expected)
    tight = llm_of(model, 3, max_num_seqs=5, cache_tokens=6 * 256)
    assert tokens(tight, prompts, **params) == expected
    assert tight.engine.stats().preemptions > 0
    assert tokens(tight, prompts, **params) == expected  # from the prefix cache
    stats, scheduler = tight.engine.stats(), tight.engine.scheduler
    assert stats.prefix_hit_tokens > 0 and stats.draft_accepted > 0
    assert scheduler.blocks.free == scheduler.blocks.total and scheduler.slots.free == scheduler.slots.total


SCHEMA = {
    "type": "object", "required": ["name", "size"], "additionalProperties": False,
    "properties": {"name": {"enum": ["alpha", "beta"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip


def test_structured_output_and_what_it_forces(model: Transformer, drafting: Answers) -> None:
    def texts(llm: LLM) -> list[str]:
        params = SamplingParams(seed=7, n=4, max_tokens=200, structured_outputs=StructuredOutputs(json=SCHEMA))
        outputs = llm.generate("x", params)[0].outputs
        assert {o.finish_reason for o in outputs} == {"stop"}
        return [o.text for o in outputs]

    llm = llm_of(model, 3)
    written = texts(llm)
    assert written == texts(llm_of(model, 0))
    for text in written:
        jsonschema.validate(json.loads(text), SCHEMA)
    # Its names alone are text without a choice.
    assert llm.engine.stats().draft_accepted > 4 * len("name") + 4 * len("size")


def test_forced_tokens_cost_no_step_and_stops_hold(model: Transformer) -> None:
    forced = ids(12, 9)
    steps, saves = [], []

    def mask(output: list[int]) -> list[int] | None:
        return [forced[len(output)]] if len(output) < len(forced) else None

    llm = llm_of(model, 7)
    llm.engine.runner.verify, real = (lambda *a: (steps.append(1), real(*a))[1]), llm.engine.runner.verify  # type: ignore[method-assign,func-returns-value]
    llm.engine.runner.cache.save, save = (lambda *a: (saves.append(1), save(*a))[1]), llm.engine.runner.cache.save  # type: ignore[method-assign,func-returns-value]
    prompt = {"prompt_token_ids": ids(5)}
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    assert llm.generate(prompt, params, token_mask=mask)[0].token_ids == forced
    assert len(steps) == 2  # the first token comes with the prompt; 8 and 3 follow
    assert not saves  # nothing can be rejected
    stop = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[forced[5]])
    output = llm.generate(prompt, stop, token_mask=mask)[0].outputs[0]
    assert output.token_ids == forced[: forced.index(forced[5]) + 1] and output.finish_reason == "stop"
    with pytest.raises(EngineError, match="allows nothing after 9 tokens"):
        llm.generate(prompt, params, token_mask=lambda out: mask(out) if len(out) < 9 else [])
    assert not llm.engine.has_work


def test_the_sampled_distribution(model: Transformer, drafting: Answers) -> None:
    """Three tokens of four kinds, drawn 600 times: chi-square against the model's own probabilities."""
    kinds, prompt = [30, 40, 50, 60], ids(20, 5)
    llm = llm_of(model, 3, max_num_seqs=32, cache_tokens=32 * 256)
    counts: Counter[tuple[int, ...]] = Counter()
    drafting |= {(tuple(prompt), k): [30, 40, 30] for k in range(100)}  # drafts that know nothing of the random numbers
    for seed in range(6):
        params = SamplingParams(temperature=3.0, seed=seed, n=100, max_tokens=3, ignore_eos=True)
        output = llm.generate({"prompt_token_ids": prompt}, params, token_mask=lambda out: kinds)[0]
        counts.update(tuple(o.token_ids) for o in output.outputs)
    expected: dict[tuple[int, ...], float] = {(): 600.0}
    for _ in range(3):
        grown = {}
        for chosen, count in expected.items():
            with torch.no_grad():
                logits = model(torch.tensor([prompt + list(chosen)]))[0, -1, kinds] / 3.0
            for kind, p in zip(kinds, logits.softmax(-1).tolist(), strict=True):
                grown[(*chosen, kind)] = count * p
        expected = grown
    # Cells of at least 5 each; 99.9 % of right samplers stay below the bound (Wilson and Hilferty).
    cells = [(counts[c], e) for c, e in expected.items() if e >= 5]
    rest = [(counts[c], e) for c, e in expected.items() if e < 5]
    cells += [(sum(c for c, _ in rest), sum(e for _, e in rest))] if sum(e for _, e in rest) >= 5 else []
    chi, freedom = sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1
    assert freedom >= 8 and llm.engine.stats().draft_accepted > 100
    assert chi < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("by_kernels", [True, False])
def test_rings_go_back(model: Transformer, by_kernels: bool) -> None:
    cache = KVCache(model.config, 2, 2, torch.float32)
    if not by_kernels:
        cache._native = None
    rings = [layer.window for layer in (*cache.layers, *cache.mtp)]
    for layer in cache.layers:
        rings += [t for tail in (layer.tail, layer.index_tail) if tail for t in (tail.kv, tail.gate)]
    for k, ring in enumerate(rings):
        ring.copy_(torch.randn(ring.shape, generator=torch.Generator().manual_seed(k)))
    before = [ring.clone() for ring in rings]
    saved = cache.save([1] * 7, list(range(254, 261)))
    with torch.no_grad():
        streams = model.streams(torch.tensor([ids(7)]), cache, Step([1], [254], [7], [[0, 1]]))
        model.draft(torch.tensor([ids(7, 1)]), streams, cache, Step([1], [254], [7], [[0, 1]]))
    assert all(not torch.equal(a, b) for a, b in zip(before, rings, strict=True))
    written = [ring.clone() for ring in rings]
    cache.restore(saved, [2, 3, 4, 5, 6])
    for old, new, now in zip(before, written, rings, strict=True):
        kept = torch.tensor([254, 255]) % now.shape[1]
        old[1, kept] = new[1, kept]
        assert torch.equal(old, now)


def test_lookup() -> None:
    lookup = Lookup([1, 2, 3, 4, 2, 9])
    assert lookup.propose(3) == []
    lookup.extend([2])
    assert lookup.propose(2) == [9, 2]  # the last 2 was followed by 9
    lookup.extend([3])
    assert lookup.propose(3) == [4, 2, 9] and lookup.grown == 2
    assert Lookup([7]).propose(4) == []


@pytest.mark.parametrize(
    ("share", "cost", "best"),
    [(0.9, 0.2, 3), (0.5, 0.15, 2), (0.5, 0.6, 0), (0.05, 0.2, 0)],
    ids=["cheap and right", "cheap", "dear", "wrong"],
)
def test_drafts_are_as_many_as_pay(share: float, cost: float, best: int) -> None:
    """A step takes 1 and `cost` a draft, each accepted `share` of the time: the expected speeds say which is best."""
    acceptance = Acceptance(3)
    pace = Pace(range(4), acceptance)
    generator = torch.Generator().manual_seed(0)
    spent = made = 0.0
    chosen = []
    for _ in range(2000):
        k = pace.choose()
        rolls = torch.rand(k, generator=generator) < share
        taken = int(rolls.long().cumprod(0).sum())
        acceptance.saw(k, taken)
        pace.took(k, 1 + cost * k)
        chosen.append(k)
        spent, made = spent + 1 + cost * k, made + 1 + taken
    speeds = [sum(share**d for d in range(k + 1)) / (1 + cost * k) for k in range(4)]
    assert max(range(4), key=lambda k: speeds[k]) == best
    assert made / spent > 0.95 * speeds[best]
    assert Counter(chosen[200:]).most_common(1)[0][0] == best


def test_a_machine_that_becomes_slower_changes_no_choice() -> None:
    """Drafts pay, by a tenth; then every step takes twice as long for a while, which is seen at steps without first."""
    acceptance = Acceptance(3)
    pace, chosen = Pace(range(4), acceptance), []
    for step in range(3000):
        slow = 2.0 if 600 <= step < 900 or step >= 1800 else 1.0
        could = step % 2  # every other step has nothing to propose
        k = pace.choose() if could else 0
        acceptance.saw(k, min(k, int(step % 3 > 0)))
        pace.took(k, slow * (1 + 0.25 * k))
        if could and step > 100:
            chosen.append(k)
    assert Counter(chosen)[1] > 0.97 * len(chosen)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_refused(model: Transformer, wrong: int) -> None:
    with pytest.raises(InputError, match=f"speculative_tokens is {wrong}, must be from 0 to 7"):
        llm_of(model, wrong)
