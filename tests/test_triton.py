"""The Triton kernels' part of the Ascend path that needs no Triton: who picks them, what happens where one fails, and
what the CPU never imports. Their numbers and their lowering: `make npu-triton`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import npu_reference
import pytest
import torch

from upwell.devices.npu import chip
from upwell.ops import attention, compress, hyper_connections, moe, npu
from upwell.ops.npu import Fused
from upwell.ops.triton import Kernels, split_columns
from upwell.ops.triton.tiles import MEMORY, VECTOR_CORES, Tiles, sized, tiles_of

HERE = Path(__file__).parent
FOLDER = HERE.parent / "upwell" / "ops" / "triton"


class Recorder:
    """Stands for the kernels: says which were asked, and answers with a tensor that no plain operation gives."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> Any:
            self.asked.append(name)
            return ("entered",) if name == "enter" else torch.full((2, 1, 3), 7.0)

        return answer


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every tensor one of an NPU of the given SoC, with recorded kernels."""

    def use(soc: str) -> Recorder:
        recorder = Recorder()
        fused = Fused(chip(soc), npu_reference.operators(), recorder)  # type: ignore[arg-type]
        monkeypatch.setattr(npu, "fused", lambda x: fused)
        return recorder

    return use


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9382", "Ascend950DT_9591"])
def test_operations_ask_for_their_kernels(on: Any, soc: str) -> None:
    recorder = on(soc)
    x, y = torch.zeros(2, 4, 16, dtype=torch.bfloat16), torch.zeros(2, 16, dtype=torch.bfloat16)
    fn, base, scale = torch.zeros(24, 64), torch.zeros(24), torch.zeros(3)
    hyper_connections.enter(x, fn, base, scale, 20, 1e-6, 1e-6)
    hyper_connections.expand(x, y, torch.zeros(2, 4), torch.zeros(2, 4, 4))
    # The 950 has operators of its own for mHC.
    assert recorder.asked == ([] if soc.startswith("Ascend950") else ["enter", "expand"])
    recorder.asked.clear()
    ring, at = torch.zeros(3, 8, 6), torch.tensor([0, 1])
    assert compress.pool(ring[:2], ring[:2], None, None, 4, 3).eq(7).all()
    assert compress.pool_ring(ring, ring, at, at, 4, 3).eq(7).all()
    rows, window = torch.zeros(2, 5, dtype=torch.long), torch.zeros(3, 8, 3)
    assert attention.attend_cached(torch.zeros(2, 1, 3), window, at, at, window[0], rows, torch.zeros(1)).eq(7).all()
    packed = torch.zeros(4, 3, 2, dtype=torch.uint8)
    assert moe._of_pairs(torch.zeros(2, 1, 4), packed, torch.zeros(4, 3), at).eq(7).all()
    assert recorder.asked == ["pool", "pool_ring", "attend_cached", "int4_products"]


def test_int4_operands_are_in_the_order_of_the_input(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from upwell.formats.int4 import quantize_int4, unpack_int4
    from upwell.ops.linear import integer_linear

    weight, x = torch.randn(24, 64), torch.randn(3, 64).bfloat16()
    plain = []
    for group in (None, 32):
        packed, scale = quantize_int4(weight, group)
        plain.append((packed, scale, integer_linear(x, packed, scale)))
    recorder = on("Ascend910B1")

    def decode(packed: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        codes = split_columns(unpack_int4(packed))
        if scale is None:
            return codes
        return (codes * split_columns(scale.repeat_interleave(32, dim=1))).to(dtype)

    recorder.int4_decode = decode  # type: ignore[attr-defined]
    for packed, scale, expected in plain:
        ours = integer_linear(x, packed, scale)
        assert float((ours.float() - expected.float()).abs().max()) < 0.02 * float(expected.float().abs().max())


def test_a_kernel_that_fails_is_left_alone_with_one_warning() -> None:
    kernels = Kernels.__new__(Kernels)
    calls = []

    def broken(*arguments: Any) -> None:
        calls.append(1)
        raise RuntimeError("bishengir-compile: ub overflow\nmore lines")

    kernels.tiles, kernels._off = Tiles(48), set()
    kernels._compress = SimpleNamespace(pool_ring=broken, pool=lambda *a: torch.ones(1))  # type: ignore[assignment]
    x = torch.zeros(1)
    with pytest.warns(UserWarning, match=r"pooling of rings can't be used.*: bishengir-compile: ub overflow$"):
        assert kernels.pool_ring(x, x, x, x, 4, 1) is None
    assert kernels.pool_ring(x, x, x, x, 4, 1) is None and len(calls) == 1
    assert kernels.pool(x, x, None, None, 4, 1) is not None  # the others go on


def test_the_rings_window_is_the_tokens_window() -> None:
    # pool_ring against pool over the tokens in order, from the first window on.
    generator = torch.Generator().manual_seed(2)
    for ratio, overlap in ((4, True), (8, False)):
        dim = 6
        kv, gate = (torch.randn(1, 5 * ratio, dim * (1 + overlap), generator=generator) for _ in range(2))
        entries = compress.pool(kv, gate, None, None, ratio, dim)[0]
        ring = ratio * (1 + overlap)
        rings = torch.zeros(2, 3, ring, kv.shape[2])
        for position in range(kv.shape[1]):
            rings[0, 2, position % ring], rings[1, 2, position % ring] = kv[0, position], gate[0, position]
            if position % ratio == ratio - 1:
                entry = compress.pool_ring(rings[0], rings[1], torch.tensor([2]), torch.tensor([position]), ratio, dim)
                assert torch.allclose(entry[0], entries[position // ratio], atol=1e-6)


def test_tiles() -> None:
    specs = json.loads((HERE / "chip_specs.json").read_text(encoding="utf-8"))
    assert {soc: spec["VECTOR_CORE_COUNT"] for soc, spec in specs.items()} == VECTOR_CORES
    for soc, spec in specs.items():
        memory = MEMORY[chip(soc).family]
        assert [8 * memory.ub, 8 * memory.l1, 8 * memory.l0c] == [spec[n] for n in ("UB_SIZE", "L1_SIZE", "L0C_SIZE")]
    assert tiles_of(chip("Ascend310P3")) is None
    assert tiles_of(chip("Ascend910B3")) == Tiles(cores=40)
    assert sized((256, 2048), 4096, 1, 48) == 256 and sized((256, 2048), 4096, 64, 48) == 2048


def test_nothing_imports_triton_until_an_npu_does(tmp_path: Path) -> None:
    for name in ("__init__.py", "tiles.py"):
        nodes = ast.walk(ast.parse((FOLDER / name).read_text(encoding="utf-8")))
        imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert "triton" not in imported
    code = "import sys; from upwell.cli import main; status = main('run x --device cpu --max-tokens 1'.split())"
    code += "; print(sorted(m for m in sys.modules if m.startswith('upwell.ops.triton.'))); sys.exit(status)"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "['upwell.ops.triton.tiles']"
