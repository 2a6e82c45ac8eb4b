"""The planner's arithmetic compiled is its own Python source: no overflow, no unbound name, no other division."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import cut


@settings(max_examples=60)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 20)), max_size=6),
    least_q=st.integers(1, 3),
    more_q=st.integers(0, 20),
    q_tokens=st.integers(1, 9),
    kv_split=st.sampled_from([0, 1, 8, 32]),
    kv_tokens=st.sampled_from([1, 4, 16]),
    part_cost=st.sampled_from([0, 5, 40]),
    whole_tiles=st.booleans(),
    num_kv_heads=st.integers(1, 3),
    causal=st.booleans(),
    window_left=st.integers(-1, 40),
    num_workers=st.integers(1, 12),
)
def test_compiled_shares_are_those_of_the_python_source(
    sequences, least_q, more_q, q_tokens, kv_split, kv_tokens, part_cost, whole_tiles, num_kv_heads, causal,
    window_left, num_workers,
):  # fmt: skip
    seq_lens = np.array([n for n, _ in sequences], np.int64)
    starts = np.array([0, *np.cumsum([q for _, q in sequences])], np.int64)
    arguments = (
        seq_lens, starts, least_q, least_q + more_q, q_tokens, kv_tokens, kv_split,
        part_cost, whole_tiles, num_kv_heads, causal, window_left, num_workers,
    )  # fmt: skip

    items, worker_indptr, merges, num_partials = cut.share_work(*arguments)
    by_python = cut.share_work.py_func(*arguments)

    np.testing.assert_array_equal(items, by_python[0])
    np.testing.assert_array_equal(worker_indptr, by_python[1])
    np.testing.assert_array_equal(merges, by_python[2])
    assert num_partials == by_python[3]


@given(
    seq_len=st.integers(0, 50),
    q_position=st.integers(-20, 50),
    q_len=st.integers(1, 20),
    causal=st.booleans(),
    window_left=st.integers(-1, 30),
)
def test_the_visible_range_is_the_union_over_the_tiles_queries(
    seq_len, q_position, q_len, causal, window_left
):
    q_position = min(q_position, seq_len - q_len)  # a tile lies before the end of its sequence
    seen = [
        key
        for position in range(q_position, q_position + q_len)
        for key in range(seq_len)
        if (key <= position or not causal) and (window_left < 0 or key >= position - window_left)
    ]
    for function in (cut.visible_range, cut.visible_range.py_func):
        begin, end = function(seq_len, q_position, q_len, causal, window_left)
        assert 0 <= begin <= end <= seq_len
        assert list(range(begin, end)) == sorted(set(seen))
