"""Products from packed weights equal the plain operation: random shapes, odd sizes, extremes, every instruction set."""

from __future__ import annotations

import platform

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from upwell.formats.fp8 import scale_shape
from upwell.ops import native
from upwell.ops.linear import dense_weight, linear

KINDS = ("bf16", "fp8", "fp4")


def product(x: Tensor, weight: Tensor, scale: Tensor | None, rounds: bool = False) -> Tensor:
    return linear(x, weight, scale) if native.library() is None else native.product(x, weight, scale, rounds=rounds)


def random_weight(
    kind: str, rows: int, cols: int, seed: int, exponents: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """All codes but NaN's, scales 2^exponents."""
    generator = torch.Generator().manual_seed(seed)

    def codes(shape: tuple[int, ...], low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    low, high = 127 + exponents[0], 128 + exponents[1]
    if kind == "bf16":
        return torch.randn(rows, cols, generator=generator).bfloat16(), None
    if kind == "fp8":
        raw = codes((rows, cols))
        raw[(raw & 127) == 127] ^= 1
        return raw.view(torch.float8_e4m3fn), codes(scale_shape(rows, cols), low, high)
    return codes((rows, cols // 2)), codes((rows, cols // 32), low, high)


def drawn_weight(data: st.DataObject, most: int, lows: list[int]) -> tuple[Tensor, Tensor | None, int, int]:
    """A weight of any kind, its scales from 2^ one of `lows` on; its columns, up to `most`, and its seed."""
    kind, cols = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1, most))
    if kind == "fp4":
        cols = -(-cols // 32) * 32
    rows, seed, low = data.draw(st.integers(1, 150)), data.draw(st.integers(0, 999)), data.draw(st.sampled_from(lows))
    return *random_weight(kind, rows, cols, seed, (low, low + 4)), cols, seed


def assert_close(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Within FP32's rounding of the sum's terms; the reference is the plain decode, multiplied in double precision."""
    dense = dense_weight(weight, scale, torch.float32).double()
    exact, size = x.double() @ dense.T, x.double().abs() @ dense.T.abs()
    off = (product(x, weight, scale).double() - exact).abs()
    assert (off <= 2e-6 * size + 1e-43).all(), float((off / size).max())


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_shapes_equal_plain(isa: str, data: st.DataObject) -> None:
    weight, scale, cols, seed = drawn_weight(data, 700, [-3, -40, -127, 20])
    tokens = data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator) * 2.0 ** data.draw(st.sampled_from([0, -130, -60, 60]))
    # Rows and columns of very different sizes: no scaling may let the small ones drown.
    x *= 2.0 ** torch.randint(-6, 6, (tokens, 1), generator=generator)
    assert_close(x, weight, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_nano_and_flash_shapes_equal_plain(isa: str, kind: str) -> None:
    for rows, cols, tokens in ((64, 4096, 1), (96, 2048, 3), (33, 1024, 8), (160, 256, 5), (80, 320, 64)):
        weight, scale = random_weight(kind, rows, cols, rows, (-9, -7))
        assert_close(torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)), weight, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-45, 1e-40, 0.0, -0.0])
def test_extremes_are_where_plain_has_them(isa: str, kind: str, value: float) -> None:
    weight, scale = random_weight(kind, 40, 160, 7, (-12, -8))
    for tokens in (1, 2, 8, 19):
        x = torch.randn(tokens, 160, generator=torch.Generator().manual_seed(2))
        x[-1, 77] = value
        got, plain = product(x, weight, scale), linear(x, weight, scale)
        assert torch.equal(got.isnan(), plain.isnan()) and torch.equal(got.isinf(), plain.isinf())
        # Beside a huge input, small ones may drown even where the huge one's weight is 0: FP4's products by bytes round
        # an input to 2^-22 of the largest in its group; FP8's fall below FP32's range from 2^-80 of a row's largest on.
        share = {"bf16": 0.0, "fp8": 2.0**-80, "fp4": 32 * 2.0**-22}[kind]
        largest = x.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
        drowned = share * largest * dense_weight(weight, scale, x.dtype).abs().max()
        finite = plain.isfinite()
        assert ((got - plain).abs() <= 1e-4 * (1 + plain.abs()) + drowned)[finite].all()
        only = torch.full_like(x, value if abs(value) < 1 else 0.0)  # nothing but zeros or subnormals
        assert_close(only, weight, scale)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 8, 30, 90, 300])
def test_nan_weights_and_scales_reach_only_their_rows(isa: str, tokens: int, rounds: bool) -> None:
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(3))
    weight, scale = random_weight("fp8", 200, 256, 4, (-8, -6))
    assert scale is not None
    weight.view(torch.uint8)[17, 33] = 0xFF
    scale[1, 0] = 255  # rows 128 .. 199
    nan = product(x, weight, scale, rounds).isnan()
    expected = torch.zeros(200, dtype=torch.bool)
    expected[17] = expected[128:] = True
    assert torch.equal(nan, expected.expand(tokens, -1))
    weight, scale = random_weight("fp4", 50, 256, 5, (-8, -6))
    assert scale is not None
    scale[9, 3] = 255
    nan = product(x, weight, scale, rounds).isnan()
    assert torch.equal(nan, (torch.arange(50) == 9).expand(tokens, -1))


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 20, 90])  # in registers, and from the cache
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_every_code_has_its_value(isa: str, kind: str, tokens: int, rounds: bool) -> None:
    """Each code alone in a row, times one: the product is the code's value, exactly."""
    if kind == "fp8":
        weight = torch.zeros(256, 128, dtype=torch.uint8)
        weight[torch.arange(256), torch.arange(256) % 128] = torch.arange(256, dtype=torch.uint8)
        weight, scale = weight.view(torch.float8_e4m3fn), torch.full((2, 1), 127, dtype=torch.uint8)
        sizes = [(8 + c % 8) * 2.0 ** (c // 8 - 10) if c >= 8 else c * 2.0**-9 for c in range(127)] + [float("nan")]
    else:
        weight = torch.zeros(16, 64, dtype=torch.uint8)
        for code in range(16):
            weight[code, 3 * code] = code << (code % 2 * 4)
        scale = torch.full((16, 4), 127, dtype=torch.uint8)
        sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.tensor(sizes + [-s for s in sizes])
    got = product(torch.ones(tokens, 128), weight, scale, rounds)
    assert torch.equal(got.nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9).expand(tokens, -1))


def test_a_set_that_the_cpu_lacks_is_refused_and_changes_nothing() -> None:
    foreign = ("dotprod", "bf16") if platform.machine() == "x86_64" else ("avx2", "avx512bf16")
    before = native.describe()
    for name in (*foreign, "mmx"):
        assert not native.set_isa(name)
        assert native.describe() == before


def test_every_set_but_the_baseline_multiplies_fp4_by_bytes(isa: str) -> None:
    """g++ defines no __AVX2__ after `#pragma GCC target`: once, code that asked for it was never compiled."""
    if (library := native.library()) is not None:
        running = library.upwell_isa().decode()
        assert library.upwell_byte_dots() == (running != "baseline")
