"""Prefill against the float64 reference: many queries per sequence, over cached prefixes, beside decode rows."""

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

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Each is one compilation: (q dtype, page dtype, head_dim); the group is a number at run time. A tile holds 96
# rows, so groups of 7, 24 and 71 leave padding rows and 100 takes two passes over one token.
SMALL, NARROW = Shape(F32, 16, group=3), Shape(F32, 40, 3, kv_dtype="fp8_e5m2")
SHAPES = [
    SMALL,
    Shape(BF16, 128, group=4),
    Shape(BF16, 64, group=4, kv_dtype="int8"),
    NARROW,
]
MORE_SHAPES = [
    Shape(F32, 1, group=1, num_kv_heads=3),
    Shape(F32, 40, group=2),
    Shape(F16, 80, group=1, num_kv_heads=1),
    Shape(F32, 64, group=1),
    Shape(F32, 256, group=1, num_kv_heads=1),
    Shape(F32, 8, group=16),
    Shape(BF16, 72, group=7, num_kv_heads=1),
    Shape(F16, 72, group=2, kv_dtype="fp8_e4m3"),
]


def grouped(shapes, *marks):
    """All tests of a kernel go to one xdist worker, which compiles it once."""
    return [
        pytest.param(
            s,
            id=str(s),
            marks=[pytest.mark.xdist_group(f"prefill-{s.dtype}-{s.head_dim}-{s.kv_dtype}"), *marks],
        )
        for s in shapes
    ]


every_shape = pytest.mark.parametrize(
    "shape", [*grouped(SHAPES), *grouped(MORE_SHAPES, pytest.mark.exhaustive)]
)
few_shapes = pytest.mark.parametrize("shape", grouped([SMALL, NARROW]))

FEATURES = [
    {},
    {"window": True},
    {"softcap": True},
    {"alibi": True},
    {"sinks": True},
    {"tree": True},
    {"window": True, "softcap": True, "alibi": True, "sinks": True, "tree": True},
]
MIXED = (
    [1, 40, 65, 130, 0, 20],
    [1, 40, 2, 33, 3, 25],
)  # decode, whole, chunked, empty, more queries than keys


@every_shape
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_it_equals_the_reference_at_every_edge_of_a_page(shape, page_size):
    lengths = [2, page_size, page_size + 1, 2 * page_size + 1, 64, 65]
    q_lens = [2, min(page_size, 2), page_size + 1, 2, 64, 20]
    check(make_batch(shape, lengths, q_lens, page_size=page_size), workers=3)


@every_shape
def test_it_equals_the_reference_with_every_feature_at_once(shape):
    batch = make_batch(shape, *MIXED, page_size=3, layout="gaps", strided_q=True, share=0.3)
    for seed in range(2):
        check(batch, workers=3, **features(batch, seed=seed, **FEATURES[-1]))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 24, 71, 95, 96, 97, 200])
def test_any_number_of_query_heads_may_share_a_kv_head(group):
    batch = make_batch(Shape(F32, 16, group=group), [40, 70, 600], [20, 3, 2], page_size=16)
    check(batch, workers=1, **features(batch, alibi=True, sinks=True))
    check(
        batch, workers=7, **features(batch, alibi=True, sinks=True)
    )  # splits the last tile of a token's heads


@few_shapes
@pytest.mark.parametrize("asked", FEATURES, ids=lambda asked: "+".join(asked) or "none")
@pytest.mark.parametrize("causal", [True, False])
def test_each_feature_equals_the_reference_beside_decode_rows(shape, asked, causal):
    batch = make_batch(shape, *MIXED, page_size=16)
    for seed in range(2):
        check(batch, workers=2, causal=causal, **features(batch, seed=seed, **asked))


@few_shapes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_read_through_whatever_strides_they_have(shape, layout):
    check(make_batch(shape, *MIXED, page_size=16, layout=layout, strided_q=True), workers=3)


@few_shapes
def test_pages_may_repeat_and_belong_to_several_sequences(shape):
    batch = make_batch(shape, [40, 33, 64, 100, 7], [40, 1, 5, 70, 7], page_size=8, share=0.7, seed=3)
    used = batch.page_table[3, :13].tolist()
    assert len(set(used)) < len(used), "the case has a repeated page"
    check(batch, workers=3)


@few_shapes
@pytest.mark.parametrize("causal", [True, False])
def test_a_windows_first_key_is_the_one_window_left_positions_back(shape, causal):
    batch = make_batch(shape, [17, 65, 129, 40], [17, 64, 3, 40], page_size=16)
    for window_left in (0, 1, 15, 16, 17, 63, 64, 200):
        check(batch, workers=3, window_left=window_left, causal=causal)


@few_shapes
def test_pages_before_a_window_are_never_read(shape):
    for window_left in (0, 15, 17, 64):
        batch = make_batch(shape, [17, 65, 129, 100], [17, 20, 3, 40], page_size=16)
        whole = attend(batch, workers=3, window_left=window_left)
        assert give_back_unseen(batch, window_left)
        for part, wanted in zip(attend(batch, workers=3, window_left=window_left), whole, strict=True):
            assert torch.equal(part, wanted)


@few_shapes
def test_rows_before_the_first_key_are_zero_and_the_others_unharmed(shape):
    batch = make_batch(shape, [5, 0, 1], [9, 4, 2], page_size=4)
    state = check(batch, workers=3)
    for row in (0, 1, 2, 3, 9, 10, 11, 12, 13):
        assert (state.out[row] == 0).all()
        assert state.lse[row].isneginf().all()
    assert state.lse[[4, 8, 14]].isfinite().all()


@few_shapes
def test_a_chunk_over_a_cached_prefix_equals_the_same_rows_of_a_whole_prompt(shape):
    whole = make_batch(shape, [150], [150], page_size=16)
    wanted = attend(whole, workers=2)
    chunk = make_batch(shape, [150], [150], page_size=16)
    chunk.q, chunk.cu_seqlens_q = whole.q[97:], torch.tensor([0, 53], dtype=torch.int32)
    got = attend(chunk, workers=3)
    tight = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}[shape.dtype]
    torch.testing.assert_close(got.out, wanted.out[97:], atol=tight, rtol=0)
    torch.testing.assert_close(got.lse, wanted.lse[97:], atol=1e-5, rtol=0)


@few_shapes
def test_a_tree_masks_rows_and_columns_are_the_packed_query_and_its_sequences_new_token(shape):
    # A tree of two branches over one root, in a batch behind another sequence: each branch gives what it
    # gives when it is decoded alone.
    batch = make_batch(shape, [9, 20], [9, 5], page_size=4)
    branches = torch.zeros(14, 9, dtype=torch.bool)
    branches[:9] = True
    for row, parents in enumerate([[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4]]):
        branches[9 + row, parents] = True
    tree = check(batch, workers=2, tree_mask=branches)
    first = make_batch(shape, [9, 20], [9, 5], page_size=4)
    first.q = batch.q[9:12]
    first.page_table = batch.page_table[1:]
    first.seq_lens = torch.tensor([18], dtype=torch.int32)
    first.cu_seqlens_q = torch.tensor([0, 3], dtype=torch.int32)
    assert torch.equal(tree.lse[9], attend(first).lse[0])
    torch.testing.assert_close(tree.out[9:12], attend(first).out, atol=1e-6, rtol=0)


@few_shapes
def test_every_number_of_workers_gives_the_same_result_within_rounding(shape):
    batch = make_batch(shape, [300, 3, 90, 0], [7, 3, 90, 2], page_size=16)
    for workers in (1, 2, 3, 5, 16):
        check(batch, workers=workers)


@pytest.mark.parametrize("shape", grouped([SMALL, NARROW]))
@settings(max_examples=60)
@given(data=st.data())
def test_any_batch_equals_the_reference(shape, data):
    draw = data.draw
    sequence = st.tuples(st.integers(0, 140) | st.sampled_from([64, 65, 128]), st.integers(0, 70))
    sequences = draw(st.lists(sequence, min_size=1, max_size=4).filter(lambda s: any(q for _, q in s)))
    batch = make_batch(
        Shape(shape.dtype, shape.head_dim, draw(st.sampled_from([1, 3, 7, 20])), shape.kv_dtype),
        [length for length, _ in sequences],
        [q_len for _, q_len in sequences],
        page_size=draw(st.sampled_from([1, 2, 3, 5, 16, 64, 100])),
        layout=draw(st.sampled_from(LAYOUTS)),
        share=draw(st.sampled_from([0.0, 0.5])),
        strided_q=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    names = draw(st.sets(st.sampled_from(["window", "softcap", "alibi", "sinks", "tree"])))
    rules = features(batch, seed=draw(st.integers(0, 1000)), **dict.fromkeys(names, True))
    check(batch, workers=draw(st.integers(1, 9)), causal=draw(st.booleans()), **rules)


@every_shape
def test_no_byte_beyond_the_tensors_is_touched(shape):
    assert_no_byte_beyond_is_touched(make_batch(shape, [48, 33], [3, 20], page_size=16))
