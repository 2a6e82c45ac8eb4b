"""Page ids and reference counts."""

import numpy as np
import pytest
import torch

from quire.errors import ArgumentError, OutOfPages
from quire.pages import PageAllocator


def state(allocator):
    return allocator.num_free, [allocator.refcount(page) for page in range(allocator.num_pages)]


def test_a_fresh_pool_hands_out_the_lowest_ids_first():
    allocator = PageAllocator(5)
    assert allocator.allocate(2) == [0, 1]
    assert allocator.allocate(0) == []
    assert allocator.allocate(3) == [2, 3, 4]
    assert allocator.num_free == 0
    assert allocator.num_pages == 5


def test_the_pages_freed_last_come_back_first_and_in_their_own_order():
    allocator = PageAllocator(8)
    allocator.allocate(6)
    allocator.free([5])
    allocator.free([1, 2, 3])
    assert allocator.allocate(4) == [1, 2, 3, 5]
    assert allocator.allocate(2) == [6, 7]


def test_a_page_is_free_only_after_its_last_owner_gave_it_up():
    allocator = PageAllocator(4)
    first, second = allocator.allocate(2)
    allocator.share([first])
    assert allocator.free([first, second]) == [second]
    assert allocator.refcount(first) == 1
    assert allocator.num_free == 3
    assert allocator.free([first]) == [first]
    assert allocator.num_free == 4


def test_a_page_named_twice_gains_or_loses_two_owners():
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    allocator.share([page, page])
    assert allocator.refcount(page) == 3
    assert allocator.free([page, page]) == []
    assert allocator.free([page]) == [page]
    assert sorted(allocator.allocate(2)) == [0, 1]


def test_out_of_pages_says_needed_free_and_total_and_changes_nothing():
    allocator = PageAllocator(7)
    allocator.allocate(4)
    before = state(allocator)
    with pytest.raises(OutOfPages, match=r"5 free pages; got 3 free of 7 in total\. Fix: "):
        allocator.allocate(5)
    assert state(allocator) == before
    assert allocator.allocate(3) == [4, 5, 6]


@pytest.mark.parametrize(
    ("pages", "sentence"),
    [
        ([3], r"got page 3 1 times, owners 0"),  # never allocated
        ([0, 2, 0], r"got page 0 2 times, owners 1"),  # more often than it has owners
        ([0, 1, 1, 1], r"got page 1 3 times, owners 2"),
        ([0, 4], r"from 0 to 3; got 4"),
        ([0, -1], r"from 0 to 3; got -1"),  # not the last page
    ],
)
def test_a_wrong_free_is_refused_and_changes_nothing(pages, sentence):
    allocator = PageAllocator(4)
    allocator.allocate(3)
    allocator.share([1])
    before = state(allocator)
    with pytest.raises(ArgumentError, match=sentence):
        allocator.free(pages)
    assert state(allocator) == before


def test_a_double_free_is_refused():
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.free(pages)
    with pytest.raises(ArgumentError, match="once per owner"):
        allocator.free(pages)
    assert allocator.num_free == 2


@pytest.mark.parametrize(
    ("pages", "sentence"), [([0, 1], "page 1, which is free"), ([0, 9], "got 9"), ([0, -2], "got -2")]
)
def test_a_wrong_share_is_refused_and_changes_nothing(pages, sentence):
    allocator = PageAllocator(2)
    allocator.allocate(1)
    before = state(allocator)
    with pytest.raises(ArgumentError, match=sentence):
        allocator.share(pages)
    assert state(allocator) == before


@pytest.mark.parametrize("as_ids", [iter, np.asarray, torch.tensor], ids=["iterator", "numpy", "torch"])
def test_ids_may_come_from_any_iterable_of_integers_and_leave_as_int(as_ids):
    allocator = PageAllocator(3)
    pages = allocator.allocate(3)
    allocator.share(as_ids(pages))
    allocator.free(as_ids(pages))
    released = allocator.free(as_ids(pages))
    assert released == pages
    assert [type(page) for page in released + allocator.allocate(3)] == [int] * 6
    with pytest.raises(ArgumentError, match="got page 1 2 times, owners 1"):
        allocator.free(as_ids([1, 1]))


@pytest.mark.parametrize("num_pages", [0, -1, 2**31, 2.0])
def test_the_number_of_pages_must_fit_int32_ids(num_pages):
    with pytest.raises(ArgumentError, match=r"num_pages must be an int from 1 to 2147483647; got .* Fix: "):
        PageAllocator(num_pages)


def test_a_negative_request_is_refused():
    allocator = PageAllocator(2)
    with pytest.raises(ArgumentError, match="n must be 0 pages or more; got -1"):
        allocator.allocate(-1)
    assert allocator.num_free == 2


@pytest.mark.parametrize("page", [-1, 2])
def test_the_refcount_of_no_page_is_refused(page):
    with pytest.raises(ArgumentError, match="page must be an id from 0 to 1"):
        PageAllocator(2).refcount(page)
