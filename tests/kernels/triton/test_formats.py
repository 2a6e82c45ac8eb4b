"""Stored bytes as numbers and numbers as stored bytes: every one of them, on each of the ways there."""

import pytest
import torch
import triton
import triton.language as tl

from quire.kernels.triton.formats import (
    round_to_fp8,
    round_to_int8,
    unit_exponent,
    widen,
    widen_apart,
    widen_words,
)
from quire.spec import QUANTIZED_DTYPES

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
formats = pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)


@triton.jit
def widen_all(stored, out, FORMAT: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, widen(tl.load(stored + at), FORMAT, out.dtype.element_ty))


@triton.jit
def widen_all_words(words, out, FORMAT: tl.constexpr, CAPABILITY: tl.constexpr, ROWS: tl.constexpr):
    row, word, column = tl.arange(0, ROWS), tl.arange(0, 4), tl.arange(0, 16)
    wide = widen_words(tl.load(words + row[:, None] * 4 + word[None, :]), FORMAT, CAPABILITY)
    tl.store(out + row[:, None] * 16 + column[None, :], wide)


def every_byte(kv_dtype):
    """All 256, and the numbers that those mean which are numbers."""
    stored = torch.arange(256, dtype=torch.uint8)
    return stored, stored.view(QUANTIZED_DTYPES[kv_dtype]).float()


def assert_means(wide, values, kv_dtype, dtype):
    """``wide`` is still to be multiplied with the unit; bytes that are no finite numbers may be anything."""
    exponent = unit_exponent.fn(kv_dtype, getattr(tl, str(dtype).removeprefix("torch.")))
    finite = values.isfinite()
    torch.testing.assert_close(
        (wide.double() * 2.0**exponent)[finite], values.double()[finite], rtol=0, atol=0
    )


@formats
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_every_byte_widens_to_its_number(kv_dtype, dtype):
    stored, values = every_byte(kv_dtype)
    out = torch.empty(256, dtype=dtype)
    widen_all[(1,)](stored.view(torch.int8) if kv_dtype == "int8" else stored, out, FORMAT=kv_dtype)
    assert_means(out, values, kv_dtype, dtype)


@formats
@pytest.mark.parametrize("capability", [0, 80, 90], ids=["portable", "sm_80", "sm_90"])
def test_every_byte_in_every_place_of_a_word_widens_to_its_number(kv_dtype, capability):
    stored = torch.stack([torch.arange(256, dtype=torch.uint8).roll(shift) for shift in (0, 1, 77, 130)], -1)
    values = stored.view(QUANTIZED_DTYPES[kv_dtype]).float()
    out = torch.empty(64, 16, dtype=F16)
    widen_all_words[(1,)](stored.view(torch.int32), out, FORMAT=kv_dtype, CAPABILITY=capability, ROWS=64)
    assert_means(out.view(256, 4), values, kv_dtype, F16)


@triton.jit
def widen_all_apart(pairs, out, FORMAT: tl.constexpr, CAPABILITY: tl.constexpr, ROWS: tl.constexpr):
    """``pairs`` [ROWS, 8] as two tables of float16 numbers [ROWS, 8]: of their first bytes, and of their second."""
    row, pair = tl.arange(0, ROWS), tl.arange(0, 8)
    at = row[:, None] * 8 + pair[None, :]
    first, second = widen_apart(tl.load(pairs + at), FORMAT, CAPABILITY)
    tl.store(out + at, first)
    tl.store(out + ROWS * 8 + at, second)


@formats
@pytest.mark.parametrize("capability", [0, 80, 90], ids=["portable", "sm_80", "sm_90"])
def test_every_byte_in_either_place_of_a_pair_widens_to_its_number(kv_dtype, capability):
    first = torch.arange(256, dtype=torch.uint8)
    second = first.roll(77)
    values = torch.stack([first, second]).view(QUANTIZED_DTYPES[kv_dtype]).float()
    out = torch.empty(2, 32, 8, dtype=F16)
    pairs = torch.stack([first, second], -1).view(torch.int16)
    widen_all_apart[(1,)](pairs, out, FORMAT=kv_dtype, CAPABILITY=capability, ROWS=32)
    assert_means(out.view(2, 256), values, kv_dtype, F16)


@triton.jit
def round_all(x, out, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if FORMAT == "int8":
        tl.store(out + at, round_to_int8(tl.load(x + at)))
    else:
        tl.store(out + at, round_to_fp8(tl.load(x + at), FORMAT))


@formats
def test_every_number_rounds_to_the_nearest_ties_to_even(kv_dtype):
    dtype = QUANTIZED_DTYPES[kv_dtype]
    _, values = every_byte(kv_dtype)
    exact = values[values.isfinite()].sort().values
    if kv_dtype == "int8":
        exact = exact[exact >= -127]
    between = (exact[1:] + exact[:-1]) / 2
    beside = torch.cat([between * (1 + 2**-20), between * (1 - 2**-20)])
    x = torch.cat(
        [exact, between, beside, torch.randn(2048 - len(exact) - 3 * len(between)) * exact.max() / 4]
    )
    x = x.clamp(exact.min(), exact.max())
    out = torch.empty(2048, dtype=torch.int8 if kv_dtype == "int8" else torch.uint8)
    round_all[(1,)](x, out, FORMAT=kv_dtype, SIZE=2048)
    wanted = x.round().to(dtype) if kv_dtype == "int8" else x.to(dtype)
    torch.testing.assert_close(out.view(dtype).float(), wanted.float(), rtol=0, atol=0)
