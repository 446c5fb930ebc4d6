"""The model equals transformers' DeepseekV4ForCausalLM, in every way of feeding it a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from models import FULL_FORWARD, SPECS, Session, Spec, Twin, assert_close, path, random_ids, run_clear, run_theirs
from torch import Tensor

from upwell.engine import LLM, SamplingParams
from upwell.model import attention, indexer

LENGTHS = [1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 513, 1025, 4097]
CHUNKS = [7, 1, 121, 2, 129, 3, 255, 5, 64, 1, 1, 333, 4, 127]
DECODED = 262  # tokens decoded one by one from an empty cache: past every boundary up to two HCA entries


@pytest.fixture(scope="module", params=SPECS)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return Twin.build(SPECS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["modules", "kernels"])
def by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the cached forwards run."""
    with path(request.param):
        yield request.param


def test_prefill_of_every_length(twin: Twin) -> None:
    for n in [n for n in LENGTHS if n <= twin.spec.length]:
        ids = twin.ids[:, :n]
        # A forward of its own for each length (an incomplete window must not show), but for the longest.
        theirs = run_theirs(twin.theirs, ids) if n <= FULL_FORWARD else twin.logits[None, :n]
        with torch.no_grad():
            assert_close(twin.ours(ids), theirs, f"length {n}")


def test_prefill_with_gradients_on(twin: Twin) -> None:
    # Training takes other kernels than inference.
    for n in (5, 300):
        assert_close(twin.ours(twin.ids[:, :n]).detach()[0], twin.logits[:n], f"length {n}")


def test_prefill_in_chunks_of_odd_sizes(twin: Twin, by: str) -> None:
    for first in (0, 3):
        sizes = cycle(CHUNKS[first:] + CHUNKS[:first])
        ours = Session(twin.ours, [twin.ids[0]]).feed_all(sizes).result()
        assert_close(ours, twin.logits, f"chunks from {CHUNKS[first]}")


def test_token_by_token(twin: Twin, by: str) -> None:
    session = Session(twin.ours, [twin.ids[0, :DECODED]]).feed_all(cycle([1]))
    assert_close(session.result(), twin.logits[:DECODED], "from the first token")
    session = Session(twin.ours, [twin.ids[0]])
    session.feed({0: twin.spec.length - 9})
    assert_close(session.feed_all(cycle([1])).result(), twin.logits, "the last nine")


def test_ragged_batches(twin: Twin, by: str) -> None:
    lengths = [300, 131, 5, 260]
    sequences = [random_ids(1, n, 70 + i)[0] for i, n in enumerate(lengths)]
    session = Session(twin.ours, sequences)
    for round_of in (
        {0: 5, 1: 128, 2: 1, 3: 2},
        {0: 1, 1: 1, 3: 1},
        {3: 1, 0: 1, 2: 1},  # one token each: a decode step, in another order
        {0: 250, 2: 3, 3: 129},
        {1: 1, 3: 1, 0: 1},
        {3: 126, 1: 1, 0: 42},
    ):
        session.feed(round_of)
    assert session.done == lengths
    for i, ids in enumerate(sequences):
        assert_close(session.result(i), run_clear(twin.theirs, ids[None])[0][0], f"sequence {i}")


def picked_by_ours(twin: Twin, way: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Each CSA layer's picks [S, K] in one run, of the tokens for which the indexer was asked."""
    layers = sum(block.attn.indexer is not None for block in twin.ours.layers)
    picked: list[Tensor] = []  # every forward asks all of these layers, one after another, or none
    select, select_step = indexer.select_entries, attention.select_step

    def keep(scores: Tensor, visible: Tensor, k: int) -> Tensor:
        picks = select(scores, visible, k)
        picked.append(picks[0])
        return picks

    def keep_step(*inputs: Any) -> Tensor:
        picks = select_step(*inputs)
        picked.append(picks)  # a decode step of one sequence
        return picks

    monkeypatch.setattr(indexer, "select_entries", keep)
    monkeypatch.setattr(attention, "select_step", keep_step)
    with path("modules"):
        _run(twin, way)
    assert layers or not picked
    return [torch.cat(picked[i::layers]) for i in range(layers)]


def _run(twin: Twin, way: str) -> None:
    if way == "prefill":
        with torch.no_grad():
            twin.ours(twin.ids)
    else:
        session = Session(twin.ours, [twin.ids[0]])
        session.feed({0: 200})
        for _ in range(6):
            session.feed({0: 1})
        session.feed_all(cycle([211]))


@pytest.mark.parametrize("way", ["prefill", "chunks"])
def test_the_indexer_selects_the_same_entries(twin: Twin, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length = twin.spec.length
    for ours, theirs in zip(picked_by_ours(twin, way, monkeypatch), twin.picks, strict=True):
        # Our model asks the indexer only where there is a choice; before, each visible entry is read.
        identity, theirs_after = length - len(ours), theirs[length - len(ours) :]
        assert identity < 200 and len(ours) > 0
        visible = [set(range((t + 1) // 4)) for t in range(identity)]
        assert [set(row.tolist()) - {-1} for row in theirs[:identity]] == visible
        assert torch.equal(ours.sort(dim=1).values, theirs_after.sort(dim=1).values)


def test_greedy_generation_is_their_argmax_step_by_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    spec = SPECS["mixed-deep"]
    twin = Twin.build(Spec(spec.ratios, spec.hash_layers, spec.yarn, 140, spec.seed), tmp_path_factory.mktemp("greedy"))
    llm = LLM.from_model(twin.ours, max_num_seqs=2, cache_tokens=1024)
    prompts = [twin.ids[0, :122].tolist(), twin.ids[0, :3].tolist()]
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        so_far = list(prompt)
        for token in output.token_ids:
            assert token == int(run_theirs(twin.theirs, torch.tensor([so_far]))[0, -1].argmax())
            so_far.append(token)
