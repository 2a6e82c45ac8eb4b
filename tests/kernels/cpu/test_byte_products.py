"""Decode over int8 pages as they lie: as exact as float32 makes it, for whatever queries, weights and scales come."""

import math
from dataclasses import replace

import pytest
import torch
from accuracy import check, exact
from support import Shape, attend, make_batch

from quire.kernels.cpu import integers

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not integers.has_byte_products(), reason="this CPU multiplies no bytes, or none that pay"
)

# Tiles of one to four heads, several tiles, strips that end within a line of 64, the longest rows that fit.
SHAPES = [
    Shape(BF16, 64, group=4, kv_dtype="int8"),
    Shape(BF16, 64, group=1, kv_dtype="int8"),
    Shape(BF16, 128, group=3, kv_dtype="int8", num_kv_heads=1),
    Shape(BF16, 192, group=2, kv_dtype="int8", num_kv_heads=1),
    Shape(BF16, 192, group=1, kv_dtype="int8", num_kv_heads=1),
    Shape(BF16, 256, group=7, kv_dtype="int8", num_kv_heads=1),
]
grouped = [pytest.param(s, id=str(s), marks=pytest.mark.xdist_group(f"decode-{s}")) for s in SHAPES]
every_shape = pytest.mark.parametrize("shape", grouped)
one_shape = pytest.mark.parametrize("shape", grouped[:1])


@every_shape
@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_it_equals_the_reference_around_every_four_tokens(shape, page_size):
    check(
        make_batch(shape, [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 66, 127, 190], page_size=page_size),
        workers=3,
    )


@every_shape
def test_the_largest_bytes_overflow_nothing(shape):
    batch = make_batch(shape, [64, 130])
    for sign in (1, -1):
        batch.q.fill_(1.9921875)  # all eight bits of a bfloat16 set
        for pages in (batch.k_pages, batch.v_pages):
            pages.fill_(sign * 127)
        check(batch, softmax_scale=0.01)


@every_shape
def test_queries_that_bytes_cannot_say_are_told_from_others(shape):
    """An element that no key answers takes the bits of all others; heads beside it may do without."""
    batch = make_batch(shape, [200, 90, 64])
    batch.k_pages[..., 5] = 0
    batch.q[1, -1, 5] = 1000.0
    batch.q[2, :, 5] = torch.tensor(3e38).to(BF16)
    check(batch, workers=2)


@one_shape
def test_queries_of_any_size_are_as_exact(shape):
    batch = make_batch(shape, [200, 90])
    ordinary = batch.q.clone()
    for size in (2.0**-100, 2.0**-60, 2.0**60, 2.0**110):
        batch.q.copy_(ordinary * size)
        check(batch, softmax_scale=0.1 / size)
    batch.q.zero_()
    check(batch)


@one_shape
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_query_that_is_no_number_spoils_its_own_row_alone(shape, value):
    batch = make_batch(shape, [70, 70])
    wanted = attend(batch).out
    batch.q[1, 2, 9] = value
    got = attend(batch).out
    assert got[1, 2].isnan().all()
    others = torch.ones(got.shape[:2], dtype=torch.bool)
    others[1, 2] = False
    torch.testing.assert_close(
        got[others], wanted[others], rtol=2**-7, atol=1e-2
    )  # its tile's keys are read otherwise


@every_shape
def test_weights_far_apart_within_a_block_and_between_blocks(shape):
    """The largest of a block says how finely its weights are told apart, so no block may take another's."""
    batch = make_batch(shape, [192, 192, 192])
    scale = batch.scales["v_scale"]
    scale.mul_(torch.linspace(-8, 8, scale.shape[-1]).exp2())
    check(batch, workers=2)
    for i in range(3):  # a first block whose values are 2^16 times the others'
        scale[:, batch.page_table[i, :4].long()] *= 2.0**16
    check(batch, workers=2)


@every_shape
def test_keys_of_any_size_are_as_exact(shape):
    """Blocks whose keys would turn what a query loses into much of a score are read otherwise."""
    batch = make_batch(shape, [192, 130])
    batch.scales["k_scale"][:, batch.page_table[0, 4:8].long()] *= 16.0
    batch.scales["k_scale"][:, batch.page_table[1, 3].long()] *= 1000.0
    check(batch, workers=2)
    batch.q[..., ::7] /= 1000.0
    check(batch, workers=2)


@one_shape
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_scale_that_is_no_number_reaches_the_results_that_see_it(shape, name):
    batch = make_batch(shape, [130, 130])
    wanted = attend(batch)
    batch.scales[name][0, batch.page_table[1, 3], 4] = math.nan
    out, _ = attend(batch)
    assert out[1, : shape.group].isnan().all()
    assert torch.equal(out[0], wanted.out[0])
    assert torch.equal(out[1, shape.group :], wanted.out[1, shape.group :])


@one_shape
def test_scores_are_exacter_than_weights_need(shape):
    """lse is off by a sixth of what it is held to, in the mean: 16 bits say nearly all of a bfloat16 query."""
    batch = make_batch(replace(shape, num_kv_heads=8), [500, 3, 64])
    error = (attend(batch).lse.double() - exact(batch).lse).square().mean().sqrt()
    assert error < 3e-6
