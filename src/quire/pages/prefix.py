"""Which pages hold the beginning of a text, so that the next text that begins alike need not compute it."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence

from quire.errors import ArgumentError
from quire.pages.allocator import PageAllocator
from quire.spec import check_size

_UNKNOWN = -1  # the generation of a prefix that `clear` has forgotten; no page has it


class Prefix:
    """The first full pages of a text: one page, and the prefix before it. Made by a `PrefixCache` alone.

    Attributes:
        parent: the prefix without the last page; None for the empty prefix.
        page: the last page; -1 for the empty prefix.
        tokens: the tokens of that page, int64 as bytes.
        num_pages: pages from the beginning of the text.
    """

    __slots__ = ("__weakref__", "_generation", "_next_tokens", "num_pages", "page", "parent", "tokens")

    def __init__(self, parent: Prefix | None, page: int, tokens: bytes, generation: int) -> None:
        self.parent = parent
        self.page = page
        self.tokens = tokens
        self.num_pages: int = 0 if parent is None else parent.num_pages + 1
        self._generation = generation
        self._next_tokens = b""  # of the page that was named last after this prefix, for `explain`

    def pages(self) -> list[int]:
        """Its page ids, from the beginning of the text."""
        pages, prefix = [], self
        while prefix.parent is not None:
            pages.append(prefix.page)
            prefix = prefix.parent
        return pages[::-1]

    def __repr__(self) -> str:
        return f"Prefix({self.num_pages} pages, the last is page {self.page})"


class PrefixCache:
    """Finds full pages by the tokens that they hold and all tokens before these.

    Keys and values of a token depend on the tokens before it, so a page is found by a chain: its own tokens, after
    the prefix that ends with the page before, after a salt. One dictionary holds all links, (prefix, tokens) → prefix.
    It compares the tokens themselves, not only their hashes, so two texts never meet in one page by a collision.

    A page is named while it has an owner and is then kept by the allocator (see `PageAllocator.keep`): nobody writes
    it any more, and with its last owner gone it stays cached until its memory is needed. A dropped page is recognised
    by its generation; nobody has to tell the cache.

    **Who keeps a match alive.** The allocator's owners do: `PageTable.add(seq_id, prefix.pages())` shares the pages,
    and a shared page is not evicted. A lock of the cache's own would be a second count of the same thing.

    **Eviction** takes the page that lost its last owner the longest ago, and of one sequence the end before the
    beginning. While whoever owns a page also owns the pages before it, these outlive it: leaves go first. So a
    sequence that has computed a page that is named already, as two that run side by side may, takes the named page and
    gives its own back (see `insert`).

    Not thread-safe: engines on one model hold `PagedModel.lock` while they use its cache.

    Args:
        allocator: owns the page ids; one cache per allocator.
        page_size: tokens per page.
    Raises:
        ArgumentError: page_size below one.
    Cost: about 400 bytes of host memory per named page; half a µs per page matched, 1 µs per page inserted.
    Source: automatic prefix caching as in vLLM; the tree of prefixes, SGLang, arXiv:2312.07104 §3.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        check_size("page_size", page_size)
        self.allocator = allocator
        self.page_size = page_size
        # Links whose page was dropped stay until the page is named again: at most one per page.
        self._links: dict[tuple[Prefix, bytes], Prefix] = {}
        self._named: dict[int, Prefix] = {}  # by page
        # By salt, and only while something is named after it: a salt may be used once and never again.
        self._empty: weakref.WeakValueDictionary[str | None, Prefix] = weakref.WeakValueDictionary()

    @property
    def num_named(self) -> int:
        """Pages that `match` can find, owned or cached.

        Cost: O(pages named); for tests and reports.
        """
        return sum(map(self.is_known, self._named.values()))

    def match(self, tokens: Sequence[int], salt: str | None = None, *, near: Prefix | None = None) -> Prefix:
        """The longest run of full pages whose tokens, from the beginning, are these.

        Reads only: no owner, no order of eviction and no name is changed, so a match that is to be used must get an
        owner before anything is allocated.

        Args:
            tokens: int64 `array` ("q"), or any sequence of ints.
            salt: only pages that were inserted under the same salt are found.
            near: an earlier match of the same tokens and salt. The search starts there, so a text that waits is not
                searched from its beginning in every step. What it returns may then hold a dropped page in its middle
                where someone owned a page without those before it: match without `near` before using the pages.
        Returns:
            The prefix; with no pages where nothing is found.
        Cost: O(pages found), half a µs each.
        """
        tokens = _as_array(tokens)
        prefix = self._empty_prefix(salt) if near is None else near
        while not self.is_known(prefix):
            prefix = self._empty_prefix(salt) if prefix.parent is None else prefix.parent
        size, find, generation = self.page_size, self._links.get, self.allocator.generation
        for start in range(prefix.num_pages * size, len(tokens) - size + 1, size):
            longer = find((prefix, tokens[start : start + size].tobytes()))
            if longer is None or longer._generation != generation(longer.page):
                break
            prefix = longer
        return prefix

    def insert(self, prefix: Prefix, tokens: Sequence[int], pages: Sequence[int]) -> Prefix | None:
        """Name full pages, whose tokens come after a prefix. Their keys and values must have been written.

        Changes no owner and no other page's name. A page whose tokens have a page after this prefix already stays
        without a name.

        Args:
            prefix: what comes before, from `match` or `insert`; the caller owns its pages.
            tokens: the tokens of the pages end to end, page_size for each.
            pages: owned pages, which nobody writes from now on.
        Returns:
            The prefix longer by these pages. Where the tokens of one have a page already it holds that page instead:
            take it too (`PageTable.replace`), so that who owns a page owns all before it. None where the prefix was
            dropped or cleared meanwhile: nothing after it can be named.
        Raises:
            ArgumentError: a page partly filled, without owner, or named with other tokens; nothing was changed.
        Cost: about 1 µs per page, and 2 µs per call.
        """
        data, width = _as_array(tokens).tobytes(), 8 * self.page_size
        if len(data) != width * len(pages):
            raise ArgumentError(
                f"tokens must fill {len(pages)} pages of {self.page_size}; got {len(tokens)}. "
                "Fix: insert full pages only"
            )
        if not self.is_known(prefix):
            return None
        find, start = self._links.get, 0
        while start < len(data):
            known = find((prefix, data[start : start + width]))
            if known is None or not self.is_known(known):
                return self._name(prefix, data[start:], pages[start // width :])
            prefix = known
            start += width
        return prefix

    def _name(self, prefix: Prefix, data: bytes, pages: Sequence[int]) -> Prefix:
        for page in pages:
            before = self._named.get(page)
            if before is not None and self.is_known(before):
                raise ArgumentError(
                    f"pages must not be named with other tokens; got page {page}, the end of a prefix of "
                    f"{before.num_pages} pages. Fix: insert a page once, after the prefix that it was computed with"
                )
        self.allocator.keep(pages)
        width, start = 8 * self.page_size, 0
        for page in pages:
            tokens = data[start : start + width]
            start += width
            self._forget_link(page)
            longer = Prefix(prefix, page, tokens, self.allocator.generation(page))
            self._named[page] = self._links[prefix, tokens] = longer
            prefix._next_tokens = tokens
            prefix = longer
        return prefix

    def evict(self, n: int) -> int:
        """Drop up to n cached pages, least recently used and leaves first. Never touches a page with an owner.

        Returns:
            How many were dropped.
        Raises:
            ArgumentError: n is negative.
        """
        return len(self.allocator.evict(n))

    def clear(self) -> None:
        """Forget every name. Cached pages become free; owned ones stay as they are with their owners.

        A sequence that runs meanwhile has keys and values of before in its pages: `insert` names nothing after them.

        Cost: O(pages named).
        """
        named = [prefix.page for prefix in self._named.values() if self.is_known(prefix)]
        for prefix in (*self._named.values(), *self._empty.values()):
            prefix._generation = _UNKNOWN
        self._links.clear()
        self._named.clear()
        self._empty.clear()
        self.allocator.unkeep(named)

    def is_known(self, prefix: Prefix) -> bool:
        """Whether the last page of a prefix still holds its tokens. Reads only."""
        page = prefix.page
        return prefix._generation == (self.allocator.generation(page) if page >= 0 else 0)

    def was_cleared(self, prefix: Prefix) -> bool:
        """Whether `clear` has forgotten a prefix; its owners go on without names. Reads only."""
        return prefix._generation == _UNKNOWN

    def name_of(self, page: int) -> Prefix | None:
        """The prefix that ends with a page; None for a page without known content. Reads only."""
        prefix = self._named.get(page)
        return prefix if prefix is not None and self.is_known(prefix) else None

    def explain(self, prefix: Prefix, tokens: Sequence[int]) -> str:
        """Why `match` of these tokens returned this prefix and no longer one, as the end of a sentence. Reads only.

        Cost: O(page_size).
        """
        tokens = _as_array(tokens)
        start = prefix.num_pages * self.page_size
        page = tokens[start : start + self.page_size]
        if len(page) < self.page_size:
            return f"the rest, {len(page)} tokens, fills no page of {self.page_size}, and only full pages are found"
        span = f"tokens {start} to {start + self.page_size - 1}"
        if (prefix, page.tobytes()) in self._links:
            return f"the page of {span} was dropped"
        other = self._links.get((prefix, prefix._next_tokens))
        if other is not None and self.is_known(other):
            cached = array("q", prefix._next_tokens)
            at = next(i for i in range(self.page_size) if page[i] != cached[i])
            return f"token {start + at} is {page[at]}, where the page cached last has {cached[at]}"
        return f"no page is cached for {span}: never computed, or dropped since"

    def _empty_prefix(self, salt: str | None) -> Prefix:
        prefix = self._empty.get(salt)
        if prefix is None:
            prefix = self._empty[salt] = Prefix(None, -1, b"", 0)
        return prefix

    def _forget_link(self, page: int) -> None:
        """Forget what a page was named before its content was dropped."""
        dropped = self._named.get(page)
        if dropped is not None and dropped.parent is not None:
            key = (dropped.parent, dropped.tokens)
            if self._links.get(key) is dropped:
                del self._links[key]

    def __repr__(self) -> str:
        return f"PrefixCache({self.num_named} pages of {self.page_size} tokens named, {self.allocator!r})"


def _as_array(tokens: Sequence[int]) -> array[int]:
    return tokens if isinstance(tokens, array) and tokens.typecode == "q" else array("q", tokens)
