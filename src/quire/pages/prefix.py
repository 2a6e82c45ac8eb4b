"""Which pages hold the beginning of a text, so that the next text that begins alike need not compute it."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence

from quire.errors import ArgumentError
from quire.pages.allocator import PageAllocator
from quire.spec import Visibility, check_size

_UNKNOWN = -1  # the generation of a page whose prefix was forgotten; no page has it


class Prefix:
    """The first full pages of a text: the last one, in each group, and the prefix before it. Made by a `PrefixCache`.

    Attributes:
        parent: the prefix without the last page; None for the empty prefix.
        page: the last page, of the first group; -1 for the empty prefix.
        tokens: the tokens of that page, int64 as bytes.
        num_pages: pages from the beginning of the text.
    """

    __slots__ = (
        "__weakref__", "_copies", "_generation", "_next_tokens", "_others", "_uses", "num_pages", "page", "parent",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        parent: Prefix | None,
        page: int,
        tokens: bytes,
        generation: int,
    ) -> None:
        self.parent = parent
        self.page = page
        self.tokens = tokens
        self.num_pages: int = 0 if parent is None else parent.num_pages + 1
        self._generation = generation
        self._others: Sequence[tuple[int, int]] = ()  # page and generation in each group but the first
        self._copies = 0  # elsewhere, of its pages; see PrefixCache.hold
        self._uses = 0  # longer prefixes, and pages that still have this name; see PrefixCache._let_go
        self._next_tokens = b""  # of the page that was named last after this prefix, for `explain`

    def pages(self, group: int = 0, first: int = 0) -> list[int]:
        """Page ids of one group in the order of the text, from its first-th page on."""
        pages, prefix, left = [], self, self.num_pages - first
        while left > 0 and prefix.parent is not None:
            pages.append(prefix._others[group - 1][0] if group else prefix.page)
            prefix = prefix.parent
            left -= 1
        return pages[::-1]

    def page_of(self, group: int) -> int:
        """The last page, of one group."""
        return self._others[group - 1][0] if group else self.page

    def group_of(self, page: int) -> int:
        """The group of which a page is the last one."""
        return 0 if page == self.page else [other for other, _ in self._others].index(page) + 1

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

    **Groups.** Where layers have several page tables (see `PageTable`), the same tokens lie on one page of each group,
    and a prefix has them all. It is found if each group has those pages that the next token sees: a group that sees
    all tokens every page, a group with a window the last few.

    **Who keeps a match alive.** The allocator's owners do: `PageTable.add(seq_id, cache.pages(prefix))` shares the
    pages, and a shared page is not evicted. A lock of the cache's own would be a second count of the same thing.

    **Eviction** takes the page that lost its last owner the longest ago, and of one sequence the end before the
    beginning. While whoever owns a page also owns the pages before it, these outlive it: leaves go first. So a
    sequence that has computed a page that is named already, as two that run side by side may, takes the named page and
    gives its own back (see `insert`). A group with a window has no leaves: a sequence gives up its pages from the
    beginning on as they fall out of sight, and a prefix is found without them.

    Not thread-safe: engines on one model hold `PagedModel.lock` while they use its cache.

    Args:
        allocator: owns the page ids; one cache per allocator.
        page_size: tokens per page.
        groups: what the layers of each group see, those that see all tokens first.
    Attributes:
        on_clear: called when every name is forgotten; whoever has copies of pages forgets them, too.
    Raises:
        ArgumentError: page_size below one, no group, or a group that sees all tokens behind one that does not.
    Cost: about 400 bytes of host memory per named page; half a µs per page matched, 1 µs per page inserted, and a
        tenth of that for each further group.
    Source: automatic prefix caching as in vLLM; the tree of prefixes, SGLang, arXiv:2312.07104 §3.
    """

    def __init__(
        self, allocator: PageAllocator, page_size: int, groups: Sequence[Visibility] = (Visibility(),)
    ) -> None:
        check_size("page_size", page_size)
        ordered = [not group.sees_all for group in groups]
        if not groups or ordered != sorted(ordered):
            raise ArgumentError(
                f"groups must be what the layers of each page table see, all tokens first; got {groups!r:.200}. "
                "Fix: sort them by `not group.sees_all`"
            )
        self.allocator = allocator
        self.page_size = page_size
        self.groups = tuple(groups)
        # A chain ends with its first group's first lost page, if that group sees all tokens: the others are checked
        # afterwards, as far as the next token sees. Without such a group a chain goes on over lost pages.
        self._sees_all = groups[0].sees_all
        self._checked = list(enumerate(groups))[self._sees_all :]
        # Links whose page was dropped stay until the page is named again: at most one per page.
        self._links: dict[tuple[Prefix, bytes], Prefix] = {}
        self._named: dict[int, Prefix] = {}  # by page
        self.on_clear: Callable[[], None] | None = None
        # By salt, and only while something is named after it: a salt may be used once and never again.
        self._empty: weakref.WeakValueDictionary[str | None, Prefix] = weakref.WeakValueDictionary()

    @property
    def num_named(self) -> int:
        """Pages that have a name, owned or cached.

        Cost: O(pages named); for tests and reports.
        """
        return sum(self.name_of(page) is not None for page in self._named)

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
        Cost: O(pages found), half a µs each, and O(pages in sight) in each group with a window.
        """
        tokens = _as_array(tokens)
        prefix = self.empty(salt) if near is None else near
        while not self.is_known(prefix):
            prefix = self.empty(salt) if prefix.parent is None else prefix.parent
        size, find, generation = self.page_size, self._links.get, self.allocator.generation
        stops_at_lost = self._sees_all
        for start in range(prefix.num_pages * size, len(tokens) - size + 1, size):
            longer = find((prefix, tokens[start : start + size].tobytes()))
            if longer is None or (stops_at_lost and longer._generation != generation(longer.page)):
                break
            prefix = longer
        while self._checked and prefix.parent is not None:
            lacking = self.lacking(prefix, prefix.num_pages * size)
            if lacking is None or lacking.parent is None:
                break
            prefix = lacking.parent
        return prefix

    def lacking(self, prefix: Prefix, position: int) -> Prefix | None:
        """The last part of a match that ends with a page which some group has lost and a token at `position` sees.

        None where each group has all that the token sees. Reads only.
        """
        if not self._checked:
            return None
        firsts = [(group, sight.first_key(position) // self.page_size) for group, sight in self._checked]
        end = min(first for _, first in firsts)
        while prefix.num_pages > end and prefix.parent is not None:
            for group, first in firsts:
                if prefix.num_pages > first and not self.holds(prefix, group):
                    return prefix
            prefix = prefix.parent
        return None

    def pages(self, prefix: Prefix, position: int | None = None) -> list[int]:
        """Pages of a match that a sequence of `position` tokens begins with, group by group; for `PageTable.add`.

        Args:
            position: where its next token stands; None: behind the prefix.
        """
        if position is None:
            position = prefix.num_pages * self.page_size
        pages: list[int] = []
        for group, sight in enumerate(self.groups):
            pages += prefix.pages(group, sight.first_key(position) // self.page_size)
        return pages

    def insert(self, prefix: Prefix, tokens: Sequence[int], pages: Sequence[int]) -> Prefix | None:
        """Name full pages, whose tokens come after a prefix. Their keys and values must have been written.

        Changes no owner and no other page's name. A page whose tokens have a page of its group after this prefix
        already stays without a name.

        Args:
            prefix: what comes before, from `match` or `insert`; the caller owns its pages.
            tokens: the tokens of the pages end to end, page_size for each.
            pages: owned pages, which nobody writes from now on: those of the first group, then those of the second, ….
        Returns:
            The prefix longer by these pages. Where the tokens of one have a page already it holds that page instead:
            take it too (`PageTable.replace`), so that who owns a page owns all before it. None where the prefix was
            dropped or cleared meanwhile: nothing after it can be named.
        Raises:
            ArgumentError: a page partly filled, without owner, or named with other tokens; nothing was changed.
        Cost: about 1 µs per page, and 2 µs per call.
        """
        data, width = _as_array(tokens).tobytes(), 8 * self.page_size
        count, num_groups = len(data) // width, len(self.groups)
        if len(data) % width or len(pages) != count * num_groups:
            raise ArgumentError(
                f"tokens must fill {len(pages) // num_groups} pages of {self.page_size}; got {len(tokens)}. "
                "Fix: insert full pages only, one of each group"
            )
        if not self.is_known(prefix):
            return None
        known = self.known_after(prefix, data)
        lost = self._lost_pages(known, pages, count) if known else []
        # Those of each longer prefix side by side.
        fresh = list(pages[len(known) :]) if num_groups == 1 else self._side_by_side(pages, len(known), count)
        named = [page for _, _, page in lost] + fresh
        self._check_unnamed(named)
        self.allocator.keep(named)
        prefix = kept = known[-1] if known else prefix
        kept._uses += 1  # its own page may be among those that get another name
        self._name_lost(lost)
        prefix = self._lengthen(prefix, data[len(known) * width :], fresh)
        if not self._sees_all:
            self._let_go(kept)
        return prefix

    def put_back(self, lost: Sequence[tuple[Prefix, int, int]]) -> None:
        """Give prefixes pages again that they had lost, each with its group and its new page. They are found at once.

        Args:
            lost: of prefixes that `known_after` found; the pages are owned and hold the same keys and values as before.
        Raises:
            ArgumentError: a page without owner, or one that has a name; nothing was changed.
        """
        pages = [page for _, _, page in lost]
        self._check_unnamed(pages)
        self.allocator.keep(pages)
        self._name_lost(lost)

    def _name_lost(self, lost: Sequence[tuple[Prefix, int, int]]) -> None:
        for longer, group, page in lost:
            self._give_name(page, longer)
            self._set_page(longer, group, page)
        # The page that one gets may be what another one had lost, and its link with it.
        for longer, _, _ in lost:
            assert longer.parent is not None
            self._links[longer.parent, longer.tokens] = longer

    def hold(self, prefix: Prefix) -> None:
        """Keep a prefix known although its page is dropped: there is a copy of it elsewhere."""
        prefix._copies += 1
        prefix._uses += 1

    def let_go(self, prefix: Prefix) -> None:
        """There is a copy less. A prefix without a page and without a copy is forgotten."""
        prefix._copies -= 1
        if not self._sees_all:
            self._let_go(prefix)
        elif not prefix._copies and not self.is_known(prefix) and self._named.get(prefix.page) is not prefix:
            self._forget_link(prefix)

    def _forget_link(self, prefix: Prefix) -> None:
        assert prefix.parent is not None
        key = (prefix.parent, prefix.tokens)
        if self._links.get(key) is prefix:
            del self._links[key]

    def known_after(self, prefix: Prefix, data: bytes) -> list[Prefix]:
        """The prefixes after this one that begin with these tokens, also those that have lost their pages. Reads only.

        Args:
            data: tokens of full pages, int64 as bytes.
        """
        find, width, known = self._links.get, 8 * self.page_size, []
        for start in range(0, len(data), width):
            longer = find((prefix, data[start : start + width]))
            if longer is None:
                break
            known.append(longer)
            prefix = longer
        return known

    def _lost_pages(
        self, known: Sequence[Prefix], pages: Sequence[int], count: int
    ) -> list[tuple[Prefix, int, int]]:
        """What prefixes have lost: each with the group, and the page that takes the lost one's place."""
        return [
            (longer, group, pages[group * count + index])
            for index, longer in enumerate(known)
            for group in range(len(self.groups))
            if not self.holds(longer, group)
        ]

    def _side_by_side(self, pages: Sequence[int], first: int, count: int) -> list[int]:
        """The pages of each group from the first-th on, those with the same tokens side by side."""
        groups = range(len(self.groups))
        return [pages[group * count + index] for index in range(first, count) for group in groups]

    def _check_unnamed(self, pages: Sequence[int]) -> None:
        for page in pages:
            if page in self._named:
                before = self.name_of(page)
                if before is not None:
                    raise ArgumentError(
                        f"pages must not be named with other tokens; got page {page}, the end of a prefix of "
                        f"{before.num_pages} pages. Fix: insert a page once, after the prefix that it was computed with"
                    )

    def _lengthen(self, prefix: Prefix, data: bytes, pages: Sequence[int]) -> Prefix:
        """Make longer prefixes of the tokens of pages; those of all groups with the same tokens are side by side."""
        generation, width, num_groups = self.allocator.generation, 8 * self.page_size, len(self.groups)
        start = 0
        for at in range(0, len(pages), num_groups):
            page, tokens = pages[at], data[start : start + width]
            start += width
            longer = Prefix(prefix, page, tokens, generation(page))
            self._give_name(page, longer)
            for other in pages[at + 1 : at + num_groups] if num_groups > 1 else ():
                longer._others = (*longer._others, (other, generation(other)))
                self._give_name(other, longer)
            self._links[prefix, tokens] = longer
            prefix._uses += 1
            prefix._next_tokens = tokens
            prefix = longer
        return prefix

    def _set_page(self, prefix: Prefix, group: int, page: int) -> None:
        """Let a prefix end with another page of a group, that it lost."""
        generation = self.allocator.generation(page)
        if group:
            others = list(prefix._others)
            others[group - 1] = page, generation
            prefix._others = others
        else:
            prefix.page, prefix._generation = page, generation

    def _give_name(self, page: int, prefix: Prefix) -> None:
        """Let a page be found by a prefix, and no longer by what it was named before its content was dropped."""
        before = self._named.get(page)
        self._named[page] = prefix
        prefix._uses += 1
        if before is None or before.parent is None:
            return
        if not self._sees_all:
            self._let_go(before)
        elif before.page == page and before is not prefix and not before._copies:
            self._forget_link(before)

    def _let_go(self, prefix: Prefix) -> None:
        """Count a use of a prefix less, and forget it with the last: nothing after it can be found.

        For chains that go on over lost pages; others end there, and what comes after is not found.
        """
        prefix._uses -= 1
        while not prefix._uses and prefix.parent is not None:
            del self._links[prefix.parent, prefix.tokens]
            prefix._generation = _UNKNOWN
            prefix = prefix.parent
            prefix._uses -= 1

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
        named = [page for page in self._named if self.name_of(page) is not None]
        for prefix in (*self._named.values(), *self._links.values(), *self._empty.values()):
            prefix._generation = _UNKNOWN
            prefix._others = [(page, _UNKNOWN) for page, _ in prefix._others]
        self._links.clear()
        self._named.clear()
        self._empty.clear()
        self.allocator.unkeep(named)
        if self.on_clear is not None:
            self.on_clear()

    def is_known(self, prefix: Prefix) -> bool:
        """Whether the last page of a prefix still holds its tokens, in groups that see all tokens. Reads only.

        Where there is no such group: whether the prefix, or a longer one, has a page left.
        """
        page = prefix.page
        if not self._sees_all:
            return prefix._generation != _UNKNOWN
        return prefix._generation == (self.allocator.generation(page) if page >= 0 else 0)

    def was_cleared(self, prefix: Prefix) -> bool:
        """Whether `clear` has forgotten a prefix; its owners go on without names. Reads only."""
        return prefix._generation == _UNKNOWN

    def name_of(self, page: int) -> Prefix | None:
        """The prefix that ends with a page; None for a page without known content. Reads only."""
        prefix = self._named.get(page)
        if prefix is None:
            return None
        generation = self.allocator.generation(page)
        if prefix.page == page:
            return prefix if prefix._generation == generation else None
        return prefix if (page, generation) in prefix._others else None

    def explain(self, prefix: Prefix, tokens: Sequence[int]) -> str:
        """Why `match` of these tokens returned this prefix and no longer one, as the end of a sentence. Reads only.

        A token that sees the next page sees no page before those that this prefix was found with: only the next page
        can have been lost.

        Cost: O(page_size).
        """
        tokens = _as_array(tokens)
        size = self.page_size
        start = prefix.num_pages * size
        page = tokens[start : start + size]
        if len(page) < size:
            return f"the rest, {len(page)} tokens, fills no page of {size}, and only full pages are found"
        span = f"tokens {start} to {start + size - 1}"
        longer = self._links.get((prefix, page.tobytes()))
        if longer is not None:
            dropped = f"the page of {span} was dropped"
            lacking = [sight for group, sight in enumerate(self.groups) if not self.holds(longer, group)]
            return (
                f"{dropped} in layers that see {lacking[0]}" if lacking and len(self.groups) > 1 else dropped
            )
        other = self._links.get((prefix, prefix._next_tokens))
        if other is not None and self.is_known(other):
            cached = array("q", prefix._next_tokens)
            at = next(i for i in range(size) if page[i] != cached[i])
            return f"token {start + at} is {page[at]}, where the page cached last has {cached[at]}"
        return f"no page is cached for {span}: never computed, or dropped since"

    def holds(self, prefix: Prefix, group: int) -> bool:
        """Whether the last page of a prefix still holds its tokens, in one group. Reads only."""
        page, generation = prefix._others[group - 1] if group else (prefix.page, prefix._generation)
        return generation == self.allocator.generation(page)

    def empty(self, salt: str | None = None) -> Prefix:
        """The prefix without pages, with which all others under a salt begin."""
        prefix = self._empty.get(salt)
        if prefix is None:
            prefix = self._empty[salt] = Prefix(None, -1, b"", 0)
        return prefix

    def __repr__(self) -> str:
        return f"PrefixCache({self.num_named} pages of {self.page_size} tokens named, {self.allocator!r})"


def _as_array(tokens: Sequence[int]) -> array[int]:
    return tokens if isinstance(tokens, array) and tokens.typecode == "q" else array("q", tokens)
