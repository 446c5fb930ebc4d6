"""A model shared by ranks computes what it computes alone: here ranks are threads that exchange over gloo."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fill
from models import path as kernels_or_modules
from ranks import Models, Threads
from torch import Tensor

from upwell import LLM, SamplingParams, load_model
from upwell.checkpoint import save_checkpoint
from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.recipes import Target
from upwell.config import ModelConfig
from upwell.engine import speculative
from upwell.engine.llm import nano_path
from upwell.engine.pace import Pace
from upwell.errors import ConfigError, InputError
from upwell.model import Step, Transformer, share
from upwell.model.exchange import Places, exchange
from upwell.model.placement import ExpertLoad, contiguous, place, rank_loads
from upwell.model.sharding import Shard, span

VOCAB = 301  # no number of ranks divides it, nor 10 experts four
SIZES: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": VOCAB, "hidden_size": 64, "moe_intermediate_size": 96,
    "num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_attention_heads": 8, "head_dim": 32,
    "q_lora_rank": 48, "num_experts_per_tok": 3, "n_routed_experts": 10, "o_groups": 2, "o_lora_rank": 24,
    "index_n_heads": 5, "index_head_dim": 24, "index_topk": 16, "sliding_window": 128, "num_hash_layers": 1,
    "qk_rope_head_dim": 16, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 8192,
}  # fmt: skip
WAYS = [(2, 1), (4, 1), (1, 3), (4, 4), (2, 4)]  # tp 4 shares the two output groups
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


def build(seed: int = 0) -> Transformer:
    model = Transformer(ModelConfig.from_dict(SIZES)).eval()
    fill(model, seed, model.config.n_routed_experts)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    save_checkpoint(build(), directory, quantize=False)
    return directory


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 matrices and FP4 experts, whose blocks of 128 few parts here begin at."""
    directory = tmp_path_factory.mktemp("packed")
    save_checkpoint(build(), directory, quantize=True)
    return directory


@pytest.fixture(scope="module")
def teams() -> dict[tuple[int, int], Threads]:
    return {way: Threads(*way) for way in WAYS}


def run(model: Transformer) -> Tensor:
    """Logits of prefill in chunks, of a ragged batch, of decode and of MTP."""
    ids = torch.randint(2, VOCAB, (600,), generator=torch.Generator().manual_seed(0))
    tables, out = [[2, 0], [3, 1]], []
    with torch.inference_mode():
        cache = model.new_cache(4, 3)
        streams = model.streams(ids[None, :150], cache, Step([1], [0], [150], tables[:1]))
        out.append(model.logits(streams[[149]]))
        both = torch.cat((ids[150:281], ids[300:377]))[None]  # 131 more tokens of one, 77 first ones of another
        streams = model.streams(both, cache, Step([1, 2], [150, 0], [131, 77], tables), only_last=True)
        out.append(model.logits(streams))
        for i in range(2):
            last = ids[[281 + i, 377 + i]].unsqueeze(1)
            streams = model.streams(last, cache, Step([1, 2], [281 + i, 77 + i], [1, 1], tables))
            out.append(model.logits(streams))
        after = Step([1, 2], [282, 78], [1, 1], tables)
        drafted = model.draft_streams(ids[[290, 291]].unsqueeze(1), streams, cache, after)
        out.append(model.draft_logits(drafted))
    return torch.cat(out)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("split", [0, 1000], ids=["split", "whole"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"tp{way[0]}-ep{way[1]}")
@pytest.mark.parametrize("computed_by", ["modules", "kernels"])
def test_ranks_compute_what_one_computes(
    dense: Path, teams: dict[tuple[int, int], Threads], way: tuple[int, int], split: int, computed_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(share, "SPLIT_TOKENS", split)
    with kernels_or_modules(computed_by):
        want = run(load_model(dense))
        models = teams[way].load(dense)
        for got in teams[way].run(lambda rank: run(models[rank])):
            assert error(got, want) < 1e-4


@pytest.mark.parametrize("way", [(2, 1), (4, 4)], ids=["tp2", "tp4-ep4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_checkpoints_are_split_where_their_blocks_are_and_decoded_elsewhere(
    packed: Path, teams: dict[tuple[int, int], Threads], way: tuple[int, int], dtype: torch.dtype
) -> None:
    with kernels_or_modules("kernels"):
        want = run(load_model(packed, dtype=dtype))
        models = teams[way].load(packed, dtype=dtype)
        for got in teams[way].run(lambda rank: run(models[rank])):
            if dtype == torch.float32:
                assert error(got, want) < 1e-4
            else:  # sums of parts are rounded otherwise than the whole, which may flip a near-tie of a router
                assert float((got - want).abs().median()) < 0.01 * float(want.abs().max())


def test_fp4_experts_are_split_at_their_groups_only(packed: Path, teams: dict[tuple[int, int], Threads]) -> None:
    halves = teams[2, 1].load(packed, dtype=torch.float32)  # 96 columns are 3 groups of 32
    assert [m.layers[0].ffn.experts.packed[0]["w2"][1].shape for m in halves] == [(64, 1), (64, 2)]
    with pytest.raises(InputError, match="groups of 32"):
        teams[4, 1].load(packed, dtype=torch.float32)


def held_bytes(models: Models) -> list[int]:
    """Of each rank's routed experts."""
    total = []
    for model in models:
        parts = [m.experts for m in model.modules() if hasattr(m, "places")]
        packed = [t for e in parts for expert in e.packed or [] for pair in expert.values() for t in pair]
        total.append(sum(t.nbytes for t in packed) + sum(p.nbytes for e in parts for p in e.parameters()))
    return total


@pytest.mark.parametrize("way", [(4, 1), (4, 4)], ids=["tp4", "tp4-ep4"])
def test_each_rank_has_only_its_part_of_nano(teams: dict[tuple[int, int], Threads], way: tuple[int, int]) -> None:
    whole = load_model(nano_path(), dtype=torch.float32)
    experts = [m.experts for m in whole.modules() if hasattr(m, "shared_experts")]
    all_bytes = sum(t.nbytes for e in experts for x in e.packed or [] for pair in x.values() for t in pair)
    models = teams[way].load(nano_path(), dtype=torch.float32)
    assert held_bytes(models) == [all_bytes // 4] * 4
    rows = [m.embed.weight.shape[0] for m in models]
    assert sum(rows) == whole.config.vocab_size and max(rows) == 1024
    assert all(m.layers[0].attn.attn_sink.numel() == 2 for m in models)  # of 8 heads


PROMPTS = [[(7 * i + k) % 299 + 2 for i in range(n)] for k, n in enumerate((5, 700, 300, 61))]


def answers(llm: LLM) -> list[list[int]]:
    """Prompts together (chunks, batching), then one again from the prefix cache, two that fork, one drawn by seed."""
    prompts: list[Any] = [{"prompt_token_ids": p} for p in PROMPTS]
    out = [o.token_ids for o in llm.generate(prompts, SamplingParams(**GREEDY))]
    out.append(llm.generate(prompts[1:2], SamplingParams(**GREEDY))[0].token_ids)
    longer = [{"prompt_token_ids": PROMPTS[1] + [9, 8, 7]}]
    out.append(llm.generate(longer, SamplingParams(**GREEDY))[0].token_ids)
    drawn = llm.generate(prompts[3:], SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=12, ignore_eos=True))[0]
    assert llm.engine.stats().prefix_hit_tokens > 700
    return out + [o.token_ids for o in drawn.outputs]


class Always(Pace):
    """Drafts as many as it may, whatever that takes."""

    def choose(self) -> int:
        return self.choices[-1]


OPTIONS = {"max_num_seqs": 3, "cache_tokens": 2048, "chunk": 256}


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return answers(LLM.from_model(load_model(nano_path(), dtype=torch.float32), None, **OPTIONS))


@pytest.mark.parametrize("way", [(2, 1), (4, 4)], ids=["tp2", "tp4-ep4"])
def test_nano_says_the_same_on_any_number_of_ranks(
    teams: dict[tuple[int, int], Threads], way: tuple[int, int], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts by MTP and from the text at every step: they change nothing, so the answers are those without."""
    monkeypatch.setattr(speculative, "Pace", Always)
    llm = teams[way].llm(nano_path(), speculative_tokens=2, **OPTIONS)
    assert answers(llm) == alone
    assert llm.engine.stats().draft_proposed > 20
    llm.close()


@pytest.mark.parametrize("counts", [(5, 0, 3, 0), (0, 0, 0, 0), (0, 1, 0, 0)], ids=str)
def test_tokens_of_any_number_reach_experts_anywhere(
    counts: tuple[int, ...], teams: dict[tuple[int, int], Threads]
) -> None:
    """Against the sum written as a loop: ranks without tokens, ranks without work, copies of experts."""
    team, placement = teams[4, 4], ((0, 1, 2), (3, 2), (4, 2), (5,))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 8, 8, generator=generator)
    xs = [torch.randn(n, 8, generator=generator) for n in counts]
    orders = [torch.rand(n, 5, generator=generator).argsort(1)[:, :2] for n in counts]
    shares = [torch.rand(n, 2, generator=generator) for n in counts]

    def work(rank: int) -> tuple[Tensor, int]:
        own = torch.tensor(placement[rank])

        def compute(x: Tensor, places: Tensor, of: Tensor) -> Tensor:
            return torch.einsum("pd,pde->pe", x, weights[own[places[:, 0]]]) * of

        world = team.ranks(rank, ModelConfig.from_dict(SIZES)).world
        return exchange(world, Places(placement, 6, rank), compute, xs[rank], orders[rank], shares[rank])

    results = team.run(work)
    for (got, _), x, picks, parts in zip(results, xs, orders, shares, strict=True):
        want = torch.zeros_like(x)
        for t in range(len(x)):
            for e, w in zip(picks[t].tolist(), parts[t].tolist(), strict=True):
                want[t] += w * (x[t] @ weights[e])
        torch.testing.assert_close(got, want)
    assert sum(n for _, n in results) == 2 * sum(counts)


def test_a_skewed_load_is_placed_evenly() -> None:
    load = [round(10000 / (e + 1)) for e in range(64)]  # the first expert has a fifth of all
    mean = sum(load) / 8
    assert max(rank_loads(contiguous(64, 8), load)) / mean > 4
    by_load = rank_loads(place(load, 8), load)
    assert max(by_load) / mean < 2  # one expert alone is 1.7 ranks' share
    with_copies = place(load, 8, extra=16)
    assert max(rank_loads(with_copies, load)) / mean < 1.02
    assert all(len(own) == len(set(own)) == 10 for own in with_copies)
    assert set().union(*with_copies) == set(range(64))


@pytest.mark.parametrize(
    ("load", "ranks", "extra"), [([0] * 5, 4, 0), ([9, 0, 0], 3, 9), ([1] * 10, 4, 3), ([5], 1, 0)]
)
def test_every_expert_has_a_place(load: list[int], ranks: int, extra: int) -> None:
    placement = place(load, ranks, extra)
    assert len(placement) == ranks and set().union(*placement) == set(range(len(load)))
    most = -(-min(len(load) + extra, ranks * len(load)) // ranks)
    assert all(len(own) == len(set(own)) <= most for own in placement)


def test_placed_by_measured_load_ranks_compute_the_same_more_evenly(
    dense: Path, teams: dict[tuple[int, int], Threads]
) -> None:
    """Prompts of few different words: their hash layer's experts are hot, and the others' as it happens."""
    way = (4, 4)
    prompts = [{"prompt_token_ids": [(i * i + k) % 7 + 2 for i in range(200)]} for k in range(3)]

    def measure(placement: dict[str, Any]) -> tuple[list[list[int]], list[list[int]], list[int]]:
        models = teams[way].load(dense, placement)
        for model in models:
            model.count_experts()

        def work(rank: int) -> list[list[int]]:
            with torch.inference_mode():
                cache, out = models[rank].new_cache(4, 4), []
                for slot, p in enumerate(prompts):
                    ids = torch.tensor([p["prompt_token_ids"]])
                    streams = models[rank].streams(ids, cache, Step([slot], [0], [200], [[slot]]))
                    out.append(models[rank].logits(streams[-20:]).argmax(-1).tolist())
                return out

        tokens = teams[way].run(work)[0]
        load = sum(m.expert_load for m in models if m.expert_load is not None)
        assert isinstance(load, Tensor)
        return tokens, load.tolist(), [sum(b.ffn.computed for b in m.layers) for m in models]

    tokens, load, _ = measure({})
    assert [sum(row) for row in load] == [3 * 200 * 3] * 3 + [0]
    single = load_model(dense)
    counts = single.count_experts()
    with torch.inference_mode():
        cache = single.new_cache(4, 4)
        for slot, p in enumerate(prompts):
            single.streams(torch.tensor([p["prompt_token_ids"]]), cache, Step([slot], [0], [200], [[slot]]))
    assert counts.tolist() == load
    names = ["layers.0", "layers.1", "layers.2", "mtp.0"]
    again, _, computed = measure({name: place(row, 4, extra=6) for name, row in zip(names, load, strict=True)})
    assert again == tokens
    assert max(computed) / (sum(computed) / 4) < 1.1
    straight = [sum(row[e] for row in load for e in own) for own in contiguous(10, 4)]
    assert max(straight) / (sum(straight) / 4) > 1.3


def test_an_expert_load_is_kept_in_a_file(tmp_path: Path) -> None:
    file, names = tmp_path / "load.json", ["layers.0", "mtp.0"]
    load = ExpertLoad({"layers.0": [1, 2, 3], "mtp.0": [0, 0, 5]})
    load.write(file)
    assert ExpertLoad.read(file, names, 3).plus(load).layers == {"layers.0": [2, 4, 6], "mtp.0": [0, 0, 10]}
    for text in ("", "[]", '{"expert_load": 3}', '{"expert_load": {"layers.0": ["x"]}}'):
        file.write_text(text)
        with pytest.raises(InputError, match="can't be read"):
            ExpertLoad.read(file, names, 3)
    load.write(file)
    with pytest.raises(InputError, match="another model"):
        ExpertLoad.read(file, names, 4)


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [
        (3, 1, "num_attention_heads is 8, which tp 3 doesn't divide"),
        (2, 3, "ep is 3 and tp is 2"),
        (1, 11, "a layer has 10 experts"),
        (0, 1, "tp is 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_by_its_number(tp: int, ep: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Shard(ModelConfig.from_dict(SIZES), 0, tp, ep)


def test_official_numerics_are_split_only_where_they_round() -> None:
    with pytest.raises(InputError, match="o_lora_rank 24 can't be split by tp 2"):
        Shard(ModelConfig.from_dict(SIZES), 0, 2).check_official()
    Shard(ModelConfig.preset("v4-flash"), 3, 8, 8).check_official()
    with pytest.raises(ConfigError):
        ModelConfig.preset("v5")


@pytest.mark.parametrize(("total", "parts", "unit"), [(10, 4, 1), (2048, 8, 128), (129280, 16, 1), (96, 2, 32)])
def test_spans_cover_all(total: int, parts: int, unit: int) -> None:
    spans = [span(total, parts, p, unit) for p in range(parts)]
    assert spans[0][0] == 0 and spans[-1][1] == total
    assert all(a[1] == b[0] and b[0] % unit == 0 for a, b in pairwise(spans))
    assert max(b - a for a, b in spans) - min(b - a for a, b in spans) <= unit


@pytest.mark.parametrize("to", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("way", [(2, 1), (1, 3), (2, 4)], ids=["tp2", "ep3", "tp2-ep4"])
def test_converted_checkpoints_are_shared_too(
    packed: Path, teams: dict[tuple[int, int], Threads], way: tuple[int, int], to: Target, tmp_path: Path
) -> None:
    convert(Conversion(packed, tmp_path / "out", to))
    if way == (2, 1) and to != "w8a8":
        with pytest.raises(InputError, match="columns of INT4 aren't split over ranks"):
            teams[way].load(tmp_path / "out", dtype=torch.float32)
        return
    want = run(load_model(tmp_path / "out", dtype=torch.float32))
    models = teams[way].load(tmp_path / "out", dtype=torch.float32)
    for got in teams[way].run(lambda rank: run(models[rank])):
        assert float((got - want).abs().median()) < 0.01 * float(want.abs().max())
