"""Copies in host memory: which pages get one, which come back, and that nobody gets what is not theirs."""

from __future__ import annotations

import math

import pytest

from quire.errors import PageStateError
from quire.pages import PageAllocator, PageTable, PrefixCache, Swap, SwapCosts
from quire.spec import Visibility

SIZE = 2
ALWAYS = math.inf  # bytes per second
ONE_GROUP = (Visibility(),)
A, B = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]  # three pages each


class Store:
    """Pages that hold a word each."""

    bytes_per_page = 100

    def __init__(self, num_pages: int, num_host_pages: int) -> None:
        self.num_pages = num_host_pages
        self.words: list = [None] * num_pages
        self.on_host: list = [None] * num_host_pages
        self.fails = False

    def save(self, pages, host_pages):
        for page, host_page in zip(pages, host_pages, strict=True):
            self._may_fail()
            self.on_host[host_page] = self.words[page]

    def load(self, host_pages, pages):
        for host_page, page in zip(host_pages, pages, strict=True):
            self._may_fail()
            self.words[page] = self.on_host[host_page]

    def checksum(self, host_page):
        return hash(self.on_host[host_page])

    def _may_fail(self):
        if self.fails:
            raise KeyboardInterrupt


class World:
    """A pool, a table, a cache and host memory."""

    def __init__(self, num_pages=4, num_host_pages=8, groups=ONE_GROUP, bytes_per_second=ALWAYS) -> None:
        self.allocator = PageAllocator(num_pages, on_drop=self._drop)
        self.table = PageTable(self.allocator, SIZE, groups)
        self.cache = PrefixCache(self.allocator, SIZE, groups)
        self.store = Store(num_pages, num_host_pages)
        self.swap = Swap(self.cache, self.store, SwapCosts(bytes_per_second))
        self.num_begun = 0

    def _drop(self, pages) -> None:
        for page in pages:
            self.store.words[page] = "dropped"

    def word(self, tokens, index, group, salt=None):
        return salt, tuple(tokens[: (index + 1) * SIZE]), group

    def begin(self, tokens, salt=None) -> int:
        """Compute what is not found; the sequence stays. Returns its id."""
        prefix = self.cache.match(tokens, salt)
        self.num_begun += 1
        self.table.add(self.num_begun, self.cache.pages(prefix), prefix.num_pages * SIZE)
        for start in range(prefix.num_pages * SIZE, len(tokens), SIZE):
            index = start // SIZE
            self.table.append(self.num_begun, SIZE)
            pages = [self.table.page_at(self.num_begun, index, g) for g in range(len(self.table.groups))]
            for group, page in enumerate(pages):
                self.store.words[page] = self.word(tokens, index, group, salt)
            prefix = self.cache.insert(prefix, tokens[start : start + SIZE], pages)
            self.table.release_unseen(self.num_begun)
        return self.num_begun

    def compute(self, tokens, salt=None) -> None:
        self.table.free(self.begin(tokens, salt))

    def found(self, tokens, salt=None) -> int:
        """How many pages a text begins with; each page that its next token sees must hold what was computed."""
        prefix = self.cache.match(tokens, salt)
        for group, sight in enumerate(self.cache.groups):
            first = sight.first_key(prefix.num_pages * SIZE) // SIZE
            pages = prefix.pages(group, first)
            words = [self.word(tokens, first + i, group, salt) for i in range(len(pages))]
            assert [self.store.words[page] for page in pages] == words
        return prefix.num_pages

    def check(self) -> None:
        """Between calls nobody owns a page but sequences, and nobody a host page."""
        owners = sum(map(len, self.table.page_owners()))
        assert owners == sum(self.allocator.refcount(page) for page in range(self.allocator.num_pages))
        assert self.swap.allocator.num_owned == 0
        self.swap.audit()


def test_pages_whose_memory_was_needed_come_back_and_are_found():
    world = World(num_pages=4)
    world.compute(A)
    world.compute(B)  # takes the free page and the last two of A
    assert world.found(A) == 1
    assert world.swap.num_swapped == world.swap.num_saved == 2
    assert world.swap.bring_back([*A, 99]) == 4
    assert world.found(A) == 3
    assert world.swap.num_returned == 2
    assert world.allocator.num_owned == 0
    world.check()


def test_a_text_that_is_there_as_a_whole_needs_nothing_back():
    world = World(num_pages=8)
    world.compute(A)
    assert world.swap.bring_back(A) == 0
    world.compute(B)
    assert world.swap.bring_back(A) == 0
    assert world.swap.num_saved == 0


def test_pages_without_a_name_are_not_copied():
    world = World(num_pages=4)
    world.table.add("unnamed")
    world.table.append("unnamed", 8)
    world.table.free("unnamed")
    world.compute(A)
    assert world.swap.num_saved == 0


def test_a_page_with_a_copy_is_dropped_without_another_one():
    world = World(num_pages=3)
    world.compute(A)
    for _ in range(3):
        world.compute(B)
        assert world.swap.bring_back(A) == 6
        assert world.swap.bring_back(B) == 6
        assert world.found(B) == 3
    assert world.swap.num_saved == 6
    assert world.swap.num_returned > 12
    world.check()


def test_a_page_that_was_computed_again_keeps_its_copy():
    world = World(num_pages=3)
    world.compute(A)
    world.compute(B)
    world.compute(A)
    assert world.swap.num_saved == 6
    world.compute(B)
    assert world.swap.num_saved == 6
    assert world.swap.bring_back(A) == 6
    assert world.found(A) == 3


def test_other_words_or_another_salt_bring_nothing_back():
    world = World(num_pages=3)
    world.compute(A, salt="mine")
    world.compute(B, salt="mine")
    for tokens, salt in ((A, None), (A, "yours"), ([9, *A[1:]], "mine"), (A[:1], "mine"), ([], "mine")):
        assert world.swap.bring_back(tokens, salt) == 0
    assert world.swap.bring_back([*A[:4], 9, 9], "mine") == 4
    assert world.found([*A[:4], 9, 9], "mine") == 2


def test_full_host_memory_drops_the_ends_of_texts_unused_the_longest():
    world = World(num_pages=3, num_host_pages=4)
    world.compute(A)
    world.compute(B)
    world.compute([20, 21])  # B's end goes to the host, where A is
    assert world.swap.bring_back(A) == 6, "there is room for one more"
    world.compute([30, 31, 32, 33, 34, 35])
    assert world.swap.num_swapped == 4
    assert world.swap.bring_back([20, 21]) == 2
    assert world.found([20, 21]) == 1
    assert world.swap.bring_back(B) == 0, "its end is of no use alone"
    world.check()


def test_more_pages_than_host_memory_holds_leave_their_beginnings():
    world = World(num_pages=3, num_host_pages=2)
    world.compute(A)
    world.allocator.evict(3)
    assert world.swap.bring_back(A) == 4
    assert world.found(A) == 2


def test_links_of_dropped_prefixes_do_not_pile_up():
    for groups in [(Visibility(),), (Visibility(1),), (Visibility(), Visibility(1))]:
        world = World(num_pages=6, num_host_pages=5, groups=groups)
        for i in range(200):
            world.compute([3 * i, 3 * i + 1, 3 * i + 2, 7])
        assert len(world.cache._links) <= 6 + 5 + 2
        assert len(world.swap._places) == len(world.swap._names) <= 5
        world.check()


def test_what_makes_room_takes_neither_what_was_found_nor_what_comes():
    """In the smallest pool, beside host memory that is full: each page that is dropped wants a place there."""
    world = World(num_pages=3, num_host_pages=3)
    world.compute(A)
    world.compute(B[:4])
    assert world.found(A) == 1
    assert world.found(B) == 2
    assert world.swap.num_swapped == 2
    world.compute([30, 31])  # the end of B
    assert world.swap.num_swapped == 3
    assert world.swap.bring_back(A) in (4, 6)
    assert world.found(A) == 3
    world.check()


def test_nothing_comes_back_where_its_pages_would_have_to_be_taken_from_owners():
    world = World(num_pages=4)
    world.compute(A)
    held = world.begin(B)
    assert world.found(A) == 1
    assert world.swap.bring_back(A) == 0
    assert world.found(A) == 1
    world.check()
    world.table.free(held)
    assert world.swap.bring_back(A) == 4


def test_of_a_window_only_pages_in_sight_come_back():
    world = World(num_pages=9, num_host_pages=30, groups=(Visibility(), Visibility(1)))
    long = list(range(100, 112))  # six pages
    world.compute(long)
    world.allocator.evict(9)
    assert world.swap.bring_back([*long, 1]) == 12
    assert world.found(long) == 6
    assert world.swap.num_returned == 6 + 1
    world.check()


def test_a_text_ends_where_a_window_has_lost_its_pages_everywhere():
    groups = (Visibility(), Visibility(1))
    world = World(num_pages=9, num_host_pages=30, groups=groups)
    long = list(range(100, 112))
    world.compute(long)
    world.allocator.evict(9)
    for (prefix, group), place in list(world.swap._places.items()):
        if group == 1 and prefix.num_pages == 6:
            world.swap._forget([place.page])
    assert world.swap.bring_back([*long, 1]) == 10
    assert world.found(long) == 5


def test_without_a_group_that_sees_all_pages_out_of_sight_are_not_missed():
    world = World(num_pages=6, num_host_pages=30, groups=(Visibility(3),))
    long = list(range(100, 140))
    world.compute(long)
    world.compute(list(range(200, 212)))
    assert world.swap.bring_back([*long, 1]) == 40
    assert world.found(long) == 20
    assert world.swap.num_returned <= 3
    world.check()


def test_clear_forgets_the_copies():
    world = World(num_pages=3)
    world.compute(A)
    world.compute(B)
    world.cache.clear()
    assert world.swap.num_swapped == 0
    assert world.swap.allocator.num_free == world.swap.allocator.num_pages
    assert world.swap.bring_back(A) == 0
    world.compute(A)
    world.compute(B)
    assert world.swap.bring_back(A) == 6
    assert world.found(A) == 3
    world.check()


# The rule


@pytest.mark.parametrize(
    ("num_bytes", "num_tokens", "pays"),
    [(999, 10, True), (1000, 10, False), (1001, 10, False), (1001, 11, True), (0, 0, False)],
)
def test_it_pays_when_copying_takes_less_time_than_computing(num_bytes, num_tokens, pays):
    costs = SwapCosts(bytes_per_second=1000.0, seconds_per_token=0.1)
    assert costs.pays(num_bytes, num_tokens) is pays


def test_the_fastest_step_says_what_a_token_costs():
    costs = SwapCosts(1e9)
    assert costs.pays(10**12, 1), "nothing is known yet"
    costs.observe(100, 2.0)
    costs.observe(1, 1.0)
    assert costs.seconds_per_token == 0.02
    costs.observe(1000, 1.0)
    assert costs.seconds_per_token == 0.001


def test_pages_that_are_cheaper_to_compute_do_not_come_back_and_do_not_go():
    world = World(num_pages=3, bytes_per_second=1000.0)
    world.compute(A)
    world.compute(B)
    world.swap.costs.observe(1, 0.049)  # a page of two tokens: 0.098 s, where a copy of 100 bytes takes 0.1
    assert world.swap.bring_back(A) == 0
    world.compute([30, 31, 32, 33, 34, 35])
    assert world.swap.num_saved == 3
    world.swap.costs.seconds_per_token = 0.051
    assert world.swap.bring_back(A) == 6
    assert world.found(A) == 3


# Failures


@pytest.mark.parametrize("groups", [(Visibility(),), (Visibility(), Visibility(1))], ids=str)
def test_an_interrupted_copy_leaves_no_name_and_no_owner(groups):
    world = World(num_pages=3 * len(groups), groups=groups)
    world.compute(A)
    world.store.fails = True
    with pytest.raises(KeyboardInterrupt):
        world.compute(B)
    assert world.swap.num_swapped == 0
    world.table.free(world.num_begun)
    world.check()
    assert world.found(A) == 3, "nothing was dropped"
    world.store.fails = False
    world.compute(B)
    world.store.fails = True
    with pytest.raises(KeyboardInterrupt):
        world.swap.bring_back(A)
    world.check()
    assert world.found(A) < 3
    world.store.fails = False
    assert world.swap.bring_back(A) > 0
    assert world.found(A) == 3


def faulty(how: str, monkeypatch) -> World:
    """A text on the host, and a host page that is not what it was."""
    monkeypatch.setenv("QUIRE_DEBUG", "1")
    world = World(num_pages=3)
    world.compute(A)
    world.compute(B)
    place = next(iter(world.swap._places.values()))
    if how == "dropped":
        world.swap.allocator.unkeep([place.page])
    elif how == "given to another":
        other = list(world.swap._places.values())[1]
        world.swap._names[place.page] = world.swap._names[other.page]
    else:
        world.store.on_host[place.page] = "other bytes"
    return world


@pytest.mark.parametrize("how", ["dropped", "given to another", "overwritten"])
def test_a_host_page_that_is_not_what_it_was_is_named_and_not_used(how, monkeypatch):
    world = faulty(how, monkeypatch)
    with pytest.raises(PageStateError, match=r"host page \d+ must hold"):
        world.swap.bring_back(A)
    assert world.found(A) == 0
    assert world.allocator.num_owned == 0
    world.cache.clear()
    world.check()


@pytest.mark.parametrize("how", ["dropped", "given to another"])
def test_it_is_found_before_the_next_copy_in_debug_runs(how, monkeypatch):
    world = faulty(how, monkeypatch)
    with pytest.raises(PageStateError, match=r"host page \d+ must hold"):
        world.compute([30, 31])


def test_a_swap_says_how_much_it_holds():
    world = World(num_pages=3)
    world.compute(A)
    world.compute(B[:4])
    assert repr(world.swap) == "Swap(2 of 8 pages on the host)"
