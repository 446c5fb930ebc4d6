"""ops.requantize's kernel against the plain operation, to the bit, by every instruction set and from every format."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from upwell.formats.fp4 import dequantize_fp4, quantize_fp4
from upwell.formats.fp8 import dequantize_fp8, quantize_fp8
from upwell.ops import native
from upwell.ops.linear import dense_weight
from upwell.ops.requantize import plain_requantize, requantize, usable


def source(kind: str, rows: int, cols: int) -> tuple[Tensor, Tensor | None]:
    """A weight with rows of many sizes, zeros and a row of zeros among them."""
    generator = torch.Generator().manual_seed(rows + cols)
    sizes = torch.exp2(torch.randint(-20, 6, (rows, 1), generator=generator).float())
    dense = torch.randn(rows, cols, generator=generator) * sizes
    dense[rows // 2] = 0
    dense[:, 3] = 0
    return {
        "f32": lambda: (dense, None), "bf16": lambda: (dense.bfloat16(), None),
        "fp8": lambda: quantize_fp8(dense), "fp4": lambda: quantize_fp4(dense),
    }[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["f32", "bf16", "fp8", "fp4"])
@pytest.mark.parametrize(
    ("bits", "group", "pack_rows"), [(8, None, False), (4, None, False), (4, None, True), (4, 32, False)]
)
def test_the_kernel_is_the_plain_operation(
    isa: str, kind: str, bits: Literal[8, 4], group: int | None, pack_rows: bool
) -> None:
    for rows, cols in ((130, 160), (2, 32), (6, 288)):
        weight, scale = source(kind, rows, cols)
        assert usable(weight, scale, group) or native.library() is None
        ours = requantize(weight, scale, bits, group, pack_rows, 16)
        plain = plain_requantize(weight, scale, bits, group, pack_rows, 16)
        for mine, theirs in zip(ours, plain, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp4"])
def test_scales_on_the_sources_grid(isa: str, kind: str) -> None:
    for rows, cols in ((130, 160), (2, 32), (6, 288)):
        weight, scale = source(kind, rows, cols)
        ours, usual = requantize(weight, scale, 8, on_grid=True), requantize(weight, scale, 8)
        if kind == "bf16":  # which has none
            assert torch.equal(ours.scale, usual.scale)
            continue
        plain = plain_requantize(weight, scale, 8, None, False, 0, True)
        assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scale, plain.scale)
        mantissa, _ = torch.frexp(ours.scale)
        assert ((mantissa == 0.5) | (ours.scale == usual.scale)).all()
        assert (ours.scale > usual.scale / 2).all() and (ours.scale < 2 * usual.scale).all()
        exact = dense_weight(weight, scale, torch.float64)
        errors = [(made.codes * made.scale[:, None].double() - exact).square().sum(1) for made in (ours, usual)]
        assert (errors[0] <= errors[1]).all() and (rows < 100 or errors[0].sum() < 0.9 * errors[1].sum())


def test_fp4_becomes_int8_without_an_error(isa: str) -> None:
    dense = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))  # rows of V4-Flash's length
    packed, scale = quantize_fp4(dense)
    ours = requantize(packed, scale, 8, on_grid=True)
    assert torch.equal(ours.codes.float() * ours.scale[:, None], dequantize_fp4(packed, scale))
    dense[:, 7] *= 100  # one group's scale is far from the others': there is an error, the same in both
    packed, scale = quantize_fp4(dense)
    ours, plain = requantize(packed, scale, 8, on_grid=True), plain_requantize(packed, scale, 8, None, False, 0, True)
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scale, plain.scale)
    assert not torch.equal(ours.codes.float() * ours.scale[:, None], dequantize_fp4(packed, scale))


def test_fp8_has_half_the_error_on_its_grid(isa: str) -> None:
    weight, scale = quantize_fp8(torch.randn(256, 4096, generator=torch.Generator().manual_seed(1)))
    exact = dequantize_fp8(weight, scale)
    ours, usual = requantize(weight, scale, 8, on_grid=True), requantize(weight, scale, 8)
    errors = [float((made.codes * made.scale[:, None] - exact).square().mean()) for made in (ours, usual)]
    assert errors[0] < 0.7 * errors[1], errors


def test_odd_columns_by_row(isa: str) -> None:
    for kind in ("f32", "bf16", "fp8"):
        weight, scale = source(kind, 5, 131)
        plain = plain_requantize(weight, scale, 8, None, False, 0)
        for mine, theirs in zip(requantize(weight, scale, 8), plain, strict=True):
            assert torch.equal(mine, theirs)


def test_every_code_of_fp8_and_fp4(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    finite = codes[:, (codes[0] & 0x7F) != 0x7F].contiguous().view(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 120]], dtype=torch.uint8)
    for weight, scales in ((finite, scale), (codes, torch.randint(90, 140, (2, 16), dtype=torch.uint8))):
        ours, plain = requantize(weight, scales, 8), plain_requantize(weight, scales, 8, None, False, 0)
        assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scale, plain.scale)


def test_what_is_no_number_shows_in_its_scale_alone(isa: str) -> None:
    dense = torch.randn(4, 64)
    dense[1, 5], dense[2, 40] = float("nan"), float("inf")
    fp8, scale8 = quantize_fp8(torch.randn(4, 64))
    fp8.view(torch.uint8)[1, 7] = 0xFF
    fp4, scale4 = quantize_fp4(torch.randn(4, 64))
    scale4[3, 1] = 255
    for weight, scale, wrong in ((dense, None, [1, 2]), (fp8, scale8, [1]), (fp4, scale4, [3])):
        ours, plain = requantize(weight, scale, 4), plain_requantize(weight, scale, 4, None, False, 0)
        on_grid = requantize(weight, scale, 8, on_grid=True), plain_requantize(weight, scale, 8, None, False, 0, True)
        for made in (ours, plain, *on_grid):
            assert [i for i in range(4) if not made.scale[i].isfinite()] == wrong
        good = [i for i in range(4) if i not in wrong]
        assert torch.equal(ours.codes[good], plain.codes[good])


def test_what_the_kernel_does_not_take_is_left_to_the_plain_operation() -> None:
    codes, steps, _ = requantize(torch.randn(8, 32), None, 8)
    assert not usable(codes, steps, None)  # INT8 already
    again = requantize(codes, steps, 8)
    assert torch.equal(again.codes, codes)
    assert not usable(torch.randn(32, 8).T, None, None)
