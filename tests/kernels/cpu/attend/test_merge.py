"""Folding the parts of split tiles: the same result, however many parts, and however empty some of them are."""

import math

import pytest
import torch
from accuracy import check
from support import Shape, attend, make_batch, plan_for

# Shapes that test_decode and test_prefill compile too, with whole vectors and with a tail.
shapes = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            shape,
            marks=pytest.mark.xdist_group(f"decode-{shape}"),
        )
        for shape in (Shape(torch.float32, 16, 3), Shape(torch.float32, 40, 3, "fp8_e5m2"))
    ],
    ids=str,
)


def splits(batch, workers, **rules):
    """How many parts each split tile has."""
    step = plan_for(batch, workers, **rules).step
    return [*step.decode.merges[:, 4].tolist(), *step.prefill.merges[:, 4].tolist()]


@shapes
@pytest.mark.parametrize("workers", [3, 5, 13])
def test_a_long_sequence_in_any_number_of_parts_equals_the_whole(shape, workers):
    batch = make_batch(shape, [2100], page_size=16)
    assert sum(splits(batch, workers)) >= workers - 1
    split = check(batch, workers=workers)
    whole = attend(batch, workers=1)
    torch.testing.assert_close(split.out, whole.out, atol=1e-6, rtol=0)
    torch.testing.assert_close(split.lse, whole.lse, atol=2e-6, rtol=0)


@shapes
def test_every_row_of_a_split_prefill_tile_lands_in_its_own_place(shape):
    batch = make_batch(shape, [900, 5, 400], [7, 5, 31], page_size=16)
    assert max(splits(batch, 9)) >= 2
    check(batch, workers=9)


@shapes
def test_parts_that_a_row_cannot_see_weigh_nothing(shape):
    # A mask over new keys is what can hide a whole part: here the first 300 from every third row, all from
    # every seventh.
    batch = make_batch(shape, [400], [400], page_size=16)
    mask = torch.ones(400, 400, dtype=torch.bool)
    mask[::3, :300] = False
    mask[::7] = False
    assert splits(batch, 7)
    state = check(batch, workers=7, tree_mask=mask)
    assert (state.out[::7] == 0).all()
    assert state.lse[::7].isneginf().all()


@shapes
def test_a_sink_joins_once_however_many_parts_there_are(shape):
    batch = make_batch(shape, [1000, 900], [1, 3], page_size=16)
    sinks = torch.full((batch.q.shape[1],), 8.0)
    check(batch, workers=7, sinks=sinks)


@shapes
def test_parts_of_very_different_weight_are_folded_without_overflow(shape):
    batch = make_batch(shape, [700], page_size=16)
    # The first parts outweigh the others, by e^100 and more.
    keys = batch.scales.get("k_scale", batch.k_pages)
    keys[:, batch.page_table[0, :10].long()] *= 40.0
    state = check(batch, workers=5)
    assert state.lse.abs().max() > 50
    assert not math.isnan(state.out.sum().item())


@shapes
def test_results_of_split_tiles_obey_strides_of_out(shape):
    batch = make_batch(shape, [900, 400], [1, 12], page_size=16)
    wanted = attend(batch, workers=5)
    wide = torch.full((13, batch.q.shape[1] + 1, shape.head_dim + 4), 7.0)
    out = wide[:, 1:, 2:-2]
    got = attend(batch, workers=5, out=out)
    assert got.out is out
    assert torch.equal(out, wanted.out)
    assert (wide[:, 0] == 7).all()
    assert (wide[..., :2] == 7).all()
    assert (wide[..., -2:] == 7).all()
