"""A step is copied from memory of any layout, and what is no step is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.planning import copying

UNTOUCHED = np.uint32(777)


@given(
    seq_lens=st.lists(st.integers(-2, 12), max_size=4),
    starts=st.lists(st.integers(-1, 5), min_size=5, max_size=5),
    ordered=st.booleans(),
)
def test_a_step_has_lengths_within_its_table_and_starts_that_grow_to_a_limit(seq_lens, starts, ordered):
    starts = [0, *sorted(starts)][: len(seq_lens) + 1] if ordered else starts[: len(seq_lens) + 1]
    wanted = (
        starts[0] == 0
        and starts[-1] <= 4
        and sorted(starts) == starts
        and all(0 <= n <= 10 for n in seq_lens)
    )
    arrays = np.array(seq_lens, np.int64), np.array(starts, np.int64)
    assert copying.is_step(*arrays, 10, 4) == copying.is_step.py_func(*arrays, 10, 4) == wanted


def copied(pages, seq_lens, page_size):
    table = np.full(pages.shape, UNTOUCHED)
    highest = copying.copy_pages(
        pages.ctypes.data, *pages.strides, np.array(seq_lens, np.int64), page_size, table
    )
    return table, highest


@pytest.mark.parametrize("layout", ["rows", "transposed", "every other column", "one row for all"])
def test_the_ids_in_use_are_copied_and_no_other_is_read(layout):
    seq_lens, page_size, used = [9, 0, 4, 1], 4, [3, 0, 1, 1]
    pages = np.arange(20, dtype=np.int32).reshape(4, 5)
    if layout == "one row for all":
        pages = np.broadcast_to(pages[2], (4, 5))
        beyond = np.arange(5) >= 3
    else:
        beyond = np.arange(5) >= np.array(used)[:, None]
        pages[beyond] = 10**6
        if layout == "transposed":
            pages = np.asfortranarray(pages)
        if layout == "every other column":
            wide = np.full((4, 10), -1, np.int32)
            wide[:, ::2] = pages
            pages = wide[:, ::2]

    table, highest = copied(pages, seq_lens, page_size)

    for i, count in enumerate(used):
        np.testing.assert_array_equal(table[i, :count], pages[i, :count])
        assert (table[i, count:] == UNTOUCHED).all()
    assert highest == max(pages[i, :count].max() for i, count in enumerate(used) if count)


def test_the_highest_id_is_none_where_no_page_is_used_and_too_high_where_one_is_negative():
    pages = np.array([[5, 2**31 - 1], [-1, 0]], np.int32)
    assert copied(pages, [0, 0], 4)[1] == -1
    assert copied(pages, [4, 0], 4)[1] == 5
    assert copied(pages, [5, 0], 4)[1] == 2**31 - 1
    assert copied(pages, [5, 1], 4)[1] >= 2**31
