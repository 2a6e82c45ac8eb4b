"""Prefill by AMX's tile registers: held to what holds for every kernel, wherever blocks, tiles and squares end.

These run where QUIRE_AMX=1 and the machine has AMX, and in test_amx on an emulation of its registers.
"""

import sys

import pytest
import torch
from accuracy import check
from support import Shape, attend, features, make_batch, plan_for

from quire.errors import QuireError
from quire.kernels.cpu import amx
from quire.kernels.cpu.backend import _kernels
from quire.kernels.cpu.simd.llvm import LANES


def in_use():
    try:
        return LANES == 16 and amx.in_use()
    except QuireError:
        return False


pytestmark = pytest.mark.skipif(not in_use(), reason="AMX's registers are not in use; test_amx emulates them")

BF16 = torch.bfloat16
# One square of head_dim and several, the largest; groups that fill a tile of 96 rows and others.
SMALL, USUAL = Shape(BF16, 32, group=3), Shape(BF16, 128, group=4)
SHAPES = [SMALL, USUAL, Shape(BF16, 96, group=1), Shape(BF16, 256, group=7, num_kv_heads=1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
FEATURES = ["window", "softcap", "alibi", "sinks", "tree"]
MIXED = (
    [1, 40, 65, 130, 0, 20],
    [1, 40, 2, 33, 3, 25],
)  # decode, whole, chunked, empty, more queries than keys


@pytest.fixture(autouse=True)
def registers():
    """Where they are emulated, whether each share configured them and gave them back."""
    yield
    machine = sys.modules.get("amx_machine")
    if machine is not None:
        counts = machine.counts()
        assert counts["faults"] == 0, "a tile was used that was not configured"
        assert counts["configured"] == 0, "a share did not release its tiles"


def test_the_shapes_are_those_that_tiles_take():
    for shape in SHAPES:
        assert _kernels(shape.spec(16))[1].config.amx
    for other in (Shape(BF16, 40), Shape(torch.float16, 64), Shape(BF16, 64, kv_dtype="int8")):
        assert not _kernels(other.spec(16))[1].config.amx


@every_shape
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_it_equals_the_reference_at_every_edge_of_a_page(shape, page_size):
    lengths = [2, page_size, page_size + 1, 2 * page_size + 1, 64, 65]
    q_lens = [2, min(page_size, 2), page_size + 1, 2, 64, 20]
    check(make_batch(shape, lengths, q_lens, page_size=page_size), workers=3)


@every_shape
@pytest.mark.parametrize("length", [2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 200])
def test_it_equals_the_reference_around_every_square(shape, length):
    check(make_batch(shape, [length, length + 40], [length, 5]))


@every_shape
def test_it_equals_the_reference_with_every_feature_at_once(shape):
    batch = make_batch(shape, *MIXED, page_size=3, layout="gaps", strided_q=True, share=0.3)
    for seed in range(2):
        check(batch, workers=3, **features(batch, seed=seed, **dict.fromkeys(FEATURES, True)))


@pytest.mark.parametrize("asked", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
def test_each_feature_equals_the_reference(asked, causal):
    batch = make_batch(SMALL, *MIXED, page_size=16)
    for seed in range(2):
        check(batch, workers=2, causal=causal, **features(batch, seed=seed, **{asked: True}))


@pytest.mark.parametrize("group", [1, 2, 7, 16, 24, 71, 95, 96, 97, 200])
def test_any_number_of_query_heads_may_share_a_kv_head(group):
    batch = make_batch(Shape(BF16, 32, group=group), [40, 70, 600], [20, 3, 2], page_size=16)
    check(batch, workers=1, **features(batch, alibi=True, sinks=True))
    check(batch, workers=7, **features(batch, alibi=True, sinks=True))


def test_split_ranges_of_keys_are_merged():
    batch = make_batch(USUAL, [700, 333], [60, 9])
    assert plan_for(batch, workers=5).step.prefill.num_merges
    check(batch, workers=5)


@pytest.mark.parametrize("window_left", [-1, 0, 15, 33, 100])
def test_a_row_has_the_same_bits_whatever_stands_in_its_tile(window_left):
    """Other rows of the tile make it begin and end elsewhere, in the middle of a pair of tokens too."""
    batch = make_batch(USUAL, [150], [150])
    whole = attend(batch, window_left=window_left)
    for first in (1, 2, 37, 64, 101, 148):
        alone = make_batch(USUAL, [150], [150 - first])
        alone.q.copy_(batch.q[first:])
        for pages, source in ((alone.k_pages, batch.k_pages), (alone.v_pages, batch.v_pages)):
            for page, wanted in zip(alone.page_table[0, :10], batch.page_table[0, :10], strict=True):
                pages[:, page] = source[:, wanted]
        out, lse = attend(alone, window_left=window_left)
        assert torch.equal(out, whole.out[first:])
        assert torch.equal(lse, whole.lse[first:])


def test_weights_smaller_than_normal_numbers_count_as_zero_and_spoil_nothing():
    batch = make_batch(SMALL, [130], [130])
    batch.q.mul_(60.0)
    check(batch)
    batch.v_pages.mul_(2.0**-120)
    assert attend(batch).out.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_no_number_spoils_its_own_rows_alone(value):
    batch = make_batch(SMALL, [70], [70])
    wanted = attend(batch).out
    batch.q[5, 2, 9] = value
    got = attend(batch).out
    assert got[5, 2].isnan().all()
    others = torch.ones(got.shape[:2], dtype=torch.bool)
    others[5, 2] = False
    assert torch.equal(got[others], wanted[others])


def test_scratch_of_another_call_reaches_no_result():
    """A long prompt leaves scores, weights and values behind; a short one's squares reach over them."""
    batch = make_batch(USUAL, [5], [5])
    wanted = attend(batch)
    poison = make_batch(USUAL, [300], [300])
    poison.q.fill_(float("nan"))
    poison.v_pages.fill_(float("nan"))
    attend(poison)
    for got, expected in zip(attend(batch), wanted, strict=True):
        assert torch.equal(got, expected)


def test_plans_say_so():
    text = plan_for(make_batch(USUAL, [70], [70])).explain()
    assert "multiplies bfloat16 numbers, in AMX's tile registers" in text
