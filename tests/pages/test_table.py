"""Sequences over pages: slots, sharing, copy-on-write, and the arrays kernels read."""

import numpy as np
import pytest
import torch

from quire.errors import ArgumentError, OutOfPages
from quire.pages import PageAllocator, PageTable

pytestmark = pytest.mark.filterwarnings("error")  # torch warns of tensors over read-only memory


def make_table(num_pages=16, page_size=4):
    return PageTable(PageAllocator(num_pages), page_size)


def state(table):
    allocator = table.allocator
    refcounts = [allocator.refcount(page) for page in range(allocator.num_pages)]
    sequences = {seq_id: (table.length(seq_id), table.pages(seq_id)) for seq_id in table.seq_ids}
    return allocator.num_free, refcounts, sequences


# Appending


@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 4, 3], [3, 0, 1, 5, 2]])
def test_slots_do_not_depend_on_how_the_tokens_arrive(chunks):
    table = make_table()
    table.allocator.allocate(2)
    table.add("a")
    results = [table.append("a", n) for n in chunks]
    assert table.pages("a") == [2, 3, 4]
    assert table.length("a") == 11
    slots = np.concatenate([r.slot_mapping for r in results])
    assert slots.tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert all(
        r.slot_mapping.dtype == np.int64 and r.slot_mapping.shape == (n,)
        for r, n in zip(results, chunks, strict=True)
    )
    assert all(r.copies == [] for r in results)


def test_slots_of_pages_that_are_not_neighbours_follow_the_pages():
    table = make_table(page_size=2)
    for seq_id in "abab":
        if seq_id not in table.seq_ids:
            table.add(seq_id)
        table.append(seq_id, 2)
    assert table.pages("a") == [0, 2]
    assert table.append("a", 3).slot_mapping.tolist() == [8, 9, 10]
    assert table.append("a", 2).slot_mapping.tolist() == [11, 12]


def test_slots_above_the_range_of_int32_are_right():
    table = make_table(num_pages=3, page_size=2**30)
    table.add("a")
    table.append("a", 1)
    table.add("b")
    table.allocator.share([0])
    table.allocator.allocate(1)
    assert table.append("b", 1).slot_mapping.tolist() == [2**31]


def test_appending_no_tokens_takes_no_page_even_where_the_last_one_is_shared():
    table = make_table()
    table.add("a")
    table.append("a", 2)
    table.fork("a", "b")
    before = state(table)
    slots, copies = table.append("b", 0)
    assert (slots.tolist(), copies) == ([], [])
    assert state(table) == before


def test_out_of_pages_leaves_the_table_as_it_was():
    table = make_table(num_pages=3)
    table.add("a")
    table.append("a", 6)
    table.fork("a", "b")
    before = state(table)
    with pytest.raises(OutOfPages, match="2 free pages; got 1 free of 3"):
        table.append("b", 3)  # one page for the copy, one to grow
    assert state(table) == before
    assert table.append("b", 2).copies == [(1, 2)]


# Copy-on-write


def test_the_first_to_append_to_a_shared_partial_page_gets_a_copy_and_the_last_owner_writes_in_place():
    table = make_table()
    table.add("a")
    table.append("a", 6)
    table.fork("a", "b")
    assert table.pages("b") == table.pages("a") == [0, 1]

    slots, copies = table.append("b", 3)
    assert copies == [(1, 2)]
    assert slots.tolist() == [10, 11, 12]
    assert table.pages("b") == [0, 2, 3]

    slots, copies = table.append("a", 1)
    assert copies == []
    assert slots.tolist() == [6]
    assert table.pages("a") == [0, 1]


def test_a_shared_full_page_is_never_copied():
    table = make_table()
    table.add("a")
    table.append("a", 8)
    table.fork("a", "b")
    assert table.append("a", 1).copies == []
    assert table.append("b", 1).copies == []
    assert table.pages("a")[:2] == table.pages("b")[:2]
    assert table.pages("a")[2] != table.pages("b")[2]


def test_an_owner_outside_the_table_also_makes_a_page_shared():
    table = make_table()
    table.add("a")
    table.append("a", 1)
    table.allocator.share(table.pages("a"))
    assert table.pages_needed("a", 1) == 1
    assert table.append("a", 1).copies == [(0, 1)]
    assert table.allocator.refcount(0) == 1


def test_a_page_whose_content_is_kept_is_copied_before_it_is_written_and_stays_cached():
    table = make_table()
    table.add("a")
    table.append("a", 8)
    table.allocator.keep([1])
    assert table.trim("a", 6) == []
    assert table.pages_needed("a", 1) == 1
    assert table.append("a", 1).copies == [(1, 2)]
    assert table.pages("a") == [0, 2]
    assert (table.allocator.num_cached, table.allocator.generation(1)) == (1, 0)


def test_a_sequence_cut_back_into_a_shared_page_copies_it_before_it_writes():
    table = make_table()
    table.add("a")
    table.append("a", 8)
    table.fork("a", "b")
    assert table.trim("b", 6) == []
    assert table.append("b", 1).copies == [(1, 2)]
    assert table.pages("a") == [0, 1]


def test_pages_needed_is_what_append_takes():
    table = make_table(num_pages=64)
    table.add("a")
    table.append("a", 6)
    table.fork("a", "b")
    for n in [0, 1, 2, 3, 6, 7, 11]:
        table.fork("a", "probe")
        needed, free = table.pages_needed("probe", n), table.allocator.num_free
        table.append("probe", n)
        assert free - table.allocator.num_free == needed == (0 if n == 0 else -(-(6 + n) // 4) - 2 + 1)
        table.free("probe")


# Trimming and freeing


def test_trim_gives_up_whole_pages_and_keeps_the_rest():
    table = make_table()
    table.add("a")
    table.append("a", 15)
    assert table.trim("a", 15) == []
    assert table.trim("a", 13) == []
    assert table.trim("a", 12) == [3]
    assert table.trim("a", 5) == [2]
    assert (table.length("a"), table.pages("a")) == (5, [0, 1])
    assert table.append("a", 1).slot_mapping.tolist() == [5]
    assert table.trim("a", 0) == [0, 1]
    assert table.allocator.num_free == 16


def test_trim_and_free_return_only_pages_without_another_owner():
    table = make_table()
    table.add("a")
    table.append("a", 8)
    table.fork("a", "b")
    table.append("b", 4)
    assert table.trim("b", 3) == [2]
    assert table.free("a") == [1]
    assert table.free("b") == [0]
    assert table.seq_ids == []
    assert table.allocator.num_free == 16


def test_a_fork_outlives_its_parent():
    table = make_table()
    table.add("a")
    table.append("a", 6)
    table.fork("a", "b")
    table.free("a")
    assert table.append("b", 1).copies == []
    assert table.pages("b") == [0, 1]


# What kernels and pictures read


@pytest.fixture
def ragged():
    """Lengths 5, 0 and 9: pages [0, 1], [] and [2, 3, 4]."""
    table = make_table()
    for seq_id, length in [("a", 5), ("empty", 0), (("c", 1), 9)]:
        table.add(seq_id)
        table.append(seq_id, length)
    return table


def test_dense_pads_with_minus_one_in_the_order_asked_for(ragged):
    page_table = ragged.dense([("c", 1), "empty", "a", "a"])
    assert page_table.dtype == torch.int32
    assert page_table.tolist() == [[2, 3, 4], [-1, -1, -1], [0, 1, -1], [0, 1, -1]]
    assert ragged.dense(["a"]).tolist() == [[0, 1]]


def test_csr_joins_the_pages_end_to_end(ragged):
    page_indptr, page_indices = ragged.csr(["a", "empty", ("c", 1)])
    assert page_indptr.dtype == page_indices.dtype == torch.int32
    assert page_indptr.tolist() == [0, 2, 2, 5]
    assert page_indices.tolist() == [0, 1, 2, 3, 4]


def test_seq_lens_counts_tokens(ragged):
    seq_lens = ragged.seq_lens([("c", 1), "empty", "a"])
    assert seq_lens.dtype == torch.int32
    assert seq_lens.tolist() == [9, 0, 5]


def test_batches_without_pages_or_sequences_are_empty_tensors(ragged):
    assert ragged.dense(["empty", "empty"]).shape == (2, 0)
    assert ragged.dense([]).shape == (0, 0)
    assert ragged.seq_lens([]).shape == (0,)
    page_indptr, page_indices = ragged.csr([])
    assert (page_indptr.tolist(), page_indices.tolist()) == ([0], [])


def test_arrays_of_a_batch_are_snapshots_that_may_be_written(ragged):
    page_table = ragged.dense(["a"])
    _, page_indices = ragged.csr(["a"])
    ragged.append("a", 8)
    assert page_table.tolist() == [[0, 1]]
    page_table.fill_(-7)
    page_indices.fill_(-7)
    assert ragged.pages("a") == [0, 1, 5, 6]


def test_page_owners_names_every_sequence_on_a_page():
    table = make_table(num_pages=4)
    table.add("a")
    table.append("a", 6)
    table.fork("a", "b")
    table.append("b", 1)
    table.allocator.allocate(1)  # someone outside this table
    assert table.page_owners() == [["a", "b"], ["a"], ["b"], []]
    assert table.seq_ids == ["a", "b"]


# Refusals


@pytest.mark.parametrize(
    "call",
    [
        lambda table: table.length("x"),
        lambda table: table.pages("x"),
        lambda table: table.pages_needed("x", 1),
        lambda table: table.append("x", 1),
        lambda table: table.fork("x", "y"),
        lambda table: table.trim("x", 0),
        lambda table: table.free("x"),
        lambda table: table.dense(["a", "x"]),
        lambda table: table.seq_lens(["a", "x"]),
        lambda table: table.csr(["a", "x"]),
    ],
)
def test_an_unknown_sequence_is_refused_with_a_sentence(call):
    table = make_table()
    table.add("a")
    table.append("a", 3)
    before = state(table)
    with pytest.raises(
        ArgumentError, match=r"seq_id must name a sequence of this table \(1 live\); got 'x'\. Fix: "
    ):
        call(table)
    assert state(table) == before


@pytest.mark.parametrize(
    "call",
    [lambda table: table.add("a"), lambda table: table.fork("b", "a"), lambda table: table.fork("a", "a")],
)
def test_an_id_in_use_is_refused_and_changes_nothing(call):
    table = make_table()
    for seq_id in "ab":
        table.add(seq_id)
        table.append(seq_id, 3)
    before = state(table)
    with pytest.raises(ArgumentError, match="must not be in use; got 'a', which is live"):
        call(table)
    assert state(table) == before


@pytest.mark.parametrize("length", [-1, 7])
def test_trim_cannot_lengthen_a_sequence_or_make_it_negative(length):
    table = make_table()
    table.add("a")
    table.append("a", 6)
    before = state(table)
    with pytest.raises(
        ArgumentError, match=f"length must be from 0 to 6, the tokens of sequence 'a'; got {length}"
    ):
        table.trim("a", length)
    assert state(table) == before


@pytest.mark.parametrize("call", ["append", "pages_needed"])
def test_a_negative_number_of_tokens_is_refused(call):
    table = make_table()
    table.add("a")
    table.append("a", 6)
    before = state(table)
    with pytest.raises(ArgumentError, match="num_tokens must be 0 or more; got -1"):
        getattr(table, call)("a", -1)
    assert state(table) == before


@pytest.mark.parametrize("page_size", [0, -16, 1.5, True])
def test_a_page_holds_at_least_one_token(page_size):
    with pytest.raises(ArgumentError, match="page_size must be an int of at least 1"):
        make_table(page_size=page_size)


def test_a_table_says_how_much_it_holds():
    table = make_table()
    table.add("a")
    table.append("a", 6)
    table.fork("a", "b")
    assert repr(table) == (
        "PageTable(2 sequences of 12 tokens in all, page_size=4, "
        "PageAllocator(num_pages=16: 2 owned, 0 cached, 14 free))"
    )


def test_occupancy_counts_what_sequences_share_once():
    table = make_table()
    assert table.occupancy() == (0, 0)
    for seq_id, length in [("a", 6), ("b", 3)]:
        table.add(seq_id)
        table.append(seq_id, length)
    assert table.occupancy() == (3, 9)
    table.fork("a", "c")
    assert table.occupancy() == (3, 9)
    table.append("c", 1)  # its own copy of the half page: 2 + 1 tokens more
    assert table.occupancy() == (4, 12)
    table.fork("a", "d")
    table.trim("d", 5)  # one token of a page of which another sequence holds two
    assert table.occupancy() == (4, 12)
    table.free("a")
    assert table.occupancy() == (4, 11)


def test_room_is_what_append_can_take():
    table = make_table(num_pages=3)
    table.add("a")
    assert table.room("a") == 12
    table.append("a", 6)
    assert table.room("a") == 6
    table.fork("a", "b")
    assert table.room("b") == 2  # one page for the copy
    table.append("b", 2)
    assert table.room("b") == 0
    assert table.room("a") == 2  # in place
    table.fork("a", "c")
    assert table.room("a") == 0  # no page for the copy


# Pages that hold tokens already


def test_a_sequence_may_begin_with_pages_that_others_own_or_that_are_cached():
    table = make_table(num_pages=4)
    table.add("a")
    table.append("a", 8)
    table.allocator.keep(table.pages("a"))
    table.add("b", table.pages("a"))
    table.free("a")
    table.add("c", table.pages("b")[:1])
    assert (table.length("b"), table.length("c")) == (8, 4)
    assert [table.allocator.refcount(page) for page in range(4)] == [2, 1, 0, 0]
    assert table.occupancy() == (2, 8)
    table.free("b")
    assert table.allocator.num_cached == 1
    table.add("d", [0, 1])
    assert table.page_owners() == [["c", "d"], ["d"], [], []]


@pytest.mark.parametrize(("seq_id", "pages"), [("a", [0]), ("b", [0, 3]), ("b", [0, 16])])
def test_a_sequence_cannot_begin_with_free_pages_or_another_ones_name(seq_id, pages):
    table = make_table()
    table.add("a")
    table.append("a", 8)
    before = state(table)
    with pytest.raises(ArgumentError):
        table.add(seq_id, pages)
    assert state(table) == before


def test_a_page_is_replaced_by_one_that_holds_the_same():
    table = make_table()
    for seq_id in "ab":
        table.add(seq_id)
        table.append(seq_id, 6)
    table.replace("b", 0, table.page_at("a", 0))
    assert (table.pages("a"), table.pages("b"), table.pages("b", 1)) == ([0, 1], [0, 3], [3])
    assert [table.allocator.refcount(page) for page in range(4)] == [2, 1, 0, 1]
    assert table.occupancy() == (3, 8)
    assert table.append("b", 1).slot_mapping.tolist() == [3 * 4 + 2]
    table.replace("b", 0, 0)  # by itself
    assert table.allocator.refcount(0) == 2


@pytest.mark.parametrize(("index", "page"), [(2, 0), (-1, 0), (0, 9), (0, 16)])
def test_a_wrong_replacement_is_refused_and_changes_nothing(index, page):
    table = make_table()
    table.add("a")
    table.append("a", 6)
    before = state(table)
    with pytest.raises(ArgumentError, match=r"index must be from 0 to 1|page 9, which is free|from 0 to 15"):
        table.replace("a", index, page)
    assert state(table) == before


def test_a_sequence_whose_pages_someone_else_freed_ends_all_the_same():
    table = make_table()
    table.add("a")
    table.append("a", 6)
    table.allocator.free([0])
    with pytest.raises(ArgumentError, match="got page 0 1 times, owners 0"):
        table.free("a")
    assert table.seq_ids == []
