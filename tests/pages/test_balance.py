"""Pages that are accounted for: whoever holds them, and wherever an interruption comes."""

import inspect
import itertools
import random
import sys
from contextlib import suppress

from quire.pages import PageAllocator, PageTable, PrefixCache, allocator, table
from quire.pages.balance import Fault, find_fault, is_balanced, page_owners, settle
from quire.spec import Visibility

SIZE = 2
GROUPS = (Visibility(), Visibility(4))


def state(pool: PageAllocator) -> tuple:
    pages = range(pool.num_pages)
    counts = [(pool.refcount(p), pool.generation(p), pool.is_cached(p)) for p in pages]
    return counts, list(pool._free), list(pool._cached)


def in_use(num_pages: int = 16) -> tuple[PageAllocator, PageTable, PrefixCache]:
    """Two sequences that share pages, cached pages, and pages that someone beside the table took."""
    pool = PageAllocator(num_pages)
    cache, pages = PrefixCache(pool, SIZE, GROUPS), PageTable(pool, SIZE, GROUPS)
    pages.add("old")
    pages.append("old", 4)
    cache.insert(cache.match([]), [1, 2, 3, 4], pages.pages("old") + pages.pages("old", group=1))
    pages.free("old")
    pages.add("a")
    pages.append("a", 5)
    pages.fork("a", "b")
    pool.allocate(2)
    return pool, pages, cache


def test_a_pool_in_use_is_balanced_and_settling_it_changes_nothing():
    pool, pages, _ = in_use()
    before, held = state(pool), [pages.all_pages(s) for s in ("a", "b")]
    assert is_balanced(pool, recounts=True)
    assert find_fault(pool) is None
    assert settle(pool) == []
    assert state(pool) == before
    assert [pages.all_pages(s) for s in ("a", "b")] == held
    assert pages.occupancy() == (6, 10)


def test_owners_beside_the_tables_are_no_fault_and_keep_their_pages():
    pool, pages, _ = in_use()
    [shared, *_] = pages.pages("a")
    pool.share([shared, shared])
    del pages  # whose sequences it takes with it
    assert not is_balanced(pool)
    assert find_fault(pool) == Fault(shared, "2 owners, as nobody else holds it: it was lost")
    assert len(settle(pool)) == 5
    assert pool.refcount(shared) == 2
    pool.free([shared, shared])
    assert is_balanced(pool, recounts=True)


def test_whoever_frees_the_page_of_a_sequence_is_noticed_also_where_others_share_it():
    pool, pages, _ = in_use()
    [shared, *_] = pages.pages("a")
    pool.free([shared])
    assert not is_balanced(pool)
    assert find_fault(pool) == Fault(shared, "an owner for each of 2 sequences")
    assert page_owners(pool, shared) == ["a", "b"]
    settle(pool)
    assert pool.refcount(shared) == 2
    assert is_balanced(pool, recounts=True)


def test_a_page_that_is_left_over_is_forgotten_by_the_cache_before_anyone_gets_it():
    pool, pages, cache = in_use()
    pages.add("c", cache.pages(cache.match([1, 2])))
    [page, *_] = cache.match([1, 2]).pages()
    assert pages.pages("c") == [page]
    del pages._sequences["c"]
    assert not is_balanced(pool, recounts=True)
    assert page in settle(pool)
    assert cache.match([1, 2]).num_pages == 0
    assert cache.name_of(page) is None


def run_interrupted(action, at: int) -> int:
    """Ctrl-C before the at-th line of allocator and table that runs; how many lines were reached."""
    sources = {module.__file__: inspect.getsource(module).splitlines() for module in (allocator, table)}
    reached = 0

    def trace(frame, event, _):
        nonlocal reached
        source = sources.get(frame.f_code.co_filename)
        if source is None:
            return None
        if event == "line" and not source[frame.f_lineno - 1].lstrip().startswith(("with ", "try:")):
            reached += 1
            if reached == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(KeyboardInterrupt):
            action()
    finally:
        sys.settrace(before)
    return reached


def uses(pool: PageAllocator, pages: PageTable, cache: PrefixCache) -> None:
    """Each way in which an engine changes owners, in a pool that runs out of free pages."""
    pages.append("b", 2)  # copies
    pages.append("a", 4)
    pages.release_unseen("a")
    pages.fork("a", "c")
    pages.add("d", cache.pages(cache.match([1, 2, 3, 4])))
    pages.trim("b", 4)
    pages.replace("b", 1, pages.page_at("a", 1))
    pages.free("b")
    pool.evict(2)
    pages.free("a")


def test_an_interruption_before_any_line_loses_no_page_once_the_sequences_have_ended():
    for at in itertools.count(1):
        pool, pages, cache = in_use(24)
        reached = run_interrupted(lambda: uses(pool, pages, cache), at)  # noqa: B023
        for seq_id in pages.seq_ids:
            with suppress(Exception):
                pages.free(seq_id)
        assert pages.seq_ids == []
        settle(pool)
        assert is_balanced(pool, recounts=True)
        assert find_fault(pool) is None
        assert pool.num_available == 24 - 2, f"after an interruption at line {at}"
        cache.evict(24)
        got = pool.allocate(22)
        assert len(set(got)) == 22
        if reached < at:
            break
    assert at > 100


def test_random_faults_are_found_and_settled():
    draw = random.Random(3)
    found = 0
    for _ in range(300):
        pool, _table, _ = in_use()
        page, kind = draw.randrange(16), draw.randrange(4)
        if kind == 0:
            pool._refcounts[page] += 1
        elif kind == 1 and pool.refcount(page):
            pool._refcounts[page] -= 1
        elif kind == 2 and page in pool._cached:
            del pool._cached[page]
        elif kind == 3 and pool._free:
            pool._free[draw.randrange(len(pool._free))] = page
        else:
            continue
        fault = find_fault(pool)
        if fault is not None:
            found += 1
            settle(pool)
        assert find_fault(pool) is None
        assert is_balanced(pool, recounts=True)
        assert len({*pool._free, *pool._cached}) == pool.num_available
    assert found > 150
