"""The planner's arithmetic compiled is its own Python source: no overflow, no unbound name, no other division."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.planning import stream_k as cut
from quire.planning.work_list import TileShape, Tiling, WorkList


def shares(step, kv_split, part_cost, rules, measure=cut.measure_work, share=cut.share_work):
    """One kernel's work list in an array of its own."""
    measured = measure(*step, kv_split, part_cost, *rules)
    lists = np.full(measured[0], -99)
    return WorkList(lists, *share(lists, 0, measured, *step, *rules))


def shares_in_python(*arguments):
    return shares(*arguments, cut.measure_work.py_func, cut.share_work.py_func)


def assert_same_work(got, wanted):
    assert got[2:] == wanted[2:]
    for name in ("worker_indptr", "items", "merges"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


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
    step = (seq_lens, starts, least_q, least_q + more_q, q_tokens, kv_tokens)
    rules = (whole_tiles, num_kv_heads, causal, window_left, num_workers)

    assert_same_work(
        shares(step, kv_split, part_cost, rules), shares_in_python(step, kv_split, part_cost, rules)
    )


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


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), max_size=5),
    decode_max_q_len=st.integers(0, 4),
    whole_tiles=st.booleans(),
    kv_split=st.sampled_from([0, 32]),
)
def test_a_steps_two_lists_are_those_of_its_two_kinds_of_sequence(
    lengths, decode_max_q_len, whole_tiles, kv_split
):
    seq_lens = np.array([n for n, _ in lengths], np.int64)
    starts = np.array([0, *np.cumsum([q for _, q in lengths])], np.int64)
    rules = (2, True, -1)  # KV heads, causal, no window
    tiling = Tiling(
        3, TileShape(4, 16), TileShape(8, 32, 5, 64), decode_max_q_len, whole_tiles, kv_split=kv_split
    )

    numbers, longest, *work = cut.share_step(7, seq_lens, starts, tiling, *rules)

    decode = shares((seq_lens, starts, 1, decode_max_q_len, 4, 16), kv_split, 0, (whole_tiles, *rules, 3))
    prefill = shares(
        (seq_lens, starts, decode_max_q_len + 1, 99, 8, 32), kv_split, 64, (whole_tiles, *rules, 5)
    )
    for got, wanted in zip(work, (decode, prefill), strict=True):
        assert_same_work(WorkList(numbers, *got), wanted)
    assert work[0][0] == 7
    assert longest == max((q for _, q in lengths), default=0)


@given(
    seq_lens=st.lists(st.integers(-2, 12), max_size=4),
    starts=st.lists(st.integers(-1, 5), min_size=5, max_size=5),
    ordered=st.booleans(),
)
def test_a_step_has_lengths_within_its_table_and_starts_that_only_grow(seq_lens, starts, ordered):
    starts = [0, *sorted(starts)][: len(seq_lens) + 1] if ordered else starts[: len(seq_lens) + 1]
    wanted = starts[0] == 0 and sorted(starts) == starts and all(0 <= n <= 10 for n in seq_lens)
    arrays = np.array(seq_lens, np.int64), np.array(starts, np.int64)
    assert cut.is_step(*arrays, 10) == cut.is_step.py_func(*arrays, 10) == wanted


@given(
    lengths=st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 9)), max_size=5),
    dtypes=st.tuples(*[st.sampled_from([np.int32, np.int64])] * 2),
    one_query=st.booleans(),
    table=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9),
    capacity=st.sampled_from([0, 50, 2**31 - 1]),
)
def test_a_step_is_copied_from_integers_of_either_width(lengths, dtypes, one_query, table, capacity):
    batch, tiling = len(lengths), Tiling(3, TileShape(8, 32), TileShape(8, 32), decode_max_q_len=4)
    seq_lens = np.array([n for n, _ in lengths], dtypes[0])
    starts = np.array([0, *np.cumsum([q for _, q in lengths])], dtypes[1])
    table = np.array(table, np.int32)
    places = [seq_lens.ctypes.data, seq_lens.itemsize, starts.ctypes.data, starts.itemsize, table.ctypes.data]
    if one_query:
        starts, places[2:4] = np.arange(len(starts)), [0, 0]

    numbers, fits, *sizes, decode, prefill = cut.cut_step(
        *places, len(table), batch, capacity, tiling, 2, True, -1
    )

    np.testing.assert_array_equal(numbers[:batch], seq_lens)
    np.testing.assert_array_equal(numbers[batch : 2 * batch + 1], starts)
    assert fits == (seq_lens.max(initial=0) <= capacity)
    if not fits:
        assert len(numbers) == 2 * batch + 1
        return
    np.testing.assert_array_equal(numbers[2 * batch + 1 :].view(np.int32)[: len(table)], table)
    assert sizes == [starts[-1], np.diff(starts).max(initial=0), seq_lens.max(initial=0)]
    rules = (False, 2, True, -1, 3)
    wide = seq_lens.astype(np.int64), starts.astype(np.int64)
    assert_same_work(WorkList(numbers, *decode), shares((*wide, 1, 4, 8, 32), 0, 0, rules))
    assert_same_work(WorkList(numbers, *prefill), shares((*wide, 5, 9, 8, 32), 0, 0, rules))
