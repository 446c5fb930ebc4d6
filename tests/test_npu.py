"""Ascend without a card: the test device, the operator audit, fused operators by their pages' formulas, imports."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import npu_reference
import pytest
import torch

from upwell.cli import main
from upwell.devices import npu, resolve_device
from upwell.devices.npu import chip
from upwell.devices.operators import audit, facts
from upwell.errors import DeviceError
from upwell.formats.fp8 import round_to_fp8
from upwell.formats.int4 import dequantize_int4, quantize_int4
from upwell.ops import attention, hyper_connections, indexer, linear, moe, norm, rope
from upwell.ops.npu import PRODUCTS, Fused

HERE = Path(__file__).parent
A2 = chip("Ascend910B1")
PLAIN_ENV = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}


# The test device: one process runs a small V4 on it and on the CPU (npu_run.py), and the tests read what it found.


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    command = [sys.executable, str(HERE / "npu_run.py")]
    ended = subprocess.run(command, capture_output=True, text=True, env=PLAIN_ENV)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


def test_tokens_equal_the_cpus(run: dict[str, Any]) -> None:
    assert run["card"] == run["host"]
    assert [len(tokens) for tokens in run["card"][0]] == [4, 4, 4]
    assert run["drafted"] == run["host"][0]
    assert run["draft_error"] < 1e-3


def test_mixed_devices_raise(run: dict[str, Any]) -> None:
    assert "two devices, npu:0 and cpu" in run["mixed"]


def test_auto_finds_the_npu(run: dict[str, Any]) -> None:
    assert run["auto"] == run["named"] == "npu:0"


def waits(by_place: dict[str, int]) -> dict[str, int]:
    """By file, without the prefix cache's, which copies to the host when a prompt is done."""
    out: dict[str, int] = {}
    for place, count in by_place.items():
        file = place.split(":")[0]
        if file not in ("engine/prefix.py", "model/snapshot.py"):
            out[file] = out.get(file, 0) + count
    return out


def test_a_step_waits_once_for_its_tokens(run: dict[str, Any]) -> None:
    # Four steps: a prefill, which also learns how many tokens each expert has (two waits a layer, but none in the last,
    # where one token goes on), and three decodes.
    assert waits(run["waits"]) == {"engine/sampler.py": 4, "ops/moe.py": 4}


def test_the_captured_step_waits_never_and_replays_right(run: dict[str, Any]) -> None:
    # A wait during capture raises on the test device; a replay only sees what lies in the graph's own buffers.
    assert run["captured"] == run["host"][0]
    assert run["replays"] == [3]
    # In graphs.py it waits before the capture, not in it.
    assert waits(run["captured_waits"]).keys() == {"engine/sampler.py", "ops/moe.py", "engine/graphs.py"}


def test_a_chip_without_fp8_gets_decoded_weights(run: dict[str, Any]) -> None:
    assert run["decoded_error"] == 0.0


# The operator audit.


@pytest.fixture(scope="module")
def used(run: dict[str, Any]) -> list[tuple[str, frozenset[str]]]:
    return [(name, frozenset(dtypes)) for name, dtypes in run["used"]]


@pytest.mark.parametrize("soc", ["Ascend910B1", "Ascend910_9382", "Ascend950PR_9599"])
def test_every_operator_is_the_npus_own(used: list[tuple[str, frozenset[str]]], soc: str) -> None:
    assert len(used) > 100
    failures = [finding for finding in audit(used, chip(soc)) if finding.fails]
    assert not failures


def test_undocumented_dtypes_are_the_known_ones(used: list[tuple[str, frozenset[str]]]) -> None:
    listed = json.loads((HERE / "npu_undocumented.json").read_text(encoding="utf-8"))
    found = sorted({f"{f.operator}: {f.problem}" for f in audit(used, A2) if not f.fails})
    assert found == listed, "update tests/npu_undocumented.json and docs/ascend.md after a look at each"


def test_the_audit_finds_what_it_is_for() -> None:
    fallback = next(name for name, status in facts()["aten"].items() if status == "cpu_fallback")
    float32 = frozenset({"float32"})
    assert [f.problem for f in audit([(f"aten::{fallback}", float32)], A2) if f.fails] == [
        "no kernel on the NPU: it would run on the host"
    ]
    assert [f.problem for f in audit([("aten::no_such_thing", float32)], A2) if f.fails]
    assert [f.problem for f in audit([("aten::cumsum", frozenset({"float64"}))], A2) if f.fails] == ["float64"]
    cast = ("aten::_to_copy", frozenset({"float8_e4m3fn", "bfloat16"}))
    assert [f for f in audit([cast], A2) if f.fails]
    assert not [f for f in audit([cast], chip("Ascend950PR_9599")) if f.fails]


def test_chips_by_soc_name() -> None:
    families = [chip(soc).family for soc in ("Ascend910B4", "Ascend910_9391", "Ascend950DT_95A1", "Ascend310P3", "x")]
    assert families == ["a2", "a3", "950", "310p", "unknown"]
    assert not A2.fp8 and A2.bf16 and chip("Ascend950PR_9589").fp8 and not chip("Ascend310P3").bf16


# Fused operators: what upwell gives to them, computed by the formulas of their pages, is what the plain path computes.


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(ours: torch.Tensor | None, plain: torch.Tensor, tolerance: float) -> None:
    assert ours is not None and ours.dtype == plain.dtype and ours.shape == plain.shape
    assert float((ours.float() - plain.float()).abs().max()) <= tolerance * float(plain.float().abs().max())


@pytest.fixture(params=["Ascend910B1", "Ascend910_9382"])
def fused(request: pytest.FixtureRequest) -> Fused:
    return Fused(chip(request.param), npu_reference.operators())


def test_rms_norm(fused: Fused) -> None:
    x, weight = random(3, 5, 48, dtype=torch.bfloat16), random(48)
    close(fused.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6), 0.01)
    close(fused.rms_norm(x.float(), None, 1e-6), norm.rms_norm(x.float(), None, 1e-6), 1e-6)


def test_rope(fused: Fused) -> None:
    cos, sin = rope.rope_angles(torch.arange(7) * 50, torch.tensor([1.0, 0.3, 0.01, 0.001]))
    for x, c, s in (
        (random(2, 7, 3, 20), cos.unsqueeze(-2), sin.unsqueeze(-2)),  # queries: a head axis
        (random(2, 7, 20), cos, sin),  # latents of two sequences at the same positions
        (random(2, 7, 20), cos.expand(2, -1, -1), sin.expand(2, -1, -1)),
    ):
        for inverse in (False, True):
            close(fused.apply_rope(x, c, s, inverse), rope.apply_rope(x, c, s, inverse), 1e-6)


def test_grouped_experts(fused: Fused) -> None:
    x, w13, w2 = random(9, 16), random(6, 24, 16), random(6, 16, 12)
    experts, weights = torch.stack([torch.randperm(5)[:3] for _ in range(9)]), random(9, 3).abs()
    plain = moe.grouped_experts(x, experts, weights, w13, w2, 1.5)
    close(fused.grouped_experts(x, experts, weights, w13, w2, 1.5), plain, 1e-5)
    close(moe.gathered_experts(x, experts, weights, w13, w2, 1.5), plain, 1e-5)


def test_int8_experts(fused: Fused) -> None:
    x, scales = random(9, 32, dtype=torch.bfloat16), [random(6, n).abs() / 900 for n in (24, 32)]
    w13, w2 = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((6, 24, 32), (6, 32, 12)))
    experts, weights = torch.stack([torch.randperm(5)[:3] for _ in range(9)]), random(9, 3).abs()
    plain = moe.integer_experts(x, experts, weights, w13, scales[0], w2, scales[1], 1.5)
    close(fused.integer_experts(x, experts, weights, w13, scales[0], w2, scales[1], 1.5), plain, 0.02)
    close(moe.gathered_experts(x, experts, weights, w13, w2, 1.5, *scales), plain, 0.01)
    dense = moe.grouped_experts(
        x.float(), experts, weights, w13.float() * scales[0][..., None], w2.float() * scales[1][..., None], 1.5
    )
    close(plain.float(), dense, 0.03)


@pytest.mark.parametrize("group", [None, 8])
def test_int4_experts_and_linear(fused: Fused, group: int | None) -> None:
    """Packed INT4, by experts and gathered by pairs, against the decoded weights; W4A8's activations round too."""
    x = random(9, 32, dtype=torch.bfloat16)
    made = [[quantize_int4(random(n, k, seed=e) / 9, group) for e in range(6)] for n, k in ((32, 32), (32, 16))]
    (w13, s13), (w2, s2) = [[torch.stack([m[i] for m in of]) for i in range(2)] for of in made]
    experts, weights = torch.stack([torch.randperm(5)[:3] for _ in range(9)]), random(9, 3).abs()
    plain = moe.integer_experts(x, experts, weights, w13, s13, w2, s2, 1.5)
    close(moe.gathered_experts(x, experts, weights, w13, w2, 1.5, s13, s2), plain, 0.01)
    ours = fused.integer_experts(x, experts, weights, w13, s13, w2, s2, 1.5)
    if group is None:
        assert ours is None  # no page has INT4 weights beside INT8 rows
    else:
        close(ours, plain, 0.02)
    dense13, dense2 = [torch.stack([dequantize_int4(*m) for m in of]) for of in made]
    close(plain.float(), moe.grouped_experts(x.float(), experts, weights, dense13, dense2, 1.5), 0.03)
    exact = torch.nn.functional.linear(x.float(), dense13[0])
    close(linear.linear(x, *made[0][0]).float(), exact, 0.03)


def test_int8_linear(fused: Fused) -> None:
    x, weight = random(2, 5, 64, dtype=torch.bfloat16), torch.randint(-127, 128, (40, 64), dtype=torch.int8)
    scale = random(40).abs() / 127
    plain = linear.int8_linear(x, weight, scale)
    close(fused.quantized_linear(x, weight, scale), plain, 0.01)
    close(plain, torch.nn.functional.linear(x.float(), weight.float() * scale[:, None]).bfloat16(), 0.02)


@pytest.mark.parametrize("tokens", [1, 7])
def test_streams_on_the_950(tokens: int) -> None:
    a5 = Fused(chip("Ascend950PR_9599"), npu_reference.operators())
    x, fn, y = random(tokens, 4, 48, dtype=torch.bfloat16), random(24, 192), random(tokens, 48, dtype=torch.bfloat16)
    base, scale = random(24), random(3)
    entered, plain = (f(x, fn, base, scale, 20, 1e-6, 1e-6) for f in (a5.enter_streams, hyper_connections.enter))
    assert entered is not None
    for ours, theirs in zip(entered, plain, strict=True):
        close(ours, theirs, 0.01)
    assert float((plain[2] - plain[2].transpose(1, 2)).abs().max()) > 0.05  # which index is summed matters
    close(a5.expand_streams(x, y, *plain[1:]), hyper_connections.expand(x, y, *plain[1:]), 0.01)
    assert a5.enter_streams(x.float(), fn, base, scale, 20, 1e-6, 1e-6) is None
    assert Fused(A2, npu_reference.operators()).enter_streams(x, fn, base, scale, 20, 1e-6, 1e-6) is None


def test_attention_step_carries_the_sink(fused: Fused) -> None:
    q, keys, sink = random(3, 4, 512, dtype=torch.bfloat16), random(3, 11, 512, dtype=torch.bfloat16), random(4)
    valid = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.7
    close(fused.attend_step(q, keys, valid, sink), attention.attend_step(q, keys, valid, sink), 0.01)
    without = attention.attend_step(q, keys, valid, torch.full((4,), -1e9))
    assert float((without.float() - attention.attend_step(q, keys, valid, sink).float()).abs().max()) > 0.02


def test_index_step_reads_the_paged_keys(fused: Fused) -> None:
    pool, queries = random(6, 64, 128, dtype=torch.bfloat16), random(2, 1, 8, 128, dtype=torch.bfloat16)
    weights, tables = random(2, 1, 8) / 30, torch.tensor([[4, 1, 0], [2, 5, 3]])
    rows = (tables.unsqueeze(-1) * 64 + torch.arange(64)).flatten(1)
    for visible in (torch.tensor([130, 192]), torch.tensor([5, 100])):
        ours = fused.index_step(queries, weights, pool, tables, visible, 16)
        plain = indexer.select_step(queries, weights, pool, tables, rows, visible, 16)
        assert ours is not None
        assert [set(row.tolist()) for row in ours] == [set(row.tolist()) for row in plain]


def test_what_a_page_does_not_cover_takes_the_plain_path(fused: Fused) -> None:
    assert fused.attend_step(random(1, 4, 48), random(1, 5, 48), torch.ones(1, 5) > 0, random(4)) is None
    assert Fused(chip("Ascend950PR_9599"), None).rms_norm(random(2, 8), random(8), 1e-6) is None
    unknown = Fused(chip("Ascend999"), None)
    assert not unknown.has


@pytest.mark.parametrize("version", sorted(facts()["npu"]))
def test_every_call_binds_to_the_wheels_schema(version: str) -> None:
    source = HERE.parent / "upwell" / "ops" / "npu.py"
    calls = [
        node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("npu_")
    ]  # fmt: skip
    assert {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)} == set(PRODUCTS)
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        arguments = torch._C.parse_schema(f"npu::{facts()['npu'][version][call.func.attr]}").arguments
        positional = [a for a in arguments if not a.kwarg_only]
        given = {keyword.arg for keyword in call.keywords}
        assert len(call.args) <= len(positional)
        assert given <= {a.name for a in arguments[len(call.args) :]}, f"{call.func.attr} of {version}"
        missing = {a.name for a in arguments[len(call.args) :] if not a.has_default_value()} - given
        assert not missing, f"{call.func.attr} of {version} wants {missing}"


def test_round_to_fp8_is_torchs_cast() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    between = (codes[:, None] * torch.tensor([1.0, 1.03125, 1.0625, 0.97])).flatten().clamp(-448, 448)
    tiny = torch.tensor([0.0, 2**-10, 2**-9, 3 * 2**-10, 2**-6, -(2**-7), 447.9, 2**-20])
    x = torch.cat((between, tiny))
    assert torch.equal(round_to_fp8(x), x.to(torch.float8_e4m3fn).float())


# Imports: nothing touches torch_npu but --device npu, and a broken one is said in one line.

BROKEN = 'raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")'


def install_torch_npu(folder: Path, body: str, version: str | None = None) -> dict[str, str]:
    """An environment where a package torch_npu is installed that torch would load by itself, as the real one."""
    release = version or str(torch.__version__).split("+")[0]
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(body)
    info = folder / f"torch_npu-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {release}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {**PLAIN_ENV, "PYTHONPATH": f"{folder}:{PLAIN_ENV['PYTHONPATH']}"}


def upwell(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "upwell.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_without_torch_npu_one_line_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    if npu.installed_version() is not None:
        pytest.skip("this environment has torch_npu")
    assert main(["run", "x", "--device", "npu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torch_npu isn't installed" in error
    assert "pip install 'upwell[npu]'" in error and "torch_npu 2.12.0 and CANN 9.1.0" in error
    with pytest.raises(DeviceError, match="torch_npu isn't installed"):
        resolve_device("npu:3")
    assert resolve_device("auto").type in ("cpu", "cuda")


def test_torch_npu_without_cann(tmp_path: Path) -> None:
    environment = install_torch_npu(tmp_path, BROKEN)
    wanted = upwell(environment, "run", "x", "--device", "npu", "--max-tokens", "1")
    assert wanted.returncode == 2 and wanted.stderr.count("\n") == 1, wanted.stderr
    assert "libhccl.so" in wanted.stderr and "set_env.sh" in wanted.stderr and "CANN 9.1.0" in wanted.stderr
    python = "import upwell\ntry: upwell.LLM\nexcept upwell.errors.DeviceError as e: print(e)"
    entry = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, env=environment)
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in entry.stdout and entry.stdout.count("\n") == 1, entry.stderr


def test_the_cpu_never_imports_torch_npu(tmp_path: Path) -> None:
    environment = install_torch_npu(tmp_path, "raise SystemExit('torch_npu was imported')")
    ended = upwell(environment, "run", "x", "--device", "cpu", "--max-tokens", "1")
    assert ended.returncode == 0, ended.stderr


def test_a_torch_npu_for_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "installed_version", lambda: "2.7.1.post8")
    monkeypatch.setattr(torch, "__version__", "2.12.0+cpu")
    with pytest.raises(DeviceError, match=r"2\.7\.1\.post8 was built for torch 2\.7\.1, and this is torch 2\.12\.0"):
        resolve_device("npu")
