"""Which pages have owners and how many, which are kept without one, and which are free."""

from __future__ import annotations

import operator
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING
from weakref import WeakSet

from quire.errors import ArgumentError, OutOfPages

if TYPE_CHECKING:
    from quire.pages.table import PageTable

MAX_PAGES = 2**31 - 1  # page tables hold page ids as int32


class PageAllocator:
    """Hands out page ids and counts the owners of each.

    A page is in one of three states:

        owned    one owner or more
        cached   no owner, but its content is known to someone (see `keep`) and stays until the page is needed
        free     no owner, content unknown

    `allocate` takes free pages first and then cached ones, in the order in which they lost their last owner. A
    page's `generation` grows whenever its content is dropped: with the last owner of a page that is not kept,
    or when a cached page is taken. To know later whether a page still has the same content, store its generation and
    compare.

    Ids come lowest first while the pool is fresh. After that the last pages to become free are the
    first to be handed out: their lines are the likeliest to be in cache still, and the part of the
    pool ever touched stays small. Pages freed by one call come back in the order they had there, so
    that a sequence's neighbouring pages stay neighbours for the next one.

    **Two kinds of owners.** The sequences of a `PageTable` are counted by their table as well (`counted=True`); all
    other owners are counted here. So `quire.pages.balance` can tell a page that was lost from one that someone beside
    the tables holds.

    Not thread-safe: engines on one model hold `PagedModel.lock` while they use its allocator.

    Args:
        num_pages: pages in the pool, 1 to 2**31 - 1; ids are 0 to num_pages - 1.
        on_drop: called with the pages whose content has just been dropped, before they are handed out
            again; PagedModel poisons them with QUIRE_DEBUG=1.
    Attributes:
        tables: those whose sequences own pages here, while anyone holds the tables.
        on_evict: called with cached pages that are about to be dropped because their memory is needed, while they still
            hold their content; `Swap` copies them. If it raises, nothing was changed.
    Raises:
        ArgumentError: num_pages out of range.
    Cost: 21 bytes of host memory per page; every call is linear in the pages it names and
        independent of num_pages.
    Source: the block manager of PagedAttention, arXiv:2309.06180 §4.2-4.4.
    """

    def __init__(self, num_pages: int, *, on_drop: Callable[[list[int]], None] | None = None) -> None:
        if not isinstance(num_pages, int) or isinstance(num_pages, bool) or not 1 <= num_pages <= MAX_PAGES:
            raise ArgumentError(
                f"num_pages must be an int from 1 to {MAX_PAGES}; got {num_pages!r}. "
                "Fix: pass the num_pages of the KVPool"
            )
        self._free = array("i", range(num_pages - 1, -1, -1))  # a stack: the next to hand out is last
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to evict is first
        self._refcounts = array("i", [0]) * num_pages
        self._kept = bytearray(num_pages)
        self._generations = array("q", [0]) * num_pages
        self._on_drop = on_drop
        self.tables: WeakSet[PageTable] = WeakSet()
        self._others = array("i", [0]) * num_pages  # owners that are no sequence of a table
        # Both follow from what is above, and are kept apart to notice when that goes wrong; see quire.pages.balance.
        self._num_owned = 0
        self._num_counted = 0  # owners that are sequences, all pages together
        self.on_evict: Callable[[list[int]], None] | None = None

    @property
    def num_pages(self) -> int:
        """All pages, whatever their state."""
        return len(self._refcounts)

    @property
    def num_free(self) -> int:
        """Pages without owner and without known content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages without owner whose content is kept."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_owned(self) -> int:
        """Pages with an owner; one that several share counts once."""
        return self.num_pages - self.num_available

    def refcount(self, page: int) -> int:
        """Owners of one page; 0 when it is free or cached.

        Raises:
            ArgumentError: no such page.
        """
        if not 0 <= page < len(self._refcounts):
            raise ArgumentError(self._no_such_page(page))
        return self._refcounts[page]

    def refcounts(self) -> array[int]:
        """Owners of every page, int32, a copy. Cost: O(num_pages), a copy of 4 bytes per page."""
        return self._refcounts[:]

    def kept(self) -> bytes:
        """For every page 1 where its content is kept, else 0, a copy. Cost: O(num_pages), a byte per page."""
        return bytes(self._kept)

    def generation(self, page: int) -> int:
        """How often the content of a page has been dropped.

        Raises:
            ArgumentError: no such page.
        """
        if not 0 <= page < len(self._refcounts):
            raise ArgumentError(self._no_such_page(page))
        return self._generations[page]

    def is_cached(self, page: int) -> bool:
        """Whether a page has no owner and its content is kept.

        Raises:
            ArgumentError: no such page.
        """
        return not self.refcount(page) and bool(self._kept[page])

    def is_private(self, page: int) -> bool:
        """Whether an owner may write into a page: it is the only one, and the content is not kept.

        Raises:
            ArgumentError: no such page.
        """
        if not 0 <= page < len(self._refcounts):
            raise ArgumentError(self._no_such_page(page))
        return self._refcounts[page] == 1 and not self._kept[page]

    def allocate(self, n: int, *, counted: bool = False) -> list[int]:
        """Take n pages, each with one owner: the caller. Cached pages are evicted when no more are free.

        Args:
            counted: the owner is a sequence of a `PageTable`.
        Raises:
            OutOfPages: fewer than n pages are free or cached; nothing was changed.
            ArgumentError: n is negative.
        """
        if n < 0:
            raise ArgumentError(f"n must be 0 pages or more; got {n}. Fix: use free to give pages back")
        if n > len(self._free):
            if n > self.num_available:
                raise OutOfPages(
                    f"allocate must find {n} free pages; got {self.num_available} free of {self.num_pages} in total. "
                    "Fix: free a sequence first, or make the pool larger"
                )
            self.evict(n - len(self._free))
        first = len(self._free) - n
        pages = self._free[first:].tolist()[::-1]
        del self._free[first:]
        for page in pages:
            self._refcounts[page] = 1
        self._num_owned += n
        self._count_in(pages, counted)
        return pages

    def share(self, pages: Iterable[int], *, counted: bool = False) -> None:
        """Add one owner to each page; a page named twice gains two. A cached page is owned again, its content kept.

        Args:
            counted: as for `allocate`.
        Raises:
            ArgumentError: a page is free or does not exist; nothing was changed.
        """
        wanted = self._as_page_ids(pages)
        for page in wanted:
            if not self._refcounts[page] and page not in self._cached:
                raise ArgumentError(
                    f"share must name owned or cached pages; got page {page}, which is free. "
                    "Fix: share pages before their last owner frees them"
                )
        for page in wanted:
            if not self._refcounts[page]:
                del self._cached[page]
                self._num_owned += 1
            self._refcounts[page] += 1
        self._count_in(wanted, counted)

    def keep(self, pages: Iterable[int]) -> None:
        """Keep the content of pages. When a kept page loses its last owner it becomes cached instead of free.

        A kept page is not written any more: `PageTable.append` copies it first. To keep a page twice changes nothing.

        Raises:
            ArgumentError: a page has no owner or does not exist; nothing was changed.
        """
        wanted = self._as_page_ids(pages)
        for page in wanted:
            if not self._refcounts[page]:
                raise ArgumentError(
                    f"keep must name owned pages; got page {page}, which has no owner. "
                    "Fix: keep pages before their last owner frees them"
                )
        for page in wanted:
            self._kept[page] = True

    def unkeep(self, pages: Iterable[int]) -> list[int]:
        """Keep the content of pages no longer: cached ones are dropped and free, owned ones are writable again.

        Returns:
            The pages that are free now, in the order given.
        Raises:
            ArgumentError: a page does not exist; nothing was changed.
        """
        wanted = self._as_page_ids(pages)
        for page in wanted:
            self._kept[page] = False
        released = [page for page in dict.fromkeys(wanted) if page in self._cached]
        for page in released:
            del self._cached[page]
        self._drop(released)
        return released

    def free(self, pages: Iterable[int], *, counted: bool = False) -> list[int]:
        """Take one owner from each page; a page named twice loses two.

        Of the kept pages that lose their last owner the last named is the first to be evicted, so that a
        sequence's beginning, which others are the likeliest to share, outlives its end.

        Args:
            counted: as for `allocate`.
        Returns:
            The pages that are free now, in the order given: they lost their last owner and were not kept.
        Raises:
            ArgumentError: a page does not exist or has fewer owners than it would lose;
                nothing was changed.
        """
        returned = self._as_page_ids(pages)
        for page, owners_lost in Counter(returned).items():
            if owners_lost > self._refcounts[page]:
                raise ArgumentError(
                    f"free must name a page at most once per owner; got page {page} {owners_lost} times, "
                    f"owners {self._refcounts[page]}. Fix: free a page once per allocate or share"
                )
        released: list[int] = []
        cached: list[int] = []
        for page in returned:
            self._refcounts[page] -= 1
            if not self._refcounts[page]:
                (cached if self._kept[page] else released).append(page)
        self._cached.update(dict.fromkeys(reversed(cached)))
        self._num_owned -= len(released) + len(cached)
        self._count_out(returned, counted)
        self._drop(released)
        return released

    def evict(self, n: int) -> list[int]:
        """Drop the content of up to n cached pages, in the order in which they lost their last owner.

        Returns:
            The pages, free now; fewer than n when no more are cached.
        Raises:
            ArgumentError: n is negative.
        """
        if n < 0:
            raise ArgumentError(
                f"n must be 0 pages or more; got {n}. Fix: evict(allocator.num_cached) evicts all"
            )
        evicted = list(islice(self._cached, n))
        if self.on_evict is not None and evicted:
            self.on_evict(evicted)
        for page in evicted:
            del self._cached[page]
            self._kept[page] = False
        self._drop(evicted)
        return evicted

    def _count_in(self, pages: list[int], counted: bool) -> None:
        if counted:
            self._num_counted += len(pages)
        else:
            for page in pages:
                self._others[page] += 1

    def _count_out(self, pages: list[int], counted: bool) -> None:
        if counted:
            self._num_counted -= len(pages)
        else:
            for page in pages:
                if self._others[page]:
                    self._others[page] -= 1
                else:  # it was a sequence's, whose table still counts it
                    self._num_counted -= 1

    def _drop(self, pages: list[int]) -> None:
        """Make pages free, which have no owner and are not kept."""
        for page in pages:
            self._generations[page] += 1
        self._free.extend(reversed(pages))
        if self._on_drop is not None and pages:
            self._on_drop(pages)

    def _as_page_ids(self, pages: Iterable[int]) -> list[int]:
        ids = [operator.index(page) for page in pages]  # plain ints, also from NumPy and torch
        for page in ids:
            if not 0 <= page < len(self._refcounts):
                raise ArgumentError(self._no_such_page(page))
        return ids

    def _no_such_page(self, page: int) -> str:
        return (
            f"page must be an id from 0 to {self.num_pages - 1}; got {page}. "
            "Fix: pass ids that allocate returned"
        )

    def __repr__(self) -> str:
        return (
            f"PageAllocator(num_pages={self.num_pages}: {self.num_owned} owned, {self.num_cached} cached, "
            f"{self.num_free} free)"
        )
