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


@pytest.mark.parametrize("num_pages", [0, -1, 2**31, 2.0, True, "7"])
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


# Pages that are kept


def test_a_kept_page_is_cached_when_its_last_owner_goes_and_owned_again_when_shared():
    allocator = PageAllocator(3)
    page, other = allocator.allocate(2)
    allocator.keep([page])
    assert allocator.free([page, other]) == [other]
    assert [allocator.is_cached(each) for each in range(3)] == [True, False, False]
    assert (allocator.num_owned, allocator.num_cached, allocator.num_free, allocator.num_available) == (
        0,
        1,
        2,
        3,
    )
    allocator.share([page])
    assert (allocator.refcount(page), allocator.num_cached, allocator.generation(page)) == (1, 0, 0)
    assert allocator.free([page]) == []  # still kept
    assert allocator.num_cached == 1


def test_free_pages_are_taken_before_cached_ones_and_of_these_the_first_to_lose_its_owner():
    dropped = []
    allocator = PageAllocator(6, on_drop=dropped.extend)
    allocator.allocate(5)
    allocator.keep([0, 1, 2, 3])
    allocator.free([3])
    allocator.free([0, 1, 2])
    assert set(allocator.allocate(3)) == {
        5,
        3,
        2,
    }  # of one call the last page goes first: ends before beginnings
    assert dropped == [3, 2]
    assert allocator.evict(9) == [1, 0]
    assert dropped == [3, 2, 1, 0]


def test_a_generation_grows_when_content_is_dropped_and_only_then():
    allocator = PageAllocator(1)
    seen = []
    for step in (
        lambda: allocator.allocate(1),
        lambda: allocator.share([0]),
        lambda: allocator.free([0]),  # one owner is left
        lambda: allocator.free([0]),  # dropped: not kept
        lambda: allocator.allocate(1),
        lambda: allocator.keep([0]),
        lambda: allocator.free([0]),  # cached
        lambda: allocator.share([0]),
        lambda: allocator.free([0]),
        lambda: allocator.allocate(1),  # dropped: evicted
        lambda: allocator.free([0]),  # dropped: a page taken is not kept any more
    ):
        step()
        seen.append(allocator.generation(0))
    assert seen == [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3]


def test_a_page_that_is_shared_or_kept_is_not_private():
    allocator = PageAllocator(3)
    allocator.allocate(2)
    assert [allocator.is_private(page) for page in range(3)] == [True, True, False]
    allocator.share([0])
    allocator.keep([1])
    assert [allocator.is_private(page) for page in range(3)] == [False, False, False]


def test_out_of_pages_evicts_nothing():
    allocator = PageAllocator(3)
    allocator.allocate(2)
    allocator.keep([0])
    allocator.free([0])
    with pytest.raises(OutOfPages, match="3 free pages; got 2 free of 3"):
        allocator.allocate(3)
    assert (allocator.num_cached, allocator.generation(0)) == (1, 0)


@pytest.mark.parametrize("page", [1, 2, 9, -1])
def test_only_pages_with_an_owner_can_be_kept(page):
    allocator = PageAllocator(3)
    allocator.allocate(2)
    allocator.keep([1])
    allocator.free([1])
    with pytest.raises(
        ArgumentError, match=r"keep must name owned pages; got page|page must be an id from 0 to 2"
    ):
        allocator.keep([0, page])
    allocator.free([0])
    assert allocator.num_cached == 1, "page 0 was kept by a call that was refused"


def test_an_allocator_says_how_many_pages_are_in_which_state():
    allocator = PageAllocator(7)
    allocator.allocate(4)
    allocator.keep([0])
    allocator.free([0])
    assert repr(allocator) == "PageAllocator(num_pages=7: 3 owned, 1 cached, 3 free)"


def test_a_page_kept_no_longer_is_free_if_it_was_cached_and_writable_if_it_is_owned():
    dropped = []
    allocator = PageAllocator(4, on_drop=dropped.extend)
    allocator.allocate(4)
    allocator.keep([0, 1, 2])
    allocator.free([1, 2])
    assert allocator.unkeep([0, 2, 3, 2]) == [2]
    assert dropped == [2]
    assert [allocator.generation(page) for page in range(4)] == [0, 0, 1, 0]
    assert (allocator.num_cached, allocator.num_free, allocator.is_private(0)) == (1, 1, True)
    assert allocator.free([0]) == [0]
    assert allocator.allocate(2) == [0, 2], "page 1 is kept still"


def test_unkeep_of_no_page_is_refused_and_changes_nothing():
    allocator = PageAllocator(2)
    allocator.allocate(1)
    allocator.keep([0])
    with pytest.raises(ArgumentError, match="from 0 to 1; got 2"):
        allocator.unkeep([0, 2])
    assert not allocator.is_private(0)
