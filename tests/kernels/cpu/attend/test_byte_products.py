"""Decode over int8 pages as integers, of 8 or 16 bits: right for all queries and scales, scores within 2⁻¹³."""

import math
from dataclasses import replace

import pytest
import torch
from accuracy import BYTE_PRODUCT_ERROR, check, exact
from support import Shape, attend, make_batch, plan_for

from quire.kernels.cpu.simd import integers

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not (integers.has_byte_products() or integers.has_short_products()),
    reason="int8 pages are multiplied as float32 here; test_targets runs this file for AVX2",
)

# Tiles of one to four heads, several tiles, strips that end within a line of 64, the longest rows that fit.
SHAPES = [
    Shape(BF16, 64, group=4, kv_dtype="int8"),
    Shape(BF16, 64, group=1, kv_dtype="int8"),
    Shape(BF16, 128, group=3, kv_dtype="int8", num_kv_heads=1),
    Shape(BF16, 192, group=2, kv_dtype="int8", num_kv_heads=1),
    Shape(BF16, 192, group=1, kv_dtype="int8", num_kv_heads=1),
    Shape(BF16, 512, group=7, kv_dtype="int8", num_kv_heads=1),
]
grouped = [
    pytest.param(
        s,
        id=str(s),
        marks=[
            pytest.mark.xdist_group(f"decode-{s}"),
            *([pytest.mark.exhaustive] if s in SHAPES[2:5] else []),
        ],
    )
    for s in SHAPES
]
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
def test_split_tiles_are_folded_in_the_order_of_the_head(shape):
    batch = make_batch(shape, [900, 3, 90])
    assert plan_for(batch, workers=5).step.decode.num_merges
    check(batch, workers=5)


@every_shape
@pytest.mark.parametrize("value", [127, -127, -128])
def test_the_largest_bytes_overflow_nothing(shape, value):
    batch = make_batch(shape, [64, 130])
    batch.q.fill_(1.9921875)  # all eight bits of a bfloat16 set
    for pages in (batch.k_pages, batch.v_pages):
        pages.fill_(value)
    check(batch, softmax_scale=0.01)


@every_shape
@pytest.mark.skipif(integers.has_short_products(), reason="float32, which keys become there, holds −128")
def test_a_byte_of_minus_128_tells_keys_as_bytes_from_converted_ones(shape):
    batch = make_batch(shape, [64, 130])
    batch.q.fill_(1.0)
    batch.k_pages.fill_(-128)
    check(batch)  # −128 is itself: nothing was converted
    batch.q[..., ::2] = 2.0**-8 * (1 + 2.0**-7)  # finer than the steps of 1.0
    converted = attend(batch)
    batch.k_pages.fill_(-127)
    wanted = exact(batch)
    torch.testing.assert_close(converted.lse, wanted.lse, atol=2e-5, rtol=2e-6)


@every_shape
def test_the_worst_query_that_passes_is_off_by_no_more_than_said(shape):
    """All elements but one are rounded the same way, and all keys are the largest there are."""
    batch = make_batch(shape, [64, 64, 130])
    batch.k_pages.fill_(127)
    batch.q.fill_(2.0**-8 * (1 + 2.0**-7))
    batch.q[..., 0] = 1.0
    lost = (shape.head_dim - 1) * 2.0**-15
    for share in (0.97, 1.03):
        batch.scales["k_scale"].fill_(share * BYTE_PRODUCT_ERROR / (lost * 128 * shape.head_dim**-0.5))
        error = (check(batch).lse.double() - exact(batch).lse).abs().max()
        assert (error > 0.5 * BYTE_PRODUCT_ERROR) == (share < 1)


@every_shape
@pytest.mark.parametrize(
    "rules", [{"softmax_scale": -1.0}, {"softmax_scale": 0.0}, {"softcap": 3.0}], ids=str
)
def test_the_bound_holds_for_scores_of_either_sign_and_under_a_cap(shape, rules):
    batch = make_batch(shape, [200, 64])
    batch.q[..., ::7] /= 1000.0
    batch.scales["k_scale"][:, batch.page_table[0, 3].long()] *= 100.0
    check(batch, workers=2, **rules)


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
    )  # its group's keys are read otherwise


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
def test_negative_scales_are_right_for_keys_and_for_values_as_shorts_but_refused_by_values_as_bytes(shape):
    batch = make_batch(shape, [130, 130])
    batch.scales["k_scale"].neg_()
    check(batch)
    batch.q[..., ::7] /= 1000.0
    batch.scales["k_scale"].mul_(100.0)
    check(batch)
    batch = make_batch(shape, [130, 130])
    batch.scales["v_scale"][0, batch.page_table[1, 3], 4] *= -1.0
    if integers.has_short_products():
        check(batch)
    else:
        assert attend(batch).out[1, : shape.group].isnan().all()


@one_shape
def test_scores_are_exacter_than_weights_need(shape):
    """lse is off by a sixth of what it is held to, in the mean: 16 bits say nearly all of a bfloat16 query."""
    batch = make_batch(replace(shape, num_kv_heads=8), [500, 3, 64])
    error = (attend(batch).lse.double() - exact(batch).lse).square().mean().sqrt()
    assert error < 3e-6
