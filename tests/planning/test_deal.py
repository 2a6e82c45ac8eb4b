"""Dealt tiles: each once, where it is free first, and evenly or not at all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.planning import deal
from quire.planning.split import Sequences, Tiles
from quire.planning.step import plan_step
from quire.planning.stream_k import share_step
from quire.planning.work_list import ITEM, TileShape, Tiling, WorkList


def step_of(sequences, num_kv_heads=8, causal=True, window_left=-1):
    starts = np.array([0, *np.cumsum([q for _, q in sequences])], np.int64)
    return Sequences(np.array([n for n, _ in sequences], np.int64), starts, num_kv_heads, causal, window_left)


def dealt(sequences, num_kv_heads, num_workers):
    """Tiles of 32 queries and blocks of 128 keys, each of which costs 370 keys more."""
    tiles = Tiles(1, 10**9, 32, 128, 0, 16, num_workers, 0, True)
    return deal.deal_tiles(step_of(sequences, num_kv_heads), tiles, 370)


@settings(max_examples=60)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 20)), max_size=6),
    least_q=st.integers(1, 3),
    q_tokens=st.integers(1, 9),
    kv_tokens=st.sampled_from([1, 4, 16]),
    tile_cost=st.sampled_from([0, 5, 40]),
    num_kv_heads=st.integers(1, 3),
    causal=st.booleans(),
    window_left=st.integers(-1, 40),
    num_workers=st.integers(1, 12),
)
def test_the_tiles_are_those_of_the_line_of_work(
    sequences, least_q, q_tokens, kv_tokens, tile_cost, num_kv_heads, causal, window_left, num_workers
):
    step = step_of(sequences, num_kv_heads, causal, window_left)
    arguments = (step, Tiles(least_q, 99, q_tokens, kv_tokens, 0, 16, num_workers, 0, True), tile_cost)

    items, worker_indptr, evenly = deal.deal_tiles(*arguments)
    tiling = Tiling(1, TileShape(1, 1), TileShape(q_tokens, kv_tokens), least_q - 1, whole_tiles=True)
    numbers, _, _, many = share_step(0, step, tiling)
    uncut = WorkList(numbers, *many)

    assert sorted(map(tuple, items)) == sorted(map(tuple, uncut.items))
    assert worker_indptr[0] == 0
    assert worker_indptr[-1] == len(items)
    assert (np.diff(worker_indptr) >= 0).all()
    by_python = deal.deal_tiles.py_func(*arguments)
    np.testing.assert_array_equal(items, by_python[0])
    np.testing.assert_array_equal(worker_indptr, by_python[1])
    assert evenly == by_python[2]


def cost_of_shares(items, worker_indptr, kv_tokens, tile_cost):
    blocks = np.maximum(1, -(-(items[:, 6] - items[:, 5]) // kv_tokens))
    total = np.concatenate([[0], np.cumsum(blocks * kv_tokens + tile_cost)])
    return np.diff(total[worker_indptr])


def test_no_worker_is_later_than_the_others_by_more_than_a_tile():
    sequences = [(8192, 8192), (100, 100), (5000, 77)]
    items, indptr, evenly = dealt(sequences, 8, 132)

    cost = cost_of_shares(items, indptr, 128, 370)

    assert evenly
    assert cost.max() - cost.min() <= 8192 + 370
    assert cost.max() <= 1.02 * cost.mean()


def test_a_worker_takes_its_heavy_tiles_first():
    sequences = [(4096, 4096)]
    items, indptr, _ = dealt(sequences, 2, 16)

    for worker in range(16):
        share = items[indptr[worker] : indptr[worker + 1]]
        assert (np.diff(share[:, 6]) <= 0).all()


def test_heads_too_long_for_a_cache_come_one_after_another():
    sequences = [(deal.GROUP_TOKENS, 4096)]
    items, indptr, _ = dealt(sequences, 3, 16)

    for worker in range(16):
        heads = items[indptr[worker] : indptr[worker + 1], 1]
        assert (np.diff(heads) >= 0).all()
        assert set(heads) == {0, 1, 2}


def test_too_few_tiles_are_not_called_even():
    sequences = [(32768, 256)]  # 64 tiles of 256 blocks
    assert not dealt(sequences, 8, 132)[2]


@settings(max_examples=100)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=6),
    num_workers=st.integers(1, 12),
    decode_max_q_len=st.integers(0, 20),
)
def test_a_step_that_may_be_dealt_has_the_work_of_one_that_may_not(sequences, num_workers, decode_max_q_len):
    sequences = [(max(n, q), q) for n, q in sequences]

    def plan(prefill_tile_cost):
        shape = TileShape(4, 16)
        tiling = Tiling(
            num_workers, shape, shape, decode_max_q_len, whole_tiles=True, prefill_tile_cost=prefill_tile_cost
        )
        return plan_step(
            torch.zeros(len(sequences), 300, dtype=torch.int32),
            torch.tensor([n for n, _ in sequences], dtype=torch.int64),
            torch.tensor([0, *[q for _, q in sequences]]).cumsum(0),
            num_kv_heads=2, page_size=1, causal=True, window_left=-1, tiling=tiling,
        )  # fmt: skip

    def keys_of(work):
        """How many keys the parts of each tile have."""
        keys = Counter()
        for item in work.items:
            keys[tuple(item[: ITEM.q_position])] += item[ITEM.kv_end] - item[ITEM.kv_begin]
        return keys

    maybe, never = plan(30), plan(0)
    np.testing.assert_array_equal(maybe.decode.items, never.decode.items)
    assert keys_of(maybe.prefill) == keys_of(never.prefill)
    assert maybe.prefill.num_items == maybe.prefill.worker_indptr[-1]
