"""Experts in host memory or on disk: the same numbers as with all in memory, within the memory given."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Session, path
from test_checkpoint_memory import LAYER, SMALL, write_random_checkpoint
from tiny_v4 import SIZES, _fill

from upwell import LLM, SamplingParams, load_model
from upwell.checkpoint import expert_reads, save_checkpoint
from upwell.checkpoint.expert_pages import ExpertPages
from upwell.checkpoint.offload import Offload, parse_offload, parse_size
from upwell.cli import main
from upwell.config import ModelConfig
from upwell.errors import CheckpointError, EngineError, InputError
from upwell.model import Transformer, compiled
from upwell.model.offload import HostExperts
from upwell.ops import native

HERE = Path(__file__).parent
LAYERS, EXPERTS, TAKES = 4, 24, 3  # and one MTP block
SLOT = 32768  # bytes of an expert here: three runs of whole pages


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every attention, both routings and MTP in the official FP4 and FP8; 24 experts a layer."""
    config = ModelConfig.from_dict(
        {
            **SIZES, "num_hidden_layers": LAYERS, "compress_ratios": [0, 4, 128, 4], "num_hash_layers": 1,
            "hidden_size": 128, "moe_intermediate_size": 64, "n_routed_experts": EXPERTS, "sliding_window": 32,
            "hc_sinkhorn_iters": 4, "model_type": "deepseek_v4", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
            "num_nextn_predict_layers": 1, "max_position_embeddings": 2048, "num_experts_per_tok": TAKES,
        }
    )  # fmt: skip
    model = Transformer(config).eval()
    _fill(model.named_parameters(), model.named_buffers(), 0)
    directory = tmp_path_factory.mktemp("offload")
    save_checkpoint(model, directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def packed_only() -> Iterator[None]:
    """As with models of a size to offload: none so large is held decoded beside its packed weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_DECODED_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> Transformer:
    return load_model(checkpoint, dtype=torch.float32)


def disk(slots: int, usage: Path | None = None) -> Offload:
    return Offload("disk", slots * SLOT, usage)


def pages_of(model: Transformer) -> ExpertPages:
    assert isinstance(model.pages, ExpertPages)
    return model.pages


def logits(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two sequences in chunks, single tokens and together, and of the MTP block's drafts."""
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(2, 300, (n,), generator=generator) for n in (90, 41)]
    session = Session(model, sequences, mtp=True).feed_all(itertools.cycle([33, 1, 7, 1, 1]))
    drafts = torch.cat([torch.cat(parts) for parts in session.drafts])
    return torch.cat([session.result(0), session.result(1)]), drafts


# The same numbers.


@pytest.mark.parametrize("slots", [TAKES, 20, 10**6])
@pytest.mark.parametrize("way", ["kernels", "modules"])
def test_paged_experts_give_the_same_bits(checkpoint: Path, resident: Transformer, way: str, slots: int) -> None:
    paged = load_model(checkpoint, dtype=torch.float32, offload=disk(slots))
    with path(way):
        ours, ours_drafts = logits(paged)
        theirs, theirs_drafts = logits(resident)
    assert torch.equal(ours, theirs) and torch.equal(ours_drafts, theirs_drafts)
    pages = pages_of(paged)
    assert pages.slots == min(slots, (LAYERS + 1) * EXPERTS) and pages.slot_bytes == SLOT
    assert not pages._busy.any() and not pages._loads
    if slots == 10**6:
        assert pages.counts.read_bytes <= pages.slots * SLOT  # each at most once


def test_paged_experts_give_the_same_bits_on_each_instruction_set(
    checkpoint: Path, resident: Transformer, isa: str
) -> None:
    paged = load_model(checkpoint, dtype=torch.float32, offload=disk(20))
    assert all(torch.equal(a, b) for a, b in zip(logits(paged), logits(resident), strict=True))


@pytest.mark.parametrize(("dtype", "numerics"), [(torch.bfloat16, "exact"), (torch.float32, "official")])
def test_paged_experts_give_the_same_bits_in_plain_torch(checkpoint: Path, dtype: torch.dtype, numerics: Any) -> None:
    ids = torch.randint(2, 300, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_model(checkpoint, dtype=dtype, numerics=numerics, offload=disk(20))(ids)
        theirs = load_model(checkpoint, dtype=dtype, numerics=numerics)(ids)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_the_hosts_kernels_compute_what_the_modules_do(checkpoint: Path, source: str) -> None:
    if native.library() is None:
        pytest.skip("no kernels in this install")
    model = load_model(checkpoint, dtype=torch.float32, offload=disk(9) if source == "disk" else None)
    experts = model.layers[2].ffn.experts
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 128, generator=generator)
    picks = torch.rand(40, EXPERTS, generator=generator).topk(TAKES).indices
    weights = torch.rand(40, TAKES, generator=generator)
    with torch.no_grad():
        away = HostExperts(experts)
        assert away._kernels is not None
        plain = experts(x, picks, weights)
        for rows in (40, 3, 1):
            ours = away(x[:rows], picks[:rows], weights[:rows])
            assert float((ours - plain[:rows]).abs().max()) < 1e-5 * float(plain.abs().max())
        half = away(x.bfloat16(), picks, weights)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - plain).abs().max()) < 0.02 * float(plain.abs().max())


def test_on_another_device_the_host_computes_the_experts() -> None:
    command = [sys.executable, str(HERE / "offload_run.py")]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    run = json.loads(ended.stdout)
    for kind in ("packed", "dense"):
        assert run[f"{kind} host"] == run[f"{kind} cpu"]
        assert run[f"{kind} devices"] == ["npu", "cpu"]
        assert run[f"{kind} left"] == []  # on the card, of the routed experts
    assert run["packed disk"] == run["packed cpu"] and run["packed slots"] < 40
    assert run["packed kernels"] == (native.library() is not None)


# What is kept, and what is read when.


def visit(pages: ExpertPages, layer: int, experts: list[int]) -> None:
    pages.begin(layer, experts)
    given: list[int] = []
    while len(given) < len(experts):
        given += pages.next()
    assert sorted(given) == sorted(experts)
    pages.end()


def of_memory(pages: ExpertPages) -> set[tuple[int, int]]:
    return {divmod(key, EXPERTS) for key in pages._key_of.tolist() if key >= 0}


def test_the_most_used_stay(checkpoint: Path, tmp_path: Path) -> None:
    usage = tmp_path / "uses.json"
    pages = pages_of(load_model(checkpoint, dtype=torch.float32, offload=disk(8, usage)))
    for step in range(12):  # in each layer two hot ones, and one that is seen once: with LRU, all would have gone
        for layer in range(3):
            visit(pages, layer, [5, 6, 8 + step])
    hot = {(layer, e) for layer in range(3) for e in (5, 6)}
    assert hot <= of_memory(pages)
    assert pages.counts.requests == 108 and 54 <= pages.counts.hits <= 66  # the hot ones, but for the first steps
    pages.close()
    again = pages_of(load_model(checkpoint, dtype=torch.float32, offload=disk(7, usage)))
    with again._guard:
        assert again._changed.wait_for(lambda: not again._loads, timeout=60)
    assert hot <= of_memory(again)
    for layer in range(3):
        visit(again, layer, [5, 6])
    assert again.counts.hits == 6
    # Habits change: what was hot goes when it isn't used any more.
    for step in range(400):
        visit(again, 0, [1, 2, 3] if step % 2 else [10, 11, 12])
    assert {(0, e) for e in (1, 2, 3, 10, 11, 12)} <= of_memory(again)


class Gate:
    """Holds reads back until it is opened, and counts how many wait at it together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting, self.most = threading.Event(), 0, 0
        self.lock, read = threading.Lock(), expert_reads.Readers._read

        def held(readers: Any, piece: Any) -> Any:
            with self.lock:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
            assert self.open.wait(60)
            with self.lock:
                self.waiting -= 1
            return read(readers, piece)

        monkeypatch.setattr(expert_reads.Readers, "_read", held)


def test_compute_begins_with_those_in_memory_while_others_are_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = pages_of(load_model(checkpoint, dtype=torch.float32, offload=disk(20)))
    visit(pages, 0, [1, 2])
    gate = Gate(monkeypatch)
    pages.begin(0, [1, 2, 3, 4])
    assert sorted(pages.next()) == [1, 2]
    while gate.most < expert_reads.THREADS:  # the missing ones go out together
        assert not gate.open.wait(0.01)
    gate.open.set()
    given: list[int] = []
    while len(given) < 2:
        given += pages.next()
    assert sorted(given) == [3, 4]
    pages.end()


def test_what_is_needed_goes_before_what_is_expected(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = pages_of(load_model(checkpoint, dtype=torch.float32, offload=disk(20)))
    gate = Gate(monkeypatch)
    pages.expect(1, [0, 1, 2, 3])
    while gate.most < expert_reads.THREADS:  # every reader holds a piece of these, so none can take the next one's
        assert not gate.open.wait(0.01)
    pages.begin(0, [7])
    with pages._guard:
        assert pages._readers._urgent[0].key == 7 and len(pages._readers._later) >= 2
    gate.open.set()
    assert pages.next() == [7]
    pages.begin(1, [2, 9])  # of those expected, what isn't needed and wasn't begun is not read
    given: list[int] = []
    while len(given) < 2:
        given += pages.next()
    pages.end()
    assert pages.counts.needed == 1 and pages.counts.hits == 0


def test_hash_layers_are_fetched_at_once(checkpoint: Path) -> None:
    llm = LLM(checkpoint, dtype=torch.float32, device="cpu", offload="experts=disk", expert_memory=60 * SLOT)
    pages = pages_of(llm.model)
    told: list[tuple[int, list[int], int]] = []
    expect = pages.expect

    def listen(layer: int, experts: Any) -> None:
        told.append((layer, list(experts), pages._last_layer))
        expect(layer, told[-1][1])

    pages.expect = listen  # type: ignore[method-assign]
    llm.generate([{"prompt_token_ids": [17]}], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    table = llm.model.layers[0].ffn.gate.tid2eid
    assert told[0] == (0, sorted(table[17].tolist()), -1)  # before any layer asked


@pytest.mark.parametrize("way", ["kernels", "modules"])
def test_a_learned_layers_choice_is_expected_before_its_attention(checkpoint: Path, way: str) -> None:
    llm = LLM(checkpoint, dtype=torch.float32, device="cpu", offload="experts=disk", expert_memory=60 * SLOT,
              enable_prefix_caching=False)  # fmt: skip
    pages = pages_of(llm.model)
    told: list[int] = []
    expect, begin = pages.expect, pages.begin

    def listen(layer: int, experts: Any) -> None:
        told.append(layer)
        expect(layer, experts)

    def enter(layer: int, experts: Any) -> None:
        told.append(-layer)
        begin(layer, experts)

    pages.expect, pages.begin = listen, enter  # type: ignore[method-assign]
    with path(way):
        llm.generate([{"prompt_token_ids": [17]}], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert [told.index(layer) < told.index(-layer) for layer in range(1, LAYERS)] == [True] * (LAYERS - 1)
    assert pages.counts.expected > 0


# What can go wrong.


def greedy(llm: LLM, start: int = 3) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": [start, 5, 9, 11]}], params)[0].token_ids


def test_a_read_error_fails_the_request_and_nothing_else(checkpoint: Path, resident: Transformer) -> None:
    llm = LLM(checkpoint, dtype=torch.float32, device="cpu", offload="experts=disk", expert_memory=3 * SLOT,
              max_num_seqs=2, enable_prefix_caching=False)  # fmt: skip
    pages = pages_of(llm.model)
    expected = greedy(LLM.from_model(resident))
    shard = checkpoint / "model.safetensors"
    whole = shard.read_bytes()
    for _ in range(3):
        os.truncate(shard, len(whole) // 4)
        try:
            with pytest.raises(EngineError, match=r"tensor layers.\d.ffn.experts.\d+.w1.weight: it is shorter"):
                greedy(llm)
        finally:
            shard.write_bytes(whole)
        stats = llm.engine.stats()
        assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
        with pages._guard:
            assert pages._changed.wait_for(lambda: not pages._loads, timeout=60)
        assert not pages._busy.any()
        assert greedy(llm) == expected
    slots = pages._key_of[pages._key_of >= 0].tolist()
    assert sorted(key for key, slot in enumerate(pages._slot_of) if slot >= 0) == sorted(slots)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--offload", "experts=tape"], "offload is 'experts=tape' (it is experts=host or experts=disk)"),
        (["--offload", "attention=host"], "offload is 'attention=host'"),
        (["--offload", "experts=disk"], "needs expert_memory"),
        (["--expert-memory", "1GiB"], "expert_memory is given without offload"),
        (["--offload", "experts=host", "--expert-memory", "1GiB"], "experts=host keeps all experts in host memory"),
        (["--offload", "experts=disk", "--expert-memory", "lots"], "size 'lots' isn't understood"),
        (["--offload", "experts=disk", "--expert-memory", "0"], "size '0' is nothing"),
        (["--offload", "experts=disk", "--expert-memory", "90KB"],
         "a token takes 3 experts of 32,768 at once (give at least 1MiB)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["run", "x", "--model", str(checkpoint), "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_formats_that_cant_be_paged_are_refused(tmp_path: Path, resident: Transformer) -> None:
    save_checkpoint(resident, tmp_path / "plain", quantize=False)
    with pytest.raises(InputError, match=r"layers.0.ffn.experts.0.w1.weight: experts of F32 can't be paged"):
        load_model(tmp_path / "plain", offload=disk(20))
    save_checkpoint(resident, tmp_path / "stacked", format="transformers")
    with pytest.raises(InputError, match="stacked experts can't be paged"):
        load_model(tmp_path / "stacked", offload=disk(20))


def test_a_record_of_uses_that_cant_be_read_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "uses.json"
    for text, said in (("[]", "isn't a record of experts' uses"), ('{"uses": [[1, 2]]}', "is the record of another")):
        bad.write_text(text)
        with pytest.raises(CheckpointError, match=f"uses.json: {said}"):
            load_model(checkpoint, offload=disk(20, bad))


def test_sizes() -> None:
    sizes = {"4GiB": 4 << 30, "1.5g": 3 << 29, "512 MB": 512 << 20, "4096": 4096, 77: 77, "2 kib": 2048}
    assert {size: parse_size(size) for size in sizes} == sizes  # type: ignore[arg-type]
    assert parse_offload("experts=disk", "1MiB", "u.json") == Offload("disk", 1 << 20, Path("u.json"))
    assert parse_offload("experts=host", None) == Offload("host") and parse_offload(None, None) is None


# Memory.

CHILD = """
import json, resource, sys, torch
from upwell import LLM, SamplingParams
directory, memory, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
torch.set_num_threads(1)
llm = LLM(directory, dtype=torch.float32, device="cpu", offload="experts=disk", expert_memory=memory, max_num_seqs=1,
          cache_tokens=256, enable_prefix_caching=False)
model = llm.model
for token in range(6):
    with torch.no_grad():
        model.layers[0].ffn.gate.bias.zero_()[(6 * token + torch.arange(6)) % 24] = 1  # each takes six others
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    made = len(llm.generate([{"prompt_token_ids": [token]}], params)[0].token_ids)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
told = {name: int(status[key].split()[0]) * 1024 for name, key in (("peak", "VmHWM"), ("data", "VmData"))}
print(json.dumps({**told, "made": made, "slots": model.pages.slots, "misses": model.pages.counts.read_bytes}))
"""


def test_memory_stays_under_the_limit(tmp_path: Path) -> None:
    """A Flash-geometry layer under a limit that its experts alone would break."""
    size = write_random_checkpoint(LAYER, tmp_path / "layer")
    write_random_checkpoint(SMALL, tmp_path / "small")
    experts = 24 * 3 * (2048 * 4096 // 2 + 2048 * 4096 // 32)
    assert experts > 300 << 20
    memory, slack = 90 << 20, (100 if native.library() is not None else 600) << 20  # plain decodes whole matrices

    def run(name: str, given: int, limit: int) -> dict[str, Any]:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CHILD, str(tmp_path / name), str(given), str(limit)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    overhead = run("small", 1 << 20, 0)  # Python, torch, threads
    dense = size - experts
    layer = run("layer", memory, overhead["data"] + dense + memory + slack)
    assert layer["made"] == 2 and layer["slots"] == 7
    assert layer["misses"] > memory
    assert layer["peak"] < overhead["peak"] + dense + memory + slack
    if native.library() is not None:
        assert overhead["peak"] + dense + memory + slack < overhead["peak"] + size - (100 << 20)


# The projection.


def test_the_projection_is_the_sum_of_its_parts() -> None:
    """Against the sizes in the model's description: 13,369,344 bytes an expert, 7.3 billion other parameters."""
    spec = importlib.util.spec_from_file_location("projection", HERE.parent / "benchmarks" / "offload_projection.py")
    assert spec is not None and spec.loader is not None
    projection = importlib.util.module_from_spec(spec)
    sys.modules["projection"] = projection
    spec.loader.exec_module(projection)
    config = ModelConfig.preset("v4-flash").with_mtp(0)
    assert projection.expert_bytes(config) == 13369344
    assert projection.dense_bytes(config) == pytest.approx(2 * (284.332e9 - 277.025e9 - 129280 * 4096), rel=0.01)
    experts, card, copies = 43 * 6 * 13369344, projection.dense_bytes(config) / (1e12 * 0.6), 86 * 30e-6
    host = card + copies + experts / (100e9 * 0.7)
    assert projection.step_seconds(config, 1000, 100, 1) == pytest.approx(host)
    assert projection.step_seconds(config, 1000, 100, 1, 5, 0.8) == pytest.approx(host + experts * 0.2 / 5e9)
    rows = projection.project(config)
    assert all((row["tok_s"] is None) == ("910B2" not in row["card"]) for row in rows)
