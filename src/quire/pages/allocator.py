"""Which pages are free, and how many owners each of the others has."""

from __future__ import annotations

import operator
from array import array
from collections import Counter
from collections.abc import Iterable

from quire.errors import ArgumentError, OutOfPages

MAX_PAGES = 2**31 - 1  # page tables hold page ids as int32


class PageAllocator:
    """Hands out page ids and counts the owners of each.

    A page is free (no owner) or allocated (one owner or more), never both: it is handed out once,
    and again only after its last owner has given it up.

    Ids come lowest first while the pool is fresh. After that the last pages to be freed are the
    first to be handed out: their lines are the likeliest to be in cache still, and the part of the
    pool ever touched stays small. Pages freed by one call come back in the order they had there, so
    that a sequence's neighbouring pages stay neighbours for the next one.

    Args:
        num_pages: pages in the pool, 1 to 2**31 - 1; ids are 0 to num_pages - 1.
    Raises:
        ArgumentError: num_pages out of range.
    Cost: 8 bytes of host memory per page; every call is linear in the pages it names and
        independent of num_pages.
    Source: the block manager of PagedAttention, arXiv:2309.06180 §4.2-4.4.
    """

    def __init__(self, num_pages: int) -> None:
        if not isinstance(num_pages, int) or not 1 <= num_pages <= MAX_PAGES:
            raise ArgumentError(
                f"num_pages must be an int from 1 to {MAX_PAGES}; got {num_pages!r}. "
                "Fix: pass the num_pages of the KVPool"
            )
        self._free = array("i", range(num_pages - 1, -1, -1))  # a stack: the next to hand out is last
        self._refcounts = array("i", [0]) * num_pages

    @property
    def num_pages(self) -> int:
        """All pages, free or not."""
        return len(self._refcounts)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free)

    def refcount(self, page: int) -> int:
        """Owners of one page; 0 when it is free.

        Raises:
            ArgumentError: no such page.
        """
        if not 0 <= page < len(self._refcounts):
            raise ArgumentError(self._no_such_page(page))
        return self._refcounts[page]

    def allocate(self, n: int) -> list[int]:
        """Take n free pages, each with one owner: the caller.

        Raises:
            OutOfPages: fewer than n pages are free; nothing was changed.
            ArgumentError: n is negative.
        """
        if n < 0:
            raise ArgumentError(f"n must be 0 pages or more; got {n}. Fix: use free to give pages back")
        if n > len(self._free):
            raise OutOfPages(
                f"allocate must find {n} free pages; got {self.num_free} free of {self.num_pages} in total. "
                "Fix: free a sequence first, or make the pool larger"
            )
        first = len(self._free) - n
        pages = self._free[first:].tolist()[::-1]
        del self._free[first:]
        for page in pages:
            self._refcounts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one owner to each page; a page named twice gains two.

        Raises:
            ArgumentError: a page is free or does not exist; nothing was changed.
        """
        wanted = self._as_page_ids(pages)
        for page in wanted:
            if not self._refcounts[page]:
                raise ArgumentError(
                    f"share must name allocated pages; got page {page}, which is free. "
                    "Fix: share pages before their last owner frees them"
                )
        for page in wanted:
            self._refcounts[page] += 1

    def free(self, pages: Iterable[int]) -> list[int]:
        """Take one owner from each page; a page named twice loses two.

        Returns:
            The pages that lost their last owner and are free now, in the order given.
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
        released = []
        for page in returned:
            self._refcounts[page] -= 1
            if not self._refcounts[page]:
                released.append(page)
        self._free.extend(reversed(released))
        return released

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
