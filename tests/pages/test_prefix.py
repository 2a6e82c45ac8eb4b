"""Pages found by what they hold."""

import gc
from array import array

import pytest

from quire.errors import ArgumentError
from quire.pages import PageAllocator, PageTable, PrefixCache

SIZE = 4


def make_cache(num_pages=8, **options):
    return PrefixCache(PageAllocator(num_pages, **options), SIZE)


def fill(cache, tokens, salt=None):
    """Compute the full pages of a text that are not found and name them; the pages, all owned once more."""
    found = cache.match(tokens, salt)
    cache.allocator.share(found.pages())
    rest = tokens[found.num_pages * SIZE :]
    pages = cache.allocator.allocate(len(rest) // SIZE)
    cache.insert(found, rest[: len(pages) * SIZE], pages)
    return found.pages() + pages


def state(cache):
    allocator = cache.allocator
    pages = range(allocator.num_pages)
    return (
        allocator.num_free,
        allocator.num_cached,
        [allocator.refcount(page) for page in pages],
        [allocator.generation(page) for page in pages],
        [cache.name_of(page) for page in pages],
    )


def test_full_pages_are_found_by_all_tokens_from_the_beginning_and_partial_ones_are_not():
    cache = make_cache()
    pages = fill(cache, range(11))
    assert pages == [0, 1]
    for tokens, found in [
        (range(11), pages),
        (range(8), pages),
        (range(7), pages[:1]),
        ([*range(7), 99], pages[:1]),
        ([99, *range(1, 8)], []),
        (range(4, 8), []),  # the second page's tokens, at the beginning
        (range(3), []),
        ([], []),
    ]:
        assert cache.match(tokens).pages() == found, list(tokens)


def test_a_match_changes_nothing_and_does_not_make_a_page_used():
    cache = make_cache(num_pages=2)
    cache.allocator.free(fill(cache, [1] * 4))
    cache.allocator.free(fill(cache, [2] * 4))
    before = state(cache)
    assert cache.match([1] * 8).pages() == [0]
    assert cache.match([1] * 4, "salt").pages() == []
    cache.explain(cache.match([1] * 8), [1] * 8)
    assert state(cache) == before
    cache.evict(1)
    assert (cache.name_of(0), cache.match([2] * 4).pages()) == (None, [1])


def test_pages_of_one_salt_are_not_found_under_another_or_none():
    cache = make_cache()
    for salt in (None, "a", "b"):
        fill(cache, [7] * 8, salt)
    found = [cache.match([7] * 8, salt).pages() for salt in (None, "a", "b", "c")]
    assert found == [[0, 1], [2, 3], [4, 5], []]


def test_the_same_tokens_after_other_tokens_are_another_page():
    cache = make_cache()
    assert fill(cache, [1] * 4 + [3] * 4) == [0, 1]
    assert fill(cache, [2] * 4 + [3] * 4) == [2, 3]
    assert cache.match([2] * 4 + [3] * 4).pages() == [2, 3]


def test_a_page_whose_tokens_have_one_already_gets_no_name_and_the_prefix_holds_the_other():
    cache = make_cache()
    fill(cache, range(12))
    own = cache.allocator.allocate(4)
    named = cache.insert(cache.match([]), range(16), own)
    assert named.pages() == [0, 1, 2, own[3]]
    assert [cache.name_of(page) is None for page in own] == [True, True, True, False]
    assert [cache.allocator.is_private(page) for page in own] == [True, True, True, False]


@pytest.mark.parametrize(
    ("tokens", "pages", "sentence"),
    [
        (range(7), [0, 1], r"tokens must fill 2 pages of 4; got 7\. Fix: "),
        (range(12), [0, 1], "must fill 2 pages of 4; got 12"),
        (range(8), [0, 2], "page 2, which has no owner"),
        (
            range(8),
            [1, 3],
            r"not be named with other tokens; got page 3, the end of a prefix of 1 pages\. Fix: ",
        ),
    ],
)
def test_a_wrong_insert_is_refused_and_changes_nothing(tokens, pages, sentence):
    cache = make_cache(num_pages=4)
    cache.allocator.allocate(4)
    cache.allocator.free([2])
    cache.insert(cache.match([]), [9] * 4, [3])
    before = state(cache)
    with pytest.raises(ArgumentError, match=sentence):
        cache.insert(cache.match([]), tokens, pages)
    assert state(cache) == before
    assert cache.match(range(8)).pages() == []


def test_leaves_are_dropped_before_what_they_continue_and_of_these_the_least_recently_used():
    dropped = []
    cache = make_cache(num_pages=8, on_drop=dropped.extend)
    common = [0] * 4
    first, second = fill(cache, common + [1] * 8), fill(cache, common + [2] * 4)
    assert (first, second) == ([0, 1, 2], [0, 3])
    cache.allocator.free(first)
    cache.allocator.free(second)
    assert cache.evict(2) == 2
    assert dropped == [2, 1]
    again = fill(cache, common + [2] * 4)  # used again, so the last to go
    other = fill(cache, [5] * 4)
    cache.allocator.free(again)
    cache.allocator.free(other)
    del dropped[:]
    assert cache.evict(9) == 3
    assert dropped == [3, 0, *other]


def test_pages_with_an_owner_are_never_evicted():
    cache = make_cache(num_pages=2)
    pages = fill(cache, range(8))
    assert cache.evict(9) == 0
    assert cache.match(range(8)).pages() == pages


def test_allocating_drops_names_with_the_pages():
    cache = make_cache(num_pages=3)
    cache.allocator.free(fill(cache, range(12)))
    assert cache.allocator.allocate(2) == [1, 2] or cache.allocator.num_owned == 2
    assert cache.match(range(12)).pages() == [0]
    assert cache.num_named == 1
    assert fill(cache, range(4)) == [0]


def test_a_match_lives_as_long_as_its_pages_have_an_owner():
    cache = make_cache(num_pages=3)
    cache.allocator.free(fill(cache, range(8)))
    table = PageTable(cache.allocator, SIZE)
    table.add("hit", cache.match(range(8)).pages())
    assert (table.pages("hit"), table.length("hit")) == ([0, 1], 8)
    assert cache.evict(9) == 0
    table.append("hit", 1)
    assert table.pages("hit") == [0, 1, 2]
    table.free("hit")
    assert cache.match(range(8)).pages() == [0, 1]


def test_a_hit_whose_last_token_is_trimmed_writes_it_into_a_copy():
    cache = make_cache(num_pages=3)
    cache.allocator.free(fill(cache, range(8)))
    table = PageTable(cache.allocator, SIZE)
    table.add("hit", cache.match(range(8)).pages())
    table.trim("hit", 7)
    slots, copies = table.append("hit", 1)
    assert copies == [(1, 2)]
    assert slots.tolist() == [2 * SIZE + 3]
    assert cache.match(range(8)).pages() == [0, 1]


def test_a_search_near_an_earlier_match_finds_what_a_whole_search_finds():
    cache = make_cache(num_pages=4)
    near = cache.match(range(16))
    for owned, dropped in [(2, 0), (4, 0), (4, 3), (3, 1), (3, 3)]:
        cache.allocator.free(fill(cache, range(owned * SIZE)))
        cache.evict(dropped)
        found = cache.match(range(16))
        assert near is not found or owned == 3
        near = cache.match(range(16), near=near)
        assert near is found


def test_clear_forgets_every_name_frees_cached_pages_and_leaves_owned_ones_writable():
    dropped = []
    cache = make_cache(num_pages=4, on_drop=dropped.extend)
    owned = fill(cache, [1] * 8)
    cache.allocator.free(fill(cache, [2] * 8))
    empty, prefix = cache.match([]), cache.match([1] * 8)
    cache.clear()
    assert (cache.allocator.num_free, cache.allocator.num_cached, cache.num_named) == (2, 0, 0)
    assert sorted(dropped) == [2, 3]
    assert all(cache.allocator.is_private(page) for page in owned)
    for tokens in ([1] * 8, [2] * 8):
        assert cache.match(tokens).pages() == []
    assert cache.match([1] * 8, near=prefix).pages() == []
    # Who ran before goes on with keys and values of before: also what it had begun is not named.
    assert cache.insert(prefix, [3] * 4, cache.allocator.allocate(1)) is None
    assert cache.insert(empty, [3] * 4, cache.allocator.allocate(1)) is None
    assert cache.num_named == 0


def test_nothing_can_be_named_after_a_prefix_that_was_dropped():
    cache = make_cache(num_pages=2)
    pages = fill(cache, range(4))
    prefix = cache.match(range(4))
    cache.allocator.free(pages)
    cache.evict(1)
    assert cache.insert(prefix, range(4), cache.allocator.allocate(1)) is None


def test_names_take_no_memory_beyond_one_per_page_and_salts_used_once_take_none():
    cache = make_cache(num_pages=4)
    for i in range(50):
        cache.allocator.free(fill(cache, [i] * 8, f"salt {i}"))
    gc.collect()
    assert len(cache._links) <= 4
    assert len(cache._named) <= 4
    assert len(cache._empty) <= 4


def test_tokens_may_be_any_sequence_of_ints_and_an_array_is_as_good():
    cache = make_cache()
    fill(cache, range(8))
    for tokens in (list(range(8)), tuple(range(8)), array("q", range(8)), array("i", range(8))):
        assert cache.match(tokens).num_pages == 2


def test_a_prefix_says_why_it_was_matched_no_further():
    cache = make_cache(num_pages=3)
    cache.allocator.free(fill(cache, range(12)))
    cache.evict(1)
    for tokens, sentence in [
        (range(10), "the rest, 2 tokens, fills no page of 4, and only full pages are found"),
        (range(12), "the page of tokens 8 to 11 was dropped"),
        ([0, 1, 2, 3, 4, 5, 9, 7], "token 6 is 9, where the page cached last has 6"),
        (
            [0, 1, 2, 3, 4, 5, 6, 7, 9, 9, 9, 9],
            "no page is cached for tokens 8 to 11: never computed, or dropped since",
        ),
    ]:
        assert cache.explain(cache.match(tokens), tokens) == sentence


def test_repr():
    cache = make_cache(num_pages=3)
    fill(cache, range(8))
    assert repr(cache).startswith("PrefixCache(2 pages of 4 tokens named, PageAllocator(")
    assert repr(cache.match(range(8))) == "Prefix(2 pages, the last is page 1)"
