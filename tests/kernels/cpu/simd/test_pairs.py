"""The words for bfloat16 pairs, judged by PyTorch's own conversions and by float64."""

import numba
import pytest
import torch
from lanes import applied

from quire.kernels.cpu.attend import config
from quire.kernels.cpu.simd import pairs
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, store

pytestmark = pytest.mark.skipif(LANES != 16, reason="these words are for vectors of 512 bits")
where_it_is_used = pytest.mark.skipif(
    not pairs.has_pair_products(), reason="this CPU multiplies pairs no faster than single numbers"
)


def as_pairs(values):
    """Neighbouring bfloat16 numbers as the 32 bits of one lane."""
    return values.to(torch.bfloat16).view(torch.float32)


def as_numbers(lanes):
    return lanes.view(torch.bfloat16).float()


def read(source, word):
    """A flat tensor of 8 bits or of bfloat16 through a word that loads, a line at a time."""
    code, line = config.DTYPE_CODES[source.dtype], pairs.LINE * source.element_size()
    out = torch.zeros(len(source) // pairs.LINE * LANES)

    @numba.njit
    def every(a, b, n):
        for i in range(n):
            store(F32, b + i * LANES * 4, word(code, a + i * line))

    every(source.data_ptr(), out.data_ptr(), len(source) // pairs.LINE)
    return as_numbers(out)


@where_it_is_used
def test_a_product_of_pairs_adds_two_exact_products():
    torch.manual_seed(0)
    a, b, c = torch.randn(2048).bfloat16(), torch.randn(2048).bfloat16(), torch.randn(1024)
    got = applied(pairs.multiply_pairs, as_pairs(a), as_pairs(b), c)
    products = (a.double() * b.double()).view(-1, 2)
    size = products.abs().sum(1) + c.abs()
    assert ((got.double() - products.sum(1) - c.double()).abs() <= size * 2**-23).all()
    assert torch.equal(got, applied(pairs.multiply_pairs, as_pairs(b), as_pairs(a), c))


@where_it_is_used
def test_lanes_are_paired_up_and_rounded_to_nearest_even():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, torch.inf, -torch.inf, 2.0**-100, 1.0])
    even = torch.cat([ties, ties, torch.rand(1008)])
    odd = torch.rand(1024)
    got = as_numbers(applied(pairs.pair_up, even, odd)).view(-1, 2)
    assert torch.equal(got[:, 0], even.bfloat16().float())
    assert torch.equal(got[:, 1], odd.bfloat16().float())
    assert as_numbers(applied(pairs.pair_up, torch.full((16,), torch.nan), odd[:16]))[::2].isnan().all()


def test_rows_are_zipped_into_pairs_of_the_same_column():
    a, b = torch.arange(0.0, 32.0), torch.arange(100.0, 132.0)
    low, high = (
        as_numbers(applied(word, as_pairs(a), as_pairs(b))).view(-1, 2)
        for word in (pairs.zip_pairs_low, pairs.zip_pairs_high)
    )
    assert torch.equal(torch.cat([low, high]), torch.stack([a, b], 1))


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_turning_moves_lanes_around(lanes):
    rotate, v = pairs.rotate, torch.arange(float(LANES))

    @numba.njit
    def turned(x):
        return rotate(x, lanes)

    assert torch.equal(applied(turned, v), v.roll(-lanes))


@where_it_is_used
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_number_of_8_bits_is_read_as_the_same_bfloat16(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    wanted = every.float()
    if dtype == torch.int8:
        wanted[128] = -127.0  # −128, which scales leave out
    first, second = read(every, pairs.load_pairs), read(every, pairs.load_second_pairs)
    got = torch.cat([first.view(-1, 32), second.view(-1, 32)], 1).flatten()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0.0), wanted.nan_to_num(0.0))


def test_bfloat16_is_read_as_it_lies():
    source = torch.randn(256).bfloat16()
    first, second = read(source, pairs.load_pairs), read(source, pairs.load_second_pairs)
    assert torch.equal(torch.cat([first.view(-1, 32), second.view(-1, 32)], 1).flatten(), source.float())


def test_one_pair_fills_every_lane():
    load_pair, source, out = (
        pairs.load_pair,
        torch.tensor([9.0, 1.5, -2.0, 7.0]).bfloat16(),
        torch.zeros(LANES),
    )

    @numba.njit
    def one(a, b):
        store(F32, b, load_pair(a))

    one(source.data_ptr() + 2, out.data_ptr())  # at any element, not at every second only
    assert as_numbers(out).tolist() == [1.5, -2.0] * LANES
