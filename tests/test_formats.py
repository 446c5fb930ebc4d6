"""FP4, FP8 and UE8M0: every code point against torch's dtypes and ml_dtypes, quantization against brute force."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upwell.formats.fp4 import dequantize_fp4, quantize_fp4, round_to_fp4
from upwell.formats.fp8 import dequantize_fp8, quantize_fp8, scale_shape
from upwell.formats.int4 import dequantize_int4, pack_int4, quantize_int4, round_to_int4, unpack_int4
from upwell.formats.ue8m0 import decode_ue8m0, encode_ue8m0

BYTES = torch.arange(256, dtype=torch.uint8)
ONE = 127  # the UE8M0 byte of 1.0
FP4_VALUES = torch.tensor(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def test_every_ue8m0_byte_decodes_as_torch_and_ml_dtypes_do() -> None:
    decoded = decode_ue8m0(BYTES)
    by_torch = BYTES.view(torch.float8_e8m0fnu).float()
    by_ml_dtypes = torch.from_numpy(BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    for other in (by_torch, by_ml_dtypes):
        assert torch.equal(decoded[:255], other[:255])
        assert decoded[255].isnan() and other[255].isnan()
    assert torch.equal(decode_ue8m0(BYTES.view(torch.float8_e8m0fnu))[:255], decoded[:255])
    assert torch.equal(encode_ue8m0(decoded), BYTES)


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=2.0**-149, max_value=2.0**127, width=32))
def test_encode_ue8m0_is_the_least_power_of_two_not_below(value: float) -> None:
    code = int(encode_ue8m0(torch.tensor([value]))[0])
    assert 2.0 ** (code - 127) >= value
    assert code == 0 or 2.0 ** (code - 128) < value


def test_encode_ue8m0_clamps_what_is_larger_and_keeps_nan() -> None:
    assert encode_ue8m0(torch.tensor([3e38, float("inf"), 0.0, float("nan")])).tolist() == [254, 254, 0, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_fp8_code_decodes_as_torch_and_ml_dtypes_do(dtype: torch.dtype) -> None:
    codes = BYTES.view(torch.float8_e4m3fn)[None]
    decoded = dequantize_fp8(codes, torch.full((1, 2), ONE, dtype=torch.uint8), dtype)[0]
    by_ml_dtypes = torch.from_numpy(BYTES.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)).to(dtype)
    real = ~by_ml_dtypes.isnan()
    assert real.sum() == 254
    assert torch.equal(bits(decoded[real]), bits(by_ml_dtypes[real]))  # -0 included
    assert torch.equal(bits(decoded[real]), bits(codes[0].to(dtype)[real]))
    assert decoded[~real].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_fp4_byte_decodes_as_ml_dtypes_does_low_nibble_first(dtype: torch.dtype) -> None:
    packed = BYTES.view(8, 32)
    decoded = dequantize_fp4(packed, torch.full((8, 2), ONE, dtype=torch.uint8), dtype).view(256, 2)
    expected = torch.stack((FP4_VALUES[(BYTES & 15).int()], FP4_VALUES[(BYTES >> 4).int()]), dim=-1).to(dtype)
    assert torch.equal(bits(decoded), bits(expected))
    assert torch.equal(dequantize_fp4(packed.view(torch.int8), torch.full((8, 2), ONE, dtype=torch.uint8)).view(256, 2),
                       expected.float())  # fmt: skip


def test_fp4_has_torchs_bit_layout() -> None:
    # torch has no conversion from its float4_e2m1fn_x2 yet, but its bytes are the same: two values each.
    packed, _ = quantize_fp4(torch.randn(2, 32))
    assert packed.view(torch.float4_e2m1fn_x2).shape == packed.shape


@pytest.mark.parametrize("scale", [1, 50, 127, 200, 240])
def test_scales_are_applied_exactly_per_block_and_group(scale: int) -> None:
    generator = torch.Generator().manual_seed(scale)
    codes = torch.randint(0, 0x7F, (200, 300), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    scales = torch.randint(max(scale - 10, 0), scale + 1, scale_shape(200, 300), dtype=torch.uint8, generator=generator)
    decoded = dequantize_fp8(codes, scales)
    for row, col in ((0, 0), (127, 128), (128, 127), (199, 299), (130, 256)):
        assert decoded[row, col] == codes[row, col].float() * 2.0 ** (int(scales[row // 128, col // 128]) - 127)
    packed = torch.randint(0, 256, (5, 48), dtype=torch.uint8, generator=generator)
    groups = torch.randint(max(scale - 10, 0), scale + 1, (5, 3), dtype=torch.uint8, generator=generator)
    decoded = dequantize_fp4(packed, groups)
    for row, col in ((0, 0), (1, 31), (2, 32), (4, 95)):
        nibble = int(packed[row, col // 2]) >> (4 * (col % 2)) & 15
        assert decoded[row, col] == FP4_VALUES[nibble] * 2.0 ** (int(groups[row, col // 32]) - 127)


def test_whole_and_ragged_blocks_decode_alike() -> None:
    codes = torch.randint(0, 0x7F, (256, 384), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.randint(100, 140, (2, 3), dtype=torch.uint8)
    whole = dequantize_fp8(codes, scales)
    assert torch.equal(whole[:200, :257], dequantize_fp8(codes[:200, :257].contiguous(), scales))
    assert torch.equal(whole.bfloat16(), dequantize_fp8(codes, scales, torch.bfloat16))


def test_odd_sizes_and_offsets_decode_alike() -> None:
    storage = torch.randint(0, 0x7F, (10_000,), dtype=torch.uint8)
    scales = torch.full((1, 1), ONE, dtype=torch.uint8)
    for start, rows, cols in ((0, 4, 6), (1, 4, 6), (3, 5, 7), (2, 5, 7)):
        codes = storage[start : start + rows * cols].view(rows, cols).view(torch.float8_e4m3fn)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(dequantize_fp8(codes, scales, dtype), codes.to(dtype))
    turned = storage[:256].view(16, 16).view(torch.float8_e4m3fn).T
    assert torch.equal(dequantize_fp8(turned, scales), turned.float())


def test_dequantize_leaves_its_input_alone() -> None:
    codes, scales = quantize_fp8(torch.randn(128, 128))
    before = bits(codes).clone()
    dequantize_fp8(codes, scales)
    assert torch.equal(bits(codes), before)


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=-10, max_value=10, width=32))
def test_round_to_fp4_is_nearest_with_ties_to_even_codes(value: float) -> None:
    rounded = float(round_to_fp4(torch.tensor([value]))[0])
    by_ml_dtypes = float(np.clip(np.float32(value), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert rounded == by_ml_dtypes
    assert abs(rounded - value) == float((FP4_VALUES - value).abs().min())


def test_round_to_fp4_at_every_tie() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_to_fp4(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert round_to_fp4(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]


MATRICES = st.tuples(st.integers(0, 2**31), st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))


@settings(max_examples=40, deadline=None)
@given(MATRICES)
def test_quantize_fp4_picks_the_nearest_code_in_each_group(case: tuple[int, float]) -> None:
    seed, size = case
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * size
    packed, scale = quantize_fp4(weight)
    decoded = dequantize_fp4(packed, scale)
    grid = FP4_VALUES * decode_ue8m0(scale)[..., None]  # [3, 2, 16]
    brute = (weight.view(3, 2, 32, 1) - grid.unsqueeze(2)).abs().amin(-1).view(3, 64)
    assert torch.equal((weight - decoded).abs(), brute)
    amax = weight.view(3, 2, 32).abs().amax(-1)
    top = 6 * decode_ue8m0(scale).double()
    assert (amax <= top * (1 + 1e-6)).all() and (amax.double() > top / 2).all()


@settings(max_examples=40, deadline=None)
@given(MATRICES)
def test_quantize_fp8_picks_the_nearest_code_in_each_block(case: tuple[int, float]) -> None:
    seed, size = case
    weight = torch.randn(130, 140, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = quantize_fp8(weight)
    decoded = dequantize_fp8(codes, scale)
    values = BYTES.view(torch.float8_e4m3fn).float()
    values = values[~values.isnan()].unique()
    for rows, cols, s in ((slice(0, 128), slice(0, 128), scale[0, 0]), (slice(128, 130), slice(128, 140), scale[1, 1])):
        grid = values * decode_ue8m0(s[None])
        flat = weight[rows, cols].flatten()
        at = torch.searchsorted(grid, flat).clamp(1, len(grid) - 1)
        brute = torch.minimum((flat - grid[at - 1]).abs(), (flat - grid[at]).abs())
        assert torch.equal((flat - decoded[rows, cols].flatten()).abs(), brute)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_quantizing_representable_values_changes_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (4, 32), dtype=torch.uint8, generator=generator)
    dense = dequantize_fp4(packed, torch.randint(20, 230, (4, 2), dtype=torch.uint8, generator=generator))
    assert torch.equal(dequantize_fp4(*quantize_fp4(dense)), dense)
    codes = torch.randint(0, 256, (140, 150), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    scales = torch.randint(20, 230, (2, 2), dtype=torch.uint8, generator=generator)
    dense = dequantize_fp8(codes.view(torch.float8_e4m3fn), scales)
    assert torch.equal(dequantize_fp8(*quantize_fp8(dense)), dense)


def test_zeros_and_huge_values_stay_finite() -> None:
    for weight in (torch.zeros(128, 128), torch.full((128, 128), 1e38), torch.full((128, 128), 1e-44)):
        assert dequantize_fp8(*quantize_fp8(weight)).isfinite().all()
        assert dequantize_fp4(*quantize_fp4(weight)).isfinite().all()


def test_fp4_refuses_ragged_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_fp4(torch.zeros(2, 33))


def test_every_int4_byte_is_two_of_ml_dtypes_int4_low_nibble_first() -> None:
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.int4).astype(np.int8)
    expected = torch.from_numpy(np.stack((values[np.arange(256) & 15], values[np.arange(256) >> 4]), axis=-1))
    assert torch.equal(unpack_int4(BYTES.view(256, 1)), expected)
    assert torch.equal(pack_int4(expected).view(-1), BYTES)
    assert torch.equal(unpack_int4(BYTES.view(4, 2, 32)), expected.view(4, 2, 64))  # any leading axes


@pytest.mark.parametrize("group", [None, 32, 48])
def test_int4_is_the_nearest_of_15_steps(group: int | None) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(3))
    weight[2] = 0
    packed, scale = quantize_int4(weight, group)
    assert scale.dtype == (torch.bfloat16 if group else torch.float32)
    assert packed.shape == (7, 48) and scale.shape == ((7,) if group is None else (7, 96 // group))
    decoded = dequantize_int4(packed, scale)
    parts = weight.view(7, -1, group or 96)
    steps = scale.float().view(7, -1, 1)
    grid = torch.arange(-7, 8) * steps.unsqueeze(-1)
    nearest = (parts.unsqueeze(-1) - grid).abs().amin(-1)
    assert torch.equal((decoded.view(parts.shape) - parts).abs(), nearest)
    largest = parts.abs().amax(-1, keepdim=True)
    assert torch.allclose(7 * steps[largest > 0], largest[largest > 0], rtol=2**-8 if group else 1e-6)
    assert dequantize_int4(packed, scale, torch.bfloat16).dtype == torch.bfloat16


def test_int4_takes_a_scale_of_ones_own_choice_and_refuses_what_does_not_fit() -> None:
    weight = torch.tensor([[0.9, -3.6, 40.0, 0.26]])
    assert round_to_int4(weight, torch.tensor([0.5])).tolist() == [[2, -7, 7, 1]]
    with pytest.raises(ValueError, match="multiple of 3"):
        quantize_int4(weight, 3)
    with pytest.raises(ValueError, match="even"):
        quantize_int4(torch.ones(2, 3))
