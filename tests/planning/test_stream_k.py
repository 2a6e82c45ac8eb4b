"""The planner's arithmetic compiled is its own Python source: no overflow, no unbound name, no other division."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.planning import stream_k as cut
from quire.planning.split import Sequences, Tiles
from quire.planning.work_list import TileShape, Tiling, WorkList


def shares(step, tiles, measure=cut.measure_work, share=cut.share_work):
    """One kernel's work list in an array of its own."""
    measured = measure(step, tiles)
    lists = np.full(measured[0], -99)
    return WorkList(lists, *share(lists, 0, measured, step))


def shares_in_python(step, tiles):
    return shares(step, tiles, cut.measure_work.py_func, cut.share_work.py_func)


def sequences_of(lengths, *rules):
    starts = np.array([0, *np.cumsum([q for _, q in lengths])], np.int64)
    return Sequences(np.array([n for n, _ in lengths], np.int64), starts, *rules)


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
    item_cost=st.sampled_from([0, 16, 90]),
    whole_tiles=st.booleans(),
    num_kv_heads=st.integers(1, 3),
    causal=st.booleans(),
    window_left=st.integers(-1, 40),
    num_workers=st.integers(1, 12),
)
def test_compiled_shares_are_those_of_the_python_source(
    sequences, least_q, more_q, q_tokens, kv_split, kv_tokens, part_cost, item_cost, whole_tiles, num_kv_heads,
    causal, window_left, num_workers,
):  # fmt: skip
    step = sequences_of(sequences, num_kv_heads, causal, window_left)
    tiles = Tiles(
        least_q,
        least_q + more_q,
        q_tokens,
        kv_tokens,
        part_cost,
        item_cost,
        num_workers,
        kv_split,
        whole_tiles,
    )
    assert_same_work(shares(step, tiles), shares_in_python(step, tiles))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), max_size=5),
    decode_max_q_len=st.integers(0, 4),
    whole_tiles=st.booleans(),
    kv_split=st.sampled_from([0, 32]),
)
def test_a_steps_two_lists_are_those_of_its_two_kinds_of_sequence(
    lengths, decode_max_q_len, whole_tiles, kv_split
):
    step = sequences_of(lengths, 2, True, -1)
    tiling = Tiling(
        3, TileShape(4, 16), TileShape(8, 32, 5, 64), decode_max_q_len, whole_tiles, kv_split=kv_split
    )

    numbers, longest, *work = cut.share_step(7, step, tiling)

    decode = shares(step, Tiles(1, decode_max_q_len, 4, 16, 0, 16, 3, kv_split, whole_tiles))
    prefill = shares(step, Tiles(decode_max_q_len + 1, 99, 8, 32, 64, 16, 5, kv_split, whole_tiles))
    for got, wanted in zip(work, (decode, prefill), strict=True):
        assert_same_work(WorkList(numbers, *got), wanted)
    assert work[0][0] == 7
    assert longest == max((q for _, q in lengths), default=0)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=5),
    far=st.sampled_from([0, 2**31 - 1]),
    dtypes=st.tuples(*[st.sampled_from([np.int32, np.int64])] * 2),
    one_query=st.booleans(),
    max_pages=st.integers(10, 12),
    data=st.data(),
)
def test_a_step_is_copied_from_integers_of_either_width(lengths, far, dtypes, one_query, max_pages, data):
    batch, page_size = len(lengths), 4
    tiling = Tiling(3, TileShape(8, 32), TileShape(8, 32), decode_max_q_len=4)
    seq_lens = np.array([n for n, _ in lengths], dtypes[0])
    starts = np.array([0, *np.cumsum([q for _, q in lengths])], dtypes[1])
    ids = st.lists(st.integers(0, 2**31 - 1), min_size=batch * max_pages, max_size=batch * max_pages)
    table = np.array(data.draw(ids), np.int32).reshape(batch, max_pages)
    fits = not (far and batch)
    if not fits:
        seq_lens[-1] = far
    places = [seq_lens.ctypes.data, seq_lens.itemsize, starts.ctypes.data, starts.itemsize, table.ctypes.data]
    if one_query:
        starts, places[2:4] = np.arange(len(starts)), [0, 0]

    numbers, is_step, *sizes, decode, prefill = cut.cut_step(
        *places, *table.strides, batch, max_pages, page_size, tiling, 2, True, -1, 2**31 - 1, False
    )

    np.testing.assert_array_equal(numbers[:batch], seq_lens)
    np.testing.assert_array_equal(numbers[batch : 2 * batch + 1], starts)
    assert is_step == fits
    if not fits:
        assert len(numbers) == 2 * batch + 1
        return
    used = np.arange(max_pages) < -(-seq_lens // page_size)[:, None]
    copied = numbers[2 * batch + 1 :].view(np.int32)[: table.size].reshape(table.shape)
    np.testing.assert_array_equal(copied[used], table[used])
    highest = table[used].max(initial=-1)
    assert sizes == [starts[-1], np.diff(starts).max(initial=0), seq_lens.max(initial=0), highest]
    step = Sequences(seq_lens.astype(np.int64), starts.astype(np.int64), 2, True, -1)
    assert_same_work(WorkList(numbers, *decode), shares(step, Tiles(1, 4, 8, 32, 0, 16, 3, 0, False)))
    assert_same_work(WorkList(numbers, *prefill), shares(step, Tiles(5, 9, 8, 32, 0, 16, 3, 0, False)))


def test_a_step_whose_table_is_elsewhere_has_no_page_ids():
    seq_lens, batch = np.array([9, 3]), 2
    tiling = Tiling(3, TileShape(1, 32), TileShape(8, 32))
    with_table, without = (
        cut.cut_step(seq_lens.ctypes.data, 8, 0, 0, at, 12, 4, batch, 3, 4, tiling, 2, True, -1, 2, False)
        for at in (np.zeros(6, np.int32).ctypes.data, 0)
    )
    assert len(without[0]) == len(with_table[0]) - 3  # six ids of four bytes
    assert without[2:5] == with_table[2:5]
    assert without[5] == -1
    for got, wanted in zip(without[6:], with_table[6:], strict=True):
        assert_same_work(WorkList(without[0], *got), WorkList(with_table[0], *wanted))
