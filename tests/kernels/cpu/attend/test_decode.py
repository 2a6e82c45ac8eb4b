"""Decode against the float64 reference: one query per sequence, poison wherever no key lies."""

from dataclasses import replace

import pytest
import torch
from accuracy import check
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    Shape,
    assert_no_byte_beyond_is_touched,
    attend,
    features,
    give_back_unseen,
    make_batch,
)

from quire.kernels import cpu, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Each is one compilation: (q dtype, page dtype, head_dim, query heads per tile), from one vector lane to a
# group of several tiles, whole vectors and tails.
SMALL, SPLIT = Shape(F32, 64, group=2), Shape(F32, 16, group=3)
INT8, NARROW = Shape(BF16, 64, group=4, kv_dtype="int8"), Shape(F32, 40, group=3, kv_dtype="fp8_e5m2")
ODD = Shape(BF16, 88, group=7)  # five vectors, of which the first four are taken apart in pairs, and a tail
SHAPES = [
    SMALL,
    SPLIT,
    Shape(F32, 16, group=100, num_kv_heads=1),  # seven tiles of 15, the last one short
    ODD,
    INT8,
    NARROW,
]
MORE_SHAPES = [
    Shape(F32, 1, group=1, num_kv_heads=3),
    Shape(F16, 80, group=1, kv_dtype="fp8_e4m3", num_kv_heads=1),
    Shape(F32, 40, group=2),
    Shape(F32, 256, group=2, num_kv_heads=1),
    Shape(F32, 8, group=16),
    Shape(F32, 64, group=24, num_kv_heads=1),  # two tiles of 12
    Shape(F16, 64, group=8),
    Shape(F16, 80, group=1, num_kv_heads=1),
    Shape(BF16, 128, group=4),
    Shape(BF16, 64, group=71, num_kv_heads=1),  # five tiles of 15, the last one short
    Shape(
        BF16, 128, group=12, kv_dtype="fp8_e4m3", num_kv_heads=1
    ),  # two tiles of 6 where pairs are multiplied
    Shape(F16, 72, group=2, kv_dtype="fp8_e4m3"),
]


def grouped(shapes, *marks):
    """All tests of a shape go to one xdist worker, which compiles it once."""
    return [
        pytest.param(s, id=str(s), marks=[pytest.mark.xdist_group(f"decode-{s}"), *marks]) for s in shapes
    ]


every_shape = pytest.mark.parametrize(
    "shape", [*grouped(SHAPES), *grouped(MORE_SHAPES, pytest.mark.exhaustive)]
)
few_shapes = pytest.mark.parametrize("shape", grouped([SMALL, SPLIT, NARROW]))

FEATURES = [
    {},
    {"window": True},
    {"softcap": True},
    {"alibi": True},
    {"sinks": True},
    {"tree": True},
    {"window": True, "softcap": True, "alibi": True, "sinks": True, "tree": True},
]


@every_shape
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_it_equals_the_reference_at_every_edge_of_a_page(shape, page_size):
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size + 1, 63, 64, 65, 200]
    check(make_batch(shape, lengths, page_size=page_size), workers=3)


@every_shape
def test_it_equals_the_reference_with_every_feature_at_once(shape):
    batch = make_batch(shape, [1, 0, 5, 70, 130], page_size=3, layout="gaps", strided_q=True, share=0.3)
    for seed in range(4):
        check(batch, workers=3, **features(batch, seed=seed, **FEATURES[-1]))


@few_shapes
@pytest.mark.parametrize("asked", FEATURES, ids=lambda asked: "+".join(asked) or "none")
@pytest.mark.parametrize("causal", [True, False])
def test_each_feature_equals_the_reference(shape, asked, causal):
    batch = make_batch(shape, [1, 0, 17, 70, 130], page_size=16)
    for seed in range(3):
        check(batch, workers=2, causal=causal, **features(batch, seed=seed, **asked))


@few_shapes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_read_through_whatever_strides_they_have(shape, layout):
    batch = make_batch(shape, [5, 33, 64, 100], page_size=16, layout=layout, strided_q=True)
    check(batch, workers=3)


@few_shapes
def test_pages_may_repeat_and_belong_to_several_sequences(shape):
    batch = make_batch(shape, [40, 33, 64, 100, 7], page_size=8, share=0.7, seed=3)
    used = batch.page_table[3, :13].tolist()
    assert len(set(used)) < len(used), "the case has a repeated page"
    check(batch, workers=3)


@few_shapes
def test_a_windows_first_key_is_the_one_window_left_positions_back(shape):
    # Over lengths around a block of 64 and windows around a page: each of the limits, to the token.
    batch = make_batch(shape, [1, 16, 17, 63, 64, 65, 129], page_size=16)
    for window_left in (0, 1, 15, 16, 17, 63, 64, 200):
        check(batch, workers=3, window_left=window_left)


@few_shapes
def test_pages_before_a_window_are_never_read(shape):
    for window_left in (0, 15, 17, 64):
        batch = make_batch(shape, [1, 16, 17, 63, 64, 65, 129], page_size=16)
        whole = attend(batch, workers=3, window_left=window_left)
        assert give_back_unseen(batch, window_left)
        for part, wanted in zip(attend(batch, workers=3, window_left=window_left), whole, strict=True):
            assert torch.equal(part, wanted)


@few_shapes
def test_a_window_of_one_gives_back_the_last_value(shape):
    batch = make_batch(shape, [65, 3, 16], page_size=16)
    out = attend(batch, window_left=0).out
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        page, slot = divmod(seq_len - 1, 16)
        value = batch.v_pages[:, batch.page_table[i, page], slot].float()
        if batch.scales:
            value = value * batch.scales["v_scale"][:, batch.page_table[i, page], slot, None]
        wanted = value.repeat_interleave(shape.group, 0).to(shape.dtype)
        torch.testing.assert_close(out[i], wanted, rtol=1e-6, atol=1e-6)


@few_shapes
def test_scores_far_apart_neither_overflow_nor_vanish(shape):
    batch = make_batch(shape, [3, 70, 200], page_size=16)
    for softmax_scale in (0.0, 1e-4, 5.0, -2.0):
        state = check(batch, workers=3, softmax_scale=softmax_scale)
        assert state.lse.isfinite().all()


@few_shapes
def test_a_sink_far_above_the_scores_leaves_nothing_and_one_far_below_changes_nothing(shape):
    batch = make_batch(shape, [3, 0, 200], page_size=16)
    heads = batch.q.shape[1]
    high = attend(batch, sinks=torch.full((heads,), 300.0))
    assert (high.out == 0).all()
    assert high.lse[:, 0].tolist() == [300.0, 300.0, 300.0]
    without, low = attend(batch), attend(batch, sinks=torch.full((heads,), -300.0))
    assert torch.equal(without.out, low.out)
    assert torch.equal(without.lse[::2], low.lse[::2])
    assert (low.lse[1] == -300.0).all()  # the row without keys


@few_shapes
def test_a_mask_that_hides_the_queries_own_key_leaves_the_earlier_ones(shape):
    batch = make_batch(shape, [1, 0, 64, 65, 130], page_size=16)
    hidden = torch.zeros(5, 1, dtype=torch.bool)
    state = check(batch, workers=3, tree_mask=hidden)
    assert (state.out[:2] == 0).all()
    assert state.lse[:2].isneginf().all()
    earlier = make_batch(shape, [1, 0, 64, 65, 130], page_size=16)
    earlier.seq_lens -= torch.tensor([1, 0, 1, 1, 1], dtype=torch.int32)
    assert torch.equal(state.out, attend(earlier).out)


@few_shapes
def test_every_number_of_workers_gives_the_same_result_within_rounding(shape):
    batch = make_batch(shape, [700, 3, 90, 0, 31], page_size=16)
    for workers in (1, 2, 3, 5, 16):
        check(batch, workers=workers)


@pytest.mark.parametrize("shape", grouped([SMALL, NARROW]))
@settings(max_examples=60)
@given(data=st.data())
def test_any_batch_equals_the_reference(shape, data):
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 150) | st.sampled_from([63, 64, 65, 128]), min_size=1, max_size=5))
    batch = make_batch(
        shape,
        lengths,
        page_size=draw(st.sampled_from([1, 2, 3, 5, 16, 64, 100])),
        layout=draw(st.sampled_from(LAYOUTS)),
        share=draw(st.sampled_from([0.0, 0.5])),
        strided_q=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    names = draw(st.sets(st.sampled_from(["window", "softcap", "alibi", "sinks", "tree"])))
    rules = features(batch, seed=draw(st.integers(0, 1000)), **dict.fromkeys(names, True))
    check(batch, workers=draw(st.integers(1, 9)), causal=draw(st.booleans()), **rules)


@pytest.mark.parametrize("shape", grouped([SMALL, ODD, INT8, NARROW]))
def test_no_byte_beyond_the_tensors_is_touched(shape):
    assert_no_byte_beyond_is_touched(make_batch(shape, [48, 33], [1, 1], page_size=16))


@pytest.mark.parametrize("shape", grouped([INT8]))
def test_pools_above_two_to_the_31_elements_are_addressed_to_their_end(shape):
    shape = replace(shape, num_kv_heads=1)  # so that a page's offset alone passes 2³¹
    page_size = 16
    num_pages = 2**31 // (page_size * shape.head_dim) + 8
    sizes = (shape.num_kv_heads, num_pages, page_size, shape.head_dim)
    try:  # the system provides the pages that are touched, and no others
        pages = [torch.empty(sizes, dtype=torch.int8) for _ in range(2)]
        scales = [torch.empty(sizes[:3]) for _ in range(2)]
    except RuntimeError:
        pytest.skip("this machine does not promise 5 GiB of address space")
    assert pages[0].numel() > 2**31
    batch = make_batch(shape, [48], page_size=page_size)
    last = torch.tensor([num_pages - 1, num_pages - 3, num_pages - 2])
    small = batch.page_table[0, :3].long()
    for big, little in zip(
        (*pages, *scales), (batch.k_pages, batch.v_pages, *batch.scales.values()), strict=True
    ):
        big[:, last] = little[:, small]
    wanted = attend(batch)
    slots = (last[:, None] * page_size + torch.arange(page_size)).flatten()
    batch.k_pages, batch.v_pages = pages
    batch.scales = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    batch.page_table = last[None].to(torch.int32)
    assert torch.equal(attend(batch).out, wanted.out)

    rows = torch.randn(48, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
    written = rows, -rows, *pages, slots, *scales
    cpu.bind_write(*written)(*written)
    values, scale = reference.quantize(rows, torch.int8)
    assert torch.equal(pages[0][:, last].flatten(1, 2), values.transpose(0, 1))
    assert torch.equal(pages[1][:, last].flatten(1, 2), -values.transpose(0, 1))
    assert torch.equal(scales[1][:, last].flatten(1, 2), scale.T)
