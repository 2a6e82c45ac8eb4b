"""The words the kernels compute with, judged lane by lane against float64."""

import math

import numba
import numpy as np
import pytest
import torch
from lanes import applied, applied_to_four

from quire.kernels.cpu.simd import vectors as simd
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, store

POWERS = [power for power in (1, 2, 4, 8, 16) if power <= LANES]


def ulps(got, wanted):
    """Distance in units in the last place of the wanted number."""
    unit = torch.from_numpy(np.spacing(wanted.abs().float().numpy())).double()
    return ((got.double() - wanted).abs() / unit).max().item()


def test_exp2_is_right_to_two_units_over_its_whole_range_and_exact_at_whole_numbers():
    x = torch.cat([-torch.rand(1 << 14) * 126, -torch.logspace(-30, 2, 1 << 10), torch.zeros(LANES)])
    assert ulps(applied(simd.exp2, x), torch.exp2(x.double())) <= 2
    whole = -torch.arange(0.0, 112.0)
    assert torch.equal(applied(simd.exp2, whole), torch.exp2(whole))


def test_exp2_ends_in_zero_and_passes_nan_on():
    x = torch.tensor([-126.01, -127.0, -1e4, -3e38, -math.inf, math.nan, -0.0, 0.0] * 2)
    assert applied(simd.exp2, x)[:5].tolist() == [0.0] * 5
    assert math.isnan(applied(simd.exp2, x)[5])
    assert applied(simd.exp2, x)[6:8].tolist() == [1.0, 1.0]


def test_tanh_is_right_to_a_few_units_and_odd():
    x = torch.cat(
        [torch.linspace(0, 12, 1 << 14), torch.logspace(-38, 1, 1 << 12), torch.full((LANES,), 0.55)]
    )
    got = applied(simd.tanh, x)
    assert ulps(got, torch.tanh(x.double())) <= 4
    assert torch.equal(applied(simd.tanh, -x), -got)
    limits = torch.tensor([math.inf, -math.inf, 3e38, -3e38] * 4)
    assert applied(simd.tanh, limits).tolist() == [1.0, -1.0] * 8


def test_arithmetic_is_that_of_float32():
    a, b, c = torch.randn(3, 64)
    assert torch.equal(applied(simd.add, a, b), a + b)
    assert torch.equal(applied(simd.sub, a, b), a - b)
    assert torch.equal(applied(simd.mul, a, b), a * b)
    assert torch.equal(applied(simd.div, a, b), a / b)
    assert torch.equal(applied(simd.maximum, a, b), torch.maximum(a, b))
    assert torch.equal(applied(simd.magnitude, a), a.abs())
    # One rounding: the product alone does not fit float32.
    assert torch.equal(applied(simd.fma, a, b, c), (a.double() * b.double() + c.double()).float())


def test_masks_choose_lane_by_lane():
    at_least, less_than, both, select = simd.at_least, simd.less_than, simd.both, simd.select

    @numba.njit
    def inside(x, low, high):
        return select(both(at_least(x, low), less_than(x, high)), x, low)

    x, low, high = torch.arange(16.0), torch.full((16,), 4.0), torch.full((16,), 9.0)
    assert applied(inside, x, low, high).tolist() == [4.0] * 5 + [5.0, 6.0, 7.0, 8.0] + [4.0] * 7


def test_splat_fills_all_lanes_with_the_first():
    splat, first_lane = simd.splat, simd.first_lane

    @numba.njit
    def fill(x):
        return splat(first_lane(x))

    assert applied(fill, torch.arange(5.0, 5.0 + LANES)).tolist() == [5.0] * LANES


@pytest.mark.parametrize("times", POWERS)
def test_repeat_stretches_the_first_lanes(times):
    repeat = simd.repeat

    @numba.njit
    def stretch(x):
        return repeat(x, times)

    x = torch.randperm(LANES).float()
    assert torch.equal(applied(stretch, x), x[: LANES // times].repeat_interleave(times))


def test_zips_alternate_the_lanes_of_two_vectors():
    a, b = torch.arange(float(LANES)), torch.arange(float(LANES)) + 100
    zipped = torch.cat([applied(simd.zip_low, a, b), applied(simd.zip_high, a, b)])
    assert torch.equal(zipped, torch.stack([a, b], -1).flatten())


@pytest.mark.parametrize("period", POWERS)
def test_folds_combine_the_lanes_that_are_equal_modulo_a_period(period):
    fold_sum, fold_max = simd.fold_sum, simd.fold_max

    @numba.njit
    def total(x):
        return fold_sum(x, period)

    @numba.njit
    def highest(x):
        return fold_max(x, period)

    x = torch.randperm(LANES).float()
    rows = x.view(-1, period)
    assert torch.equal(applied(total, x), rows.sum(0).repeat(LANES // period))
    assert torch.equal(applied(highest, x), rows.amax(0).repeat(LANES // period))


def test_transpose_exchanges_vectors_and_lanes():
    tile, transpose = simd.tile, simd.transpose

    @numba.njit
    def turned(a, out):
        rows = tile(LANES)
        for i in range(LANES):
            rows[i] = load(F32, a + i * LANES * 4)
        transpose(rows)
        for i in range(LANES):
            store(F32, out + i * LANES * 4, rows[i])

    a, out = torch.randn(LANES, LANES), torch.zeros(LANES, LANES)
    turned(a.data_ptr(), out.data_ptr())
    assert torch.equal(out, a.T)


def test_sum_rows_leaves_the_sum_of_vector_i_in_lane_i():
    tile, sum_rows = simd.tile, simd.sum_rows

    @numba.njit
    def sums(a, out):
        rows = tile(LANES)
        for i in range(LANES):
            rows[i] = load(F32, a + i * LANES * 4)
        store(F32, out, sum_rows(rows))

    matrix = torch.randint(
        -1000, 1000, (LANES, LANES)
    ).float()  # sums of whole numbers are exact in any order
    out = torch.zeros(LANES)
    sums(matrix.data_ptr(), out.data_ptr())
    assert torch.equal(out, matrix.sum(1))


def test_the_int64_of_four_vectors_come_in_turn():
    source = torch.arange(2 * LANES, dtype=torch.int64) * 2**40 - 7
    assert torch.equal(applied_to_four(simd.interleave, source), source.view(4, -1).T.flatten())
