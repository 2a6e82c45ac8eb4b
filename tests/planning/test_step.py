"""The planner: everything a query may see is some worker's work, once, and the shares are equal."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.errors import ArgumentError, ShapeError
from quire.planning.step import plan_step
from quire.planning.work_list import TileShape, Tiling

# What an item costs beside its tokens, in tokens, where a backend says nothing else.
ITEM_COST = 16


def plan(
    seq_lens,
    q_lens=None,
    *,
    num_kv_heads=1,
    page_size=16,
    causal=True,
    window_left=-1,
    num_workers=4,
    kv_tokens=16,
    q_tokens=8,
    decode_max_q_len=1,
    page_table=None,
    kv_split=0,
    part_cost=0,
    whole_tiles=False,
):
    q_lens = [1] * len(seq_lens) if q_lens is None else q_lens
    if page_table is None:
        columns = max((math.ceil(n / page_size) for n in seq_lens), default=0) + 1
        page_table = np.arange(len(seq_lens) * columns, dtype=np.int32).reshape(len(seq_lens), columns)
    return plan_step(
        torch.from_numpy(page_table),
        torch.tensor(seq_lens, dtype=torch.int64),
        torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int64),
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        causal=causal,
        window_left=window_left,
        tiling=Tiling(
            num_workers,
            TileShape(decode_max_q_len, kv_tokens, part_cost=part_cost),
            TileShape(q_tokens, kv_tokens),
            decode_max_q_len,
            whole_tiles,
            kv_split=kv_split,
        ),
    )


def visible(position, seq_len, causal, window_left):
    """Keys one query may see, by the rule of the kernel contract."""
    end = position + 1 if causal else seq_len
    begin = max(position - window_left, 0) if window_left >= 0 else 0
    return set(range(begin, max(end, begin)))


lengths = st.integers(0, 90) | st.sampled_from([0, 1, 15, 16, 17, 64, 300, 1000])
steps = st.fixed_dictionaries(
    {
        "sequences": st.lists(st.tuples(lengths, st.integers(0, 20)), max_size=7),
        "num_kv_heads": st.integers(1, 3),
        "page_size": st.sampled_from([1, 3, 16]),
        "causal": st.booleans(),
        "window_left": st.just(-1) | st.integers(0, 60),
        "num_workers": st.integers(1, 40),
        "kv_tokens": st.sampled_from([1, 4, 16, 64]),
        "q_tokens": st.sampled_from([1, 3, 8]),
    }
)
splits = st.sampled_from([1, 16, 64])


def planned(step):
    step = dict(step)
    sequences = step.pop("sequences")
    return plan([n for n, _ in sequences], [q for _, q in sequences], **step)


priced = st.fixed_dictionaries(
    {
        "part_cost": st.sampled_from([0, 5, 200]),
        "whole_tiles": st.booleans(),
        "decode_max_q_len": st.integers(1, 4),
    }
)


@settings(max_examples=200)
@given(step=steps, kv_split=st.just(0) | splits, prices=priced)
def test_items_hold_every_sequence_head_query_and_visible_key_once(step, kv_split, prices):
    step = step | prices
    got = planned({**step, "kv_split": kv_split})
    starts = got.cu_seqlens_q
    rows = Counter()  # (token, head) → times its range opens
    keys = Counter()  # (token, head, key) → times it is read
    for work in (got.decode, got.prefill):
        for sequence, head, q_begin, q_len, position, kv_begin, kv_end, partial in work.items.tolist():
            assert 0 <= kv_begin <= kv_end <= got.seq_lens[sequence]
            assert q_len >= 1
            assert starts[sequence] <= q_begin
            assert q_begin + q_len <= starts[sequence + 1]
            own = int(got.seq_lens[sequence] - (starts[sequence + 1] - starts[sequence]))
            assert position == own + q_begin - starts[sequence]
            for j in range(q_len):
                rows[q_begin + j, head] += partial < 0
                seen = visible(position + j, got.seq_lens[sequence], got.causal, got.window_left)
                for key in seen & set(range(kv_begin, kv_end)):
                    keys[q_begin + j, head, key] += 1
        for head, q_begin, q_len, _, _ in work.merges.tolist():
            for j in range(q_len):
                rows[q_begin + j, head] += 1

    wanted_rows, wanted_keys = Counter(), Counter()
    for i, seq_len in enumerate(got.seq_lens.tolist()):
        q_len = int(starts[i + 1] - starts[i])
        for j in range(q_len):
            for head in range(step["num_kv_heads"]):
                wanted_rows[int(starts[i]) + j, head] += 1
                for key in visible(seq_len - q_len + j, seq_len, got.causal, got.window_left):
                    wanted_keys[int(starts[i]) + j, head, key] += 1
    assert rows == wanted_rows
    assert keys == wanted_keys


@given(step=steps, kv_split=st.just(0) | splits)
def test_shares_are_contiguous_and_complete(step, kv_split):
    got = planned({**step, "kv_split": kv_split})
    for work in (got.decode, got.prefill):
        indptr = work.worker_indptr
        assert len(indptr) == step["num_workers"] + 1
        assert indptr[0] == 0
        assert indptr[-1] == len(work.items)
        assert (np.diff(indptr) >= 0).all()


@given(step=steps, kv_split=st.just(0) | splits)
def test_merges_name_the_split_tiles_and_their_parts_and_no_others(step, kv_split):
    got = planned({**step, "kv_split": kv_split})
    for work in (got.decode, got.prefill):
        parts = work.items[work.column("partial") >= 0]
        assert parts[:, 7].tolist() == list(range(work.num_partials)), "the parts are numbered as they come"
        named = []
        for head, q_begin, q_len, first, count in work.merges.tolist():
            assert count >= 2
            tile = parts[first : first + count]
            assert (tile[:, 1:4] == [head, q_begin, q_len]).all()
            assert (tile[1:, 5] == tile[:-1, 6]).all(), "parts follow one another along the keys"
            named += range(first, first + count)
        assert named == list(range(work.num_partials))
        if not kv_split:
            assert work.num_partials - len(work.merges) <= step["num_workers"] - 1, (
                "one cut per boundary of shares"
            )


def one_query(seq_len, **asked):
    one = dict.fromkeys(["num_kv_heads", "page_size", "num_workers", "kv_tokens", "q_tokens"], 1)
    return {**one, "sequences": [(seq_len, 1)], "causal": False, **asked}


# A tile no longer than a part, across a multiple of it; and parts of unequal length.
ACROSS = one_query(3, window_left=1)
UNEQUAL = one_query(300, window_left=52, num_kv_heads=3, num_workers=10, kv_tokens=16)


@example(step=ACROSS, part_cost=1)
@example(step=UNEQUAL, part_cost=20)
@given(step=steps, part_cost=st.sampled_from([1, 20, 400]))
def test_where_splitting_has_a_price_no_worker_pays_it_twice_while_there_is_one_for_each_part(
    step, part_cost
):
    work = planned({**step, "part_cost": part_cost}).decode
    tiles = len(work.items) - work.num_partials + len(work.merges)
    per_worker = np.diff(work.worker_indptr)
    if tiles <= step["num_workers"]:
        straddled = planned(step).decode
        longest = max((work.column("kv_end") - work.column("kv_begin")).tolist(), default=0)
        assert per_worker.max(initial=0) <= 1 or len(work.items) == len(straddled.items)
        if per_worker.max(initial=0) <= 1 and work.num_partials:
            most = straddled.kv_tokens_per_worker().max() + step["kv_tokens"]
            assert longest <= most + 2 * part_cost + ITEM_COST, "no slower than equal shares"


def test_a_tile_is_split_only_where_that_is_done_sooner():
    def longest_part(part_cost):
        work = plan([1024] * 4, num_workers=16, part_cost=part_cost).decode
        return int((work.column("kv_end") - work.column("kv_begin")).max()), work.num_partials

    assert longest_part(part_cost=100) == (256, 16), "four equal parts, each with a worker of its own"
    assert longest_part(part_cost=800) == (1024, 0), "the price is more than what the parts save"


def test_whole_tiles_weigh_the_same_however_few_rows_they_hold():
    work = plan([640, 640], [1, 8], decode_max_q_len=8, whole_tiles=True, num_workers=2).decode
    assert work.kv_tokens_per_worker().tolist() == [640, 640]


@given(step=steps)
def test_parts_are_no_slivers_and_cut_between_blocks(step):
    grain = step["kv_tokens"]
    for work in (planned(step).decode, planned(step).prefill):
        for _, _, _, first, count in work.merges.tolist():
            tile = work.items[work.column("partial") >= 0][first : first + count]
            assert (tile[1:, 5] % grain == 0).all(), "cuts lie on the sequence's own grid of blocks"
            assert tile[0, 6] - tile[0, 5] >= 2 * grain
            assert tile[-1, 6] - tile[-1, 5] >= 2 * grain


@given(step=steps, kv_split=splits)
def test_fixed_parts_lie_between_multiples_of_the_split_and_know_no_workers(step, kv_split):
    got = planned({**step, "kv_split": kv_split})
    alone = planned({**step, "kv_split": kv_split, "num_workers": 1})
    for work, other in ((got.decode, alone.decode), (got.prefill, alone.prefill)):
        np.testing.assert_array_equal(work.items, other.items)
        np.testing.assert_array_equal(work.merges, other.merges)
        begin, end = work.column("kv_begin"), work.column("kv_end")
        assert (begin // kv_split == np.maximum(end - 1, begin) // kv_split).all()
        for _, _, _, first, count in work.merges.tolist():
            tile = work.items[work.column("partial") >= 0][first : first + count]
            assert (tile[1:, 5] % kv_split == 0).all()


@given(step=steps, kv_split=splits)
def test_shares_of_fixed_parts_are_equal_but_for_a_part_at_each_end(step, kv_split):
    for work in (
        planned({**step, "kv_split": kv_split}).decode,
        planned({**step, "kv_split": kv_split}).prefill,
    ):
        if not len(work.items):
            continue
        weight = work.column("q_len") * (work.column("kv_end") - work.column("kv_begin") + ITEM_COST)
        share = np.diff(np.concatenate([[0], np.cumsum(weight)])[work.worker_indptr])
        assert share.max() <= weight.sum() / step["num_workers"] + 2 * weight.max()


@given(step=steps)
def test_sequences_with_one_query_are_decode_work_and_longer_ones_prefill(step):
    got = planned(step)
    q_lens = np.diff(got.cu_seqlens_q)
    assert set(got.decode.column("sequence")) == set(np.flatnonzero(q_lens == 1))
    assert set(got.prefill.column("sequence")) == set(np.flatnonzero(q_lens > 1))
    assert (got.prefill.column("q_len") <= step["q_tokens"]).all()


def test_decode_work_reaches_as_far_as_the_tiling_says():
    q_lens = [1, 4, 5]
    assert set(plan([9] * 3, q_lens, decode_max_q_len=4).decode.column("sequence")) == {0, 1}
    assert len(plan([9] * 3, q_lens, decode_max_q_len=0).decode.items) == 0


@given(step=steps)
def test_no_worker_has_more_than_its_share_and_a_grain_at_each_end(step):
    for work in (planned(step).decode, planned(step).prefill):
        if not len(work.items):
            continue
        q_len = work.column("q_len")
        overhead = np.where(_closes(work), ITEM_COST, 0)  # a tile's overhead goes with its last part
        weight = q_len * (work.column("kv_end") - work.column("kv_begin") + overhead)
        read = np.concatenate([[0], np.cumsum(weight)])
        share = np.diff(read[work.worker_indptr])
        slack = 2 * q_len.max() * (2 * step["kv_tokens"] + ITEM_COST)
        assert share.max() <= weight.sum() / step["num_workers"] + slack


def _closes(work):
    """Which items end their tile."""
    lasts = set((work.merges[:, 3] + work.merges[:, 4] - 1).tolist())
    return np.array([p < 0 or p in lasts for p in work.column("partial").tolist()])


@pytest.mark.parametrize("num_workers", [2, 7, 64, 132])
def test_one_long_sequence_among_short_ones_leaves_no_worker_idle(num_workers):
    work = plan([16384] + [256] * 63, num_kv_heads=8, num_workers=num_workers, kv_tokens=64).decode
    tokens = work.kv_tokens_per_worker()
    assert tokens.sum() == (16384 + 63 * 256) * 8
    assert tokens.min() > 0
    assert tokens.max() <= 1.1 * tokens.mean()


@pytest.mark.parametrize("num_workers", [2, 7, 64, 132])
def test_one_long_prompt_is_shared_by_all_workers(num_workers):
    work = plan([8192], [4096], num_kv_heads=2, num_workers=num_workers, kv_tokens=64, q_tokens=32).prefill
    cost = work.column("q_len") * (work.column("kv_end") - work.column("kv_begin"))
    share = np.diff(np.concatenate([[0], np.cumsum(cost)])[work.worker_indptr])
    assert share.max() <= 1.1 * share.mean()


def test_short_sequences_are_packed_whole():
    work = plan([20] * 64, num_workers=8, kv_tokens=64).decode
    assert len(work.merges) == 0
    assert np.diff(work.worker_indptr).tolist() == [8] * 8


def test_pages_out_of_a_windows_sight_are_no_ones_work():
    work = plan([1000, 40], window_left=100, num_workers=3).decode
    begin = dict(zip(work.column("sequence").tolist(), work.column("kv_begin").tolist(), strict=True))
    assert begin[1] == 0
    assert sum(work.kv_tokens_per_worker()) == 101 + 40
    work = plan([1000], [10], window_left=0, num_workers=1, q_tokens=4).prefill
    assert work.items[:, 5:7].tolist() == [[990, 994], [994, 998], [998, 1000]]


@given(step=steps, seed=st.integers(0, 99))
def test_index_lists_are_those_of_a_loop_over_pages(step, seed):
    seq_lens = [n for n, _ in step["sequences"]]
    size = step["page_size"]
    columns = max((math.ceil(n / size) for n in seq_lens), default=0) + 2
    table = np.random.default_rng(seed).integers(0, 50, (len(seq_lens), columns)).astype(np.int32)
    got = plan(seq_lens, page_size=size, page_table=table)
    indptr, indices, offsets, valid = [0], [], [], []
    for i, seq_len in enumerate(seq_lens):
        for page in range(math.ceil(seq_len / size)):
            indices.append(table[i, page])
            offsets.append(page * size)
            valid.append(min(size, seq_len - page * size))
        indptr.append(len(indices))
    assert got.page_indptr.tolist() == indptr
    assert got.page_indices.tolist() == indices
    assert got.page_offsets.tolist() == offsets
    assert got.page_valid_lengths.tolist() == valid
    for array in (got.page_indptr, got.page_indices, got.page_offsets, got.page_valid_lengths):
        assert array.dtype == np.int32


def test_a_step_without_work_is_planned_too():
    for got in (plan([]), plan([5, 0], [0, 0])):
        for work in (got.decode, got.prefill):
            assert len(work.items) == len(work.merges) == work.num_partials == 0
            assert work.worker_indptr.tolist() == [0] * 5


def test_an_empty_sequence_with_queries_is_work_because_its_rows_must_be_written():
    work = plan([0, 0], [1, 3], num_workers=2)
    assert len(work.decode.items) == 1
    assert len(work.prefill.items) == 1
    assert work.prefill.items[0].tolist() == [1, 0, 1, 3, -3, 0, 0, -1]


def test_the_plan_of_a_batch_a_thousand_times_larger_is_as_balanced():
    rng = np.random.default_rng(0)
    work = plan(rng.integers(1, 4000, 2000).tolist(), num_kv_heads=8, num_workers=132, kv_tokens=64).decode
    tokens = work.kv_tokens_per_worker()
    assert tokens.max() <= 1.02 * tokens.mean()


def test_a_table_on_a_device_is_left_there():
    """meta stands for a GPU: its memory cannot be read here."""
    lens, tiling = torch.tensor([20, 3]), Tiling(2, TileShape(1, 16), TileShape(8, 16))
    table, rules = torch.arange(6, dtype=torch.int32).view(2, 3), (1, 16, True, -1, tiling)
    on_host, on_device = plan_step(table, lens, None, *rules), plan_step(table.to("meta"), lens, None, *rules)
    assert on_device.device_table.is_meta
    assert on_device.highest_page == -1
    assert on_host.device_table is None
    assert on_host.highest_page == 3, "ids beyond a sequence's last page are not used"
    np.testing.assert_array_equal(on_device.decode.items, on_host.decode.items)
    np.testing.assert_array_equal(on_device.seq_lens, on_host.seq_lens)
    assert on_device.max_pages == 3
    short = torch.tensor([20, 49])
    with pytest.raises(ShapeError, match=r"4 columns for seq_lens\[1\]=49"):
        plan_step(table.to("meta"), short, None, *rules)


def test_negative_page_ids_are_refused_where_they_are_used():
    lens, tiling = torch.tensor([20, 3]), Tiling(2, TileShape(1, 16), TileShape(8, 16))
    table = torch.tensor([[5, 0, -1], [4, -2, -3]], dtype=torch.int32)
    assert plan_step(table, lens, None, 1, 16, True, -1, tiling).highest_page == 5
    table[1, 0] = -7
    with pytest.raises(ArgumentError, match=r"page ids that are not negative; got -7 at \[1, 0\]\. Fix: "):
        plan_step(table, lens, None, 1, 16, True, -1, tiling)
