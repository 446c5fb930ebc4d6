"""Integer weights in the CPU kernels: single products exactly, whole converted models against the modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conversions import save_official
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import BASE, cut, outputs, random_model
from torch import Tensor, nn

from upwell import load_model
from upwell.checkpoint.convert import Conversion, convert
from upwell.checkpoint.recipes import Target, integer_format
from upwell.formats.int4 import pack_int4, quantize_int4
from upwell.formats.int8 import quantize_int8
from upwell.model import Transformer, compiled
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.model.offload import HostExperts
from upwell.ops import linear, moe, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="none are built here")
LAYOUTS = ["quads", "int8", "int4"]


def products(layout: str, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x times INT8 codes [out, in], which the kernels read in panels, as they lie, or two a byte."""
    if layout == "quads":
        return native.product(x, *native.quads(weight, scale), out_features=len(weight))
    return native.product(x, weight if layout == "int8" else pack_int4(weight), scale)


def random_codes(layout: str, rows: int, cols: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    low = -8 if layout == "int4" else -128
    codes = torch.randint(low, -low, (rows, cols), dtype=torch.int8, generator=generator)
    return codes, torch.rand(rows, generator=generator) * 0.01 + 1e-4


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_products_of_whole_steps_are_exact(isa: str, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    tokens, rows = data.draw(st.integers(1, 280)), data.draw(st.integers(1, 90))
    cols = 2 * data.draw(st.integers(1, 500)) - (layout != "int4")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    codes, scale = random_codes(layout, rows, cols, generator)
    x = torch.randint(-127, 128, (tokens, cols), generator=generator).float()
    x[:, data.draw(st.integers(0, cols - 1))] = 127
    x *= 2.0 ** torch.randint(-30, 30, (tokens, 1), generator=generator)  # so each row's step is a power of two
    assert torch.equal(products(layout, x, codes, scale), linear.int8_linear(x, codes, scale))


@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_inputs_are_rounded_to_the_nearest_step(isa: str, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    tokens, rows, cols = (data.draw(st.integers(1, most)) for most in (280, 90, 200))
    cols += cols % 2
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    codes, scale = random_codes(layout, rows, cols, generator)
    x = torch.randn(tokens, cols, generator=generator)
    x *= 10.0 ** torch.randint(-25, 25, (tokens, 1), generator=generator)
    most = x.abs().amax(1, keepdim=True)
    off = []
    for wide in (x.double(), x):  # one that lies halfway may go either way, as the product by 127 / most was rounded
        steps = (wide * torch.full_like(most, 127).div(most).to(wide.dtype)).round().double()
        got = products(layout, x, codes, scale)
        want = (steps @ codes.double().T) * (most / 127) * scale
        size = (steps.abs() @ codes.double().abs().T) * (most / 127) * scale
        off.append(((got - want).abs() / (size + 1e-44)).amax(1))
    assert (torch.minimum(*off) <= 3e-7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_rows(isa: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(4)
    codes, scale = random_codes(layout, 40, 20_000, generator)
    codes[7], codes[8] = codes.max(), codes.min()  # the largest sums, of either sign
    for tokens in (1, 6, 90):
        x = torch.randint(-127, 128, (tokens, 20_000), generator=generator).float()
        x[0], x[:, 0] = 127, 127
        want = (x.double() @ codes.double().T).float() * scale
        got = products(layout, x, codes, scale * (1 / x.abs().amax() * 127))
        size = (x.double().abs() @ codes.double().abs().T) * scale
        assert torch.equal(got, want) if native.integer_dots() else ((got - want).abs() <= 1e-4 * size).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-45, 1e-38, 3e38])
def test_extremes_are_where_plain_has_them(isa: str, layout: str, value: float) -> None:
    generator = torch.Generator().manual_seed(5)
    codes, scale = random_codes(layout, 40, 70, generator)
    x = torch.randn(9, 70, generator=generator)
    x[4, 33] = value
    x[6] = value
    got, plain = products(layout, x, codes, scale), linear.int8_linear(x, codes, scale)
    assert torch.equal(got.isnan(), plain.isnan())
    finite = plain.isfinite()
    assert torch.allclose(got[finite], plain[finite], rtol=1e-6, atol=1e32 if value == 3e38 else 1e-30)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integers")
    save_official(folder / "official")
    for to in ("w8a8", "w4a8", "w4a16"):
        convert(Conversion(folder / "official", folder / to, to))
    return folder


@pytest.mark.parametrize("cached", [0, 8 << 20])  # layers cut by weights, and by tokens
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sizes", [[300], [7, 1, 100, 33]])
@pytest.mark.parametrize("to", ["w8a8", "w4a8", "w4a16"])
@torch.no_grad()
def test_converted_models_equal_the_modules(
    isa: str, converted: Path, to: Target, sizes: list[int], packed: bool, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_CACHED_BYTES", cached)
    if not packed:
        monkeypatch.setattr(compiled, "_PACKED_INTEGERS", -1)
    model = load_model(converted / to, dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 300), generator=torch.Generator().manual_seed(2))
    cuts = cut(300, sizes)
    ours = outputs(model, ids, cuts)[0]
    served = compiled.plan(model) is not None
    assert served == (packed or to != "w4a16")  # groups are decoded, which is for small models
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "plan", lambda model, step=None, heads=False: None)
        plain = outputs(model, ids, cuts)[0]
        for module in (linear, moe):
            patch.setattr(module, "round_to_int8", lambda x: (x, torch.ones(1)))
        unrounded = outputs(model, ids, cuts)[0]
    scale = plain.abs().max()
    off, without = ((x - plain).abs().amax(-1) / scale for x in (ours, unrounded))
    if to == "w4a16" or not served:
        assert (off <= 1e-5).float().mean() >= 0.99 and (without == 0).all()
    else:  # an input that lies halfway between two steps may go the other way, and is read on
        assert (off[:, :4] <= 1e-5).float().mean() >= 0.5 and off.quantile(0.9) <= 0.3 * without.quantile(0.9)


def in_integers(model: Transformer) -> Transformer:
    """A model whose wide projections and experts are W8A8."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            w13, module.w13_scale = quantize_int8(module.w13)
            w2, module.w2_scale = quantize_int8(module.w2)
            module.w13, module.w2 = nn.Parameter(w13, False), nn.Parameter(w2, False)
        elif isinstance(module, Linear) and integer_format(f"{path}.weight", "w8a8", "upwell") is not None:
            codes, module.scale = quantize_int8(module.weight)
            module.weight = nn.Parameter(codes, False)
    return model


@pytest.mark.parametrize("sizes", [{"hc_mult": 1, "moe_intermediate_size": 512}, {"hc_mult": 2, "q_lora_rank": 200}])
@torch.no_grad()
def test_experts_wider_than_the_streams(isa: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_integers(random_model(dataclasses.replace(BASE, **sizes), 1, 0.1))
    ids = torch.randint(0, 64, (2, 60))
    ours = outputs(model, ids, [60])[0]
    plan = compiled.plan(model)
    assert plan is not None and plan.model.by_tokens
    monkeypatch.setattr(compiled, "plan", lambda model, step=None, heads=False: None)
    plain = outputs(model, ids, [60])[0]
    assert float((ours - plain).abs().amax(-1).median()) <= 1e-4 * float(plain.abs().max())


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_row", [True, False])
@torch.no_grad()
def test_a_scales_shape_says_what_it_is_of(
    isa: str, converted: Path, by_row: bool, scales: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(converted / ("w4a8" if by_row else "w4a16"), dtype=torch.float32)
    for block in model.layers:
        experts = block.ffn.experts
        experts.w13_scale, experts.w2_scale = experts.w13_scale.to(scales), experts.w2_scale.to(scales)
    x, picks = torch.randn(9, 64), torch.rand(9, 6).topk(2).indices
    experts, weights = model.layers[2].ffn.experts, torch.rand(9, 2)
    away = HostExperts(experts)
    assert (away._kernels is not None) == by_row and (not by_row or away._kept)
    plain, ours = experts(x, picks, weights), away(x, picks, weights)
    assert float((ours - plain).abs().quantile(0.95)) < 1e-5 * float(plain.abs().max())
    ids = torch.randint(0, 300, (1, 40))
    ours = outputs(model, ids, [40])[0]
    assert compiled.plan(model) is not None
    monkeypatch.setattr(compiled, "plan", lambda model, step=None, heads=False: None)
    plain = outputs(model, ids, [40])[0]
    assert float((ours - plain).abs().amax(-1).median()) <= 1e-4 * float(plain.abs().max())


@torch.no_grad()
def test_an_expert_with_more_rows_than_are_laid_out_at_once(isa: str, converted: Path) -> None:
    experts = load_model(converted / "w8a8", dtype=torch.float32).layers[2].ffn.experts
    x, picks = torch.randn(700, 64), torch.tensor([[0, 3]]).repeat(700, 1)
    picks[600:, 1] = 5
    weights = torch.rand(700, 2)
    ours, plain = HostExperts(experts)(x, picks, weights), experts(x, picks, weights)
    assert float((ours - plain).abs().quantile(0.95)) < 1e-5 * float(plain.abs().max())


@pytest.mark.parametrize("to", ["w8a8", "w4a8", "w4a16"])
@torch.no_grad()
def test_the_hosts_kernels_compute_integer_experts(isa: str, converted: Path, to: Target) -> None:
    experts = load_model(converted / to, dtype=torch.float32).layers[2].ffn.experts
    generator = torch.Generator().manual_seed(2)
    x, picks = torch.randn(40, 64, generator=generator), torch.rand(40, 6, generator=generator).topk(2).indices
    weights = torch.rand(40, 2, generator=generator)
    away = HostExperts(experts)
    assert (away._kernels is not None) == (to != "w4a16")
    plain = experts(x, picks, weights)
    for rows in (40, 3, 1):
        ours = away(x[:rows], picks[:rows], weights[:rows])
        assert float((ours - plain[:rows]).abs().quantile(0.95)) < 1e-5 * float(plain.abs().max())


@torch.no_grad()
def test_rows_too_long_for_32_bits_take_the_modules(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MOST_COLUMNS", 63)
    model = load_model(converted / "w8a8", dtype=torch.float32)
    assert compiled.plan(model) is None and HostExperts(model.layers[2].ffn.experts)._kernels is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_codes_range_is_read_whole(isa: str, layout: str) -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8) if layout == "int4" else torch.arange(-128, 128, dtype=torch.int8)
    weight, scale = codes.repeat(2, 1), torch.tensor([1.0, 0.5])
    got = products(layout, torch.eye(codes.numel()), weight, scale)
    assert torch.allclose(got, codes.float().unsqueeze(1) * scale, rtol=1e-6)


def test_int4_of_a_tensor_is_what_it_packs(isa: str) -> None:
    weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(3))
    packed, scale = quantize_int4(weight)
    x = torch.full((2, 96), 127.0)
    assert torch.allclose(native.product(x, packed, scale), linear.linear(x, packed, scale), rtol=1e-6, atol=1e-4)
