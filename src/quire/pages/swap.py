"""Which pages have a copy in host memory, and when it pays to bring one back."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from quire.debug import debug_enabled
from quire.errors import PageStateError
from quire.pages.allocator import PageAllocator
from quire.pages.prefix import Prefix, PrefixCache


class Store(Protocol):
    """Where contents of pages are copied to and from; `HostPool` is one.

    Attributes:
        bytes_per_page: bytes that a copy of one page moves.
    """

    num_pages: int
    bytes_per_page: int

    def save(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copy pages to host pages; the caller may overwrite the pages at once."""

    def load(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        """Copy host pages to pages; the caller may read the pages at once."""

    def checksum(self, host_page: int) -> int:
        """A number by which changed bytes show."""


@dataclass
class SwapCosts:
    """What the rule knows of this machine and model.

    bytes_per_second: of copies from the host, as measured at the start.
    seconds_per_token: of a computed token, in the fastest step so far; infinite before the first.
    """

    bytes_per_second: float
    seconds_per_token: float = math.inf

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take notice of a step."""
        self.seconds_per_token = min(self.seconds_per_token, seconds / num_tokens)

    def pays(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether to copy num_bytes from the host takes less time than to compute num_tokens again.

        num_bytes / bytes_per_second < num_tokens × seconds_per_token. The fastest step counts, which is one with many
        tokens: a prompt that is computed again is one, too.
        """
        return num_bytes < num_tokens * self.seconds_per_token * self.bytes_per_second


class _Place(NamedTuple):
    """A copy: its host page, that page's generation, and a checksum where copies are checked."""

    page: int
    generation: int
    checksum: int


class Swap:
    """Copies named pages to host memory before they are dropped, and brings them back when a text begins with them.

    Only pages with a name are copied, so a page on the host is found as one on the device is: by its tokens and all
    tokens before them. That serves preemption too. The full pages of a preempted request are named and cached; when
    their memory is needed they go to the host, and come back as a hit when the request is let in again. Its last,
    partly filled page is computed again.

    Nobody writes a named page, so a copy stays true while its page is back on the device. It is kept, and a page that
    is dropped for a second time need not be copied again. Host pages are dropped when host memory is full, those first
    that were copied or brought back the longest ago, the ends of texts before their beginnings.

    Not thread-safe: engines on one model hold `PagedModel.lock` while they use it. Where an exception, Ctrl-C too,
    comes in the middle, pages without a finished copy have no name, and those taken are given back.

    Args:
        cache: whose pages are copied; one Swap per cache.
        store: copies their contents.
        costs: what the rule goes by.
    Attributes:
        allocator: of host pages; cached are those that hold a copy.
        num_saved, num_returned: pages copied to the host and back so far.
    Cost: about 300 bytes of host memory per copy, beside the copy; 2 µs per page saved or brought back, beside copying.
    """

    def __init__(self, cache: PrefixCache, store: Store, costs: SwapCosts) -> None:
        self.cache = cache
        self.store = store
        self.costs = costs
        self.allocator = PageAllocator(store.num_pages)
        self.num_saved = self.num_returned = 0
        self._taken: list[int] = []  # pages of the device that `bring_back` owns
        self._pinned: list[int] = []  # host pages that it reads
        self._written: list[int] = []  # host pages that copies are made to
        self._places: dict[tuple[Prefix, int], _Place] = {}  # by prefix and group
        self._names: dict[int, tuple[Prefix, int]] = {}  # by host page
        self._checked = debug_enabled()
        self.allocator.on_evict = self._forget
        cache.allocator.on_evict = self._save
        cache.on_clear = self._clear

    @property
    def num_swapped(self) -> int:
        """Host pages that hold a copy."""
        return len(self._places)

    def bring_back(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Copy pages back to the device with which a text begins, if that pays. Then `match` finds them, without owner.

        Args:
            tokens: the text.
            salt: as for `PrefixCache.match`.
        Returns:
            How many more tokens `match` finds now; 0 where it found all there are, where computing them is
            cheaper, and where too few pages of the device are available.
        Raises:
            PageStateError: a host page does not hold what it was taken for.
        Cost: O(pages of the text that are known), and a copy per page brought back.
        """
        self.release()
        if not self._places:
            return 0
        data, size = array("q", tokens).tobytes(), self.cache.page_size
        path = self.cache.known_after(self.cache.empty(salt), data[: len(data) - len(data) % (8 * size)])
        count = self._longest(path, len(tokens))
        gained = (count - self.cache.match(tokens, salt).num_pages) * size
        if gained <= 0:
            return 0
        in_sight = self._in_sight(path[:count], len(tokens))
        lost = [each for each in in_sight if not self.cache.holds(*each)]
        if not self.costs.pays(len(lost) * self.store.bytes_per_page, gained):
            return 0
        there = [prefix.page_of(group) for prefix, group in in_sight if self.cache.holds(prefix, group)]
        return gained if self._load(lost, there) else 0

    def audit(self) -> None:
        """Check that every copy has a host page of its own, whose content was not dropped.

        Raises:
            PageStateError: one has not.
        Cost: O(copies); with QUIRE_DEBUG=1 before every copy.
        """
        for name, place in self._places.items():
            self._check(name, place)
        if self.allocator.num_cached + self.allocator.num_owned < len(self._places):
            raise PageStateError(
                f"host pages must be kept while a prefix is named by them; got {len(self._places)} copies in "
                f"{self.allocator!r}. Fix: free no page of Swap.allocator, or report a bug of Quire"
            )

    def __repr__(self) -> str:
        return f"Swap({self.num_swapped} of {self.allocator.num_pages} pages on the host)"

    def _longest(self, path: Sequence[Prefix], num_tokens: int) -> int:
        """How many pages the longest prefix has whose pages in sight are all on the device or the host."""
        groups, size, longest = self.cache.groups, self.cache.page_size, 0
        gaps = [-1] * len(groups)  # in each group the last page so far that is nowhere
        for index, prefix in enumerate(path):
            for group in range(len(groups)):
                if not self.cache.holds(prefix, group) and (prefix, group) not in self._places:
                    gaps[group] = index
            if groups[0].sees_all and gaps[0] >= 0:
                break
            position = min((index + 1) * size, num_tokens - 1)
            if all(gap < sight.first_key(position) // size for gap, sight in zip(gaps, groups, strict=True)):
                longest = index + 1
        return longest

    def _in_sight(self, path: Sequence[Prefix], num_tokens: int) -> list[tuple[Prefix, int]]:
        """The pages of a prefix that the next token sees, page by page; where there is none, the last token."""
        size = self.cache.page_size
        position = min(len(path) * size, num_tokens - 1)
        firsts = [sight.first_key(position) // size for sight in self.cache.groups]
        return [
            (prefix, group)
            for index, prefix in enumerate(path)
            for group, first in enumerate(firsts)
            if index >= first
        ]

    def _load(self, lost: list[tuple[Prefix, int]], there: list[int]) -> bool:
        """Bring pages back, beside those that are there; False where too few are available."""
        device = self.cache.allocator
        places = [self._places[name] for name in lost]
        for name, place in zip(lost, places, strict=True):
            self._check(name, place)
        if self._checked:
            self.audit()
        host_pages = [place.page for place in places]
        try:
            # Whatever is evicted to make room, on either side, is none of these.
            self._taken += _shared(there, device)
            self._pinned += _shared(host_pages, self.allocator)
            if device.num_available < len(lost):
                return False
            self._taken += device.allocate(len(lost))
            fresh = self._taken[len(there) :]
            self.store.load(host_pages, fresh)
            self._check_bytes(places)
            self.cache.put_back([(*name, page) for name, page in zip(lost, fresh, strict=True)])
            self.num_returned += len(lost)
        finally:
            self.release()
        return True

    def release(self) -> None:
        """Give back the pages that an interrupted call had taken; between calls there are none."""
        self._end_copy()
        if self._pinned:
            pinned, self._pinned = self._pinned, []
            self.allocator.free(pinned)
        if self._taken:
            taken, self._taken = self._taken, []
            self.cache.allocator.free(taken)

    def _save(self, pages: list[int]) -> None:
        """Copy pages that are about to be dropped, unless there is a copy."""
        cache, wanted, names = self.cache, [], []
        for page in pages:
            prefix = cache.name_of(page)
            if prefix is None:
                continue
            name = prefix, prefix.group_of(page)
            place = self._places.get(name)
            if place is None:
                wanted.append(page)
                names.append(name)
            elif self.allocator.is_cached(place.page):  # used, as if copied again
                self.allocator.share([place.page])
                self.allocator.free([place.page])
        # The last to be dropped are the likeliest to be asked for again.
        count = min(len(wanted), self.allocator.num_available)
        if not count or not self._may_pay():
            return
        if self._checked:
            self.audit()
        self._copy(wanted[-count:], names[-count:])

    def _copy(self, pages: list[int], names: list[tuple[Prefix, int]]) -> None:
        self._end_copy()
        allocator = self.allocator
        try:
            self._written += allocator.allocate(len(pages))
            self.store.save(pages, self._written)
            allocator.keep(self._written)
            for host_page, name in zip(self._written, names, strict=True):
                checksum = self.store.checksum(host_page) if self._checked else 0
                self.cache.hold(name[0])
                self._names[host_page] = name
                self._places[name] = _Place(host_page, allocator.generation(host_page), checksum)
            self.num_saved += len(pages)
        finally:
            self._end_copy()

    def _end_copy(self) -> None:
        if self._written:
            written, self._written = self._written, []
            self.allocator.free(written[::-1])  # the first to be dropped is the first that was dropped before

    def _may_pay(self) -> bool:
        """Whether it would pay to bring back a page of tokens, of which each group has its part."""
        cache = self.cache
        return self.costs.pays(len(cache.groups) * self.store.bytes_per_page, cache.page_size)

    def _forget(self, host_pages: list[int]) -> None:
        """Host pages are about to be dropped."""
        for host_page in host_pages:
            name = self._names.pop(host_page, None)
            # An interruption may have come between a name and its place.
            if name in self._places and self._places[name].page == host_page:
                del self._places[name]
                self.cache.let_go(name[0])

    def _clear(self) -> None:
        """All names are forgotten."""
        host_pages = list(self._names)
        self._names.clear()
        self._places.clear()
        self.allocator.unkeep(host_pages)

    def _check(self, name: tuple[Prefix, int], place: _Place) -> None:
        page = place.page
        if self._names.get(page) != name or self.allocator.generation(page) != place.generation:
            raise PageStateError(
                f"host page {page} must hold page {name[0].num_pages - 1} of a text, in generation "
                f"{place.generation}; got generation {self.allocator.generation(page)} of "
                f"{self._names.get(page, 'nothing')}. "
                "Fix: free no page of Swap.allocator, or report a bug of Quire"
            )

    def _check_bytes(self, places: Sequence[_Place]) -> None:
        for place in places if self._checked else ():
            found = self.store.checksum(place.page)
            if found != place.checksum:
                raise PageStateError(
                    f"host page {place.page} must hold the bytes that were copied to it, with checksum "
                    f"{place.checksum}; got {found}. Fix: write into no host page, or report a bug of Quire"
                )


def _shared(pages: list[int], allocator: PageAllocator) -> list[int]:
    allocator.share(pages)
    return pages
