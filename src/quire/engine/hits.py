"""What of a request is in pages already, and names for the pages that its sequences fill."""

from __future__ import annotations

from dataclasses import dataclass

from quire.engine.request import Request
from quire.engine.sequence import Sequence
from quire.pages import PageTable, Prefix, PrefixCache, Swap


@dataclass(frozen=True)
class Start:
    """Where a sequence begins to compute.

    prefix: what comes before the pages that it fills; None: its pages get no names.
    pages: full pages with its first tokens, which it shares, as `PrefixCache.pages` gives them.
    num_computed: how many tokens it need not compute.
    next_page: the tokens that come next, a page of them or fewer; b"" where they are found too.
    copies: whether it writes its last token into a copy of the last of these pages, in each group.
    """

    sequence: Sequence
    prefix: Prefix | None = None
    pages: tuple[int, ...] = ()
    num_computed: int = 0
    next_page: bytes = b""
    copies: bool = False


class PrefixHits:
    """Finds pages for the sequences of an engine in a prefix cache, and names what they compute.

    **A hit** shares full pages, which nobody writes. The last known token of a sequence is always computed, for its
    logits: if its page is found too, it is computed into a copy of that page.

    **Names** are given after a step, so a step that breaks off leaves none for what it did not write. A request whose
    next page is being computed in this step by another one waits for the next step, when it will find that page.

    Args:
        table: the pages of the sequences.
        cache: shared by all engines on one pool; None: nothing is found or named.
        swap: copies of the cache's pages in host memory; None: there are none.
    """

    def __init__(self, table: PageTable, cache: PrefixCache | None, swap: Swap | None = None) -> None:
        self.table = table
        self.cache = cache
        self.swap = None if cache is None else swap
        self._admitted_tokens = 0
        self._cached_tokens = 0
        self._returned_tokens = 0
        self._coming: set[tuple[Prefix, bytes]] = set()  # the first page that each chunk of this step fills

    def new_step(self) -> None:
        """Forget which pages the last step computed."""
        self._coming.clear()

    def find(self, request: Request, num_pages: int, step_tokens: int) -> list[Start] | None:
        """Where the sequences of a waiting request would begin; None while num_pages available pages are too few.

        A prompt whose early pages fall out of sight needs the pages in sight, and those of the tokens of a step.

        Of several sequences, one alone is the leader: it begins with the prompt, and the others as forks of it. Where
        all of them have generated tokens, and each finds the full pages of the prompt, each begins by itself.

        Changes no page and no name. Use the result before pages are allocated.

        Args:
            num_pages: how many may be taken.
            step_tokens: how many of its tokens are to be computed at once.
        Cost: for a request that does not fit, O(sequences) and what has changed since it was last looked for; else
            O(pages).
        """
        live = request.live()
        # The one with the fewest tokens: what has none yet needs the logits of the prompt's last token.
        first = min(live, key=lambda sequence: len(sequence.tokens))
        if self.cache is not None and request.lacks_prompt_logprobs:
            starts = [Start(first, self.cache.match((), first.params.cache_salt))]
            return starts if self._needed(starts, live, step_tokens) <= num_pages else None
        if self._least_needed(first, num_pages, step_tokens) > num_pages:
            return None
        starts = [self._start(first, copies=True)]
        if starts[0].copies and self._needed(starts, live, step_tokens) > num_pages:
            starts = [self._start(first, copies=False)]
        if len(live) > 1 and first.num_generated and self._has_prompt(starts[0]):
            apart = [self._start(sequence, copies=False) for sequence in live]
            if all(map(self._has_prompt, apart)) and self._needed(apart, live, step_tokens) <= num_pages:
                return apart
            # A page of the prompt that is out of sight of one sequence's tokens may be dropped, and then the next
            # sequence does not find what comes before its own tokens.
            starts = [self._start_in_prompt(first)]
        return starts if self._needed(starts, live, step_tokens) <= num_pages else None

    def bring_back(self, request: Request) -> int:
        """Copy pages back from host memory that the sequences of a waiting request begin with, where that pays.

        Takes pages, so what was found before may be gone: look for it again. The request needs no more pages than
        before, as it shares those that it would else compute.

        Returns:
            How many more tokens are found now.
        """
        if self.swap is None or request.lacks_prompt_logprobs:
            return 0
        returned = sum(
            self.swap.bring_back(sequence.tokens, sequence.params.cache_salt) for sequence in request.live()
        )
        self._returned_tokens += returned
        return returned

    def is_coming(self, starts: list[Start]) -> bool:
        """Whether another request computes, in this step, the page that one of these would compute first."""
        return any(
            start.prefix is not None and (start.prefix, start.next_page) in self._coming for start in starts
        )

    def begin(self, request: Request, starts: list[Start]) -> None:
        """Add sequences to the table, with the pages that were found for them."""
        live = request.live()
        request.leader = starts[0].sequence if len(starts) < len(live) else None
        if request.leader is not None:  # the others' own tokens; those of the prompt count once
            self._admitted_tokens += sum(each.num_generated for each in live if each is not request.leader)
        for start in starts:
            sequence = start.sequence
            self.table.add(sequence.seq_id, start.pages, start.num_computed)
            sequence.num_computed = start.num_computed
            sequence.prefix = start.prefix
            self._admitted_tokens += len(sequence.tokens)
            self._cached_tokens += start.num_computed
        if len(starts[0].sequence.tokens) == starts[0].sequence.num_prompt_tokens:
            request.num_cached_tokens = starts[0].num_computed
            request.hit = self._explain(request, starts[0])

    def take_counts(self) -> tuple[int, int, int]:
        """Known tokens of the sequences that began since the last call, how many of them were found in pages, and how

        many because their pages came back from host memory.
        """
        counts = self._admitted_tokens, self._cached_tokens, self._returned_tokens
        self._admitted_tokens = self._cached_tokens = self._returned_tokens = 0
        return counts

    def announce(self, sequence: Sequence, num_tokens: int) -> None:
        """Take notice of the next tokens that a step computes."""
        prefix, size = sequence.prefix, self.table.page_size
        if prefix is not None and sequence.num_computed + num_tokens >= (prefix.num_pages + 1) * size:
            start = prefix.num_pages * size
            self._coming.add((prefix, sequence.tokens[start : start + size].tobytes()))

    def name_pages(self, sequence: Sequence) -> None:
        """Name the pages that a sequence has filled; they are written.

        A page whose tokens have a page already is exchanged for that one.
        """
        prefix, size = sequence.prefix, self.table.page_size
        if self.cache is None or prefix is None:
            return
        first, end = prefix.num_pages, sequence.num_computed // size
        if first >= end:
            return
        count, groups = end - first, range(len(self.table.groups))
        pages: list[int] = []
        for group in groups:
            pages += self.table.pages(sequence.seq_id, first, group)[:count]
        sequence.prefix = named = self.cache.insert(prefix, sequence.tokens[first * size : end * size], pages)
        for index in range(count - 1, -1, -1):
            if named is None:
                break
            for group in groups:
                page = named.page_of(group)
                if page != pages[group * count + index]:
                    self.table.replace(sequence.seq_id, first + index, page, group)
            named = named.parent

    def _start(self, sequence: Sequence, *, copies: bool) -> Start:
        if self.cache is None:
            return Start(sequence)
        tokens, size, cache = sequence.tokens, self.table.page_size, self.cache
        salt = sequence.params.cache_salt
        prefix = cache.match(tokens, salt)
        found = prefix.num_pages * size
        if found == len(tokens):
            assert prefix.parent is not None  # there is at least one token
            last = found - 1  # computed again, for its logits
            if copies and size > 1 and cache.lacking(prefix, last) is None:
                return Start(sequence, prefix.parent, tuple(cache.pages(prefix, last)), last, copies=True)
            whole, prefix = prefix.parent, cache.match(tokens[:last], salt, near=prefix.parent)
            found = prefix.num_pages * size
            if prefix is whole:
                return Start(sequence, prefix, tuple(cache.pages(prefix)), found)
        return self._start_behind(sequence, prefix)

    def _start_behind(self, sequence: Sequence, prefix: Prefix) -> Start:
        assert self.cache is not None  # it has given the prefix
        size = self.table.page_size
        found = prefix.num_pages * size
        next_page = sequence.tokens[found : found + size].tobytes()
        return Start(sequence, prefix, tuple(self.cache.pages(prefix)), found, next_page)

    def _start_in_prompt(self, sequence: Sequence) -> Start:
        """Where a leader that has generated tokens begins: before the last token of the prompt."""
        if self.cache is None:
            return Start(sequence)
        known = sequence.tokens[: sequence.num_prompt_tokens - 1]
        return self._start_behind(sequence, self.cache.match(known, sequence.params.cache_salt))

    def _has_prompt(self, start: Start) -> bool:
        """Whether it begins behind the full pages of its prompt."""
        return -(-start.num_computed // self.table.page_size) >= self._shared_pages(start.sequence)

    def _needed(self, starts: list[Start], live: list[Sequence], step_tokens: int) -> int:
        """Available pages that sequences take: new ones, a copy, and cached ones that get an owner.

        Where a leader begins alone, also those that the others will have beside the full pages of the prompt.
        """
        refcount = self.table.allocator.refcount
        fresh = 0
        for start in starts:
            fresh += self._fresh_pages(len(start.sequence.tokens), start.num_computed, step_tokens)
            fresh += len(self.table.groups) * start.copies
        if len(starts) < len(live):
            leader = starts[0].sequence
            fresh += sum(self._own_pages(sequence) for sequence in live if sequence is not leader)
        return fresh + len({page for start in starts for page in start.pages if not refcount(page)})

    def _fresh_pages(self, num_tokens: int, num_computed: int, step_tokens: int) -> int:
        """Pages, of all groups, that a sequence needs at once beside those that it begins with.

        In a group that sees all tokens it needs all that its tokens fill, in another one those in sight in a step.
        """
        size, fresh = self.table.page_size, 0
        begins_with, in_all = -(-num_computed // size), -(-num_tokens // size)
        for sight in self.table.groups:
            unseen = sight.first_key(num_computed) // size
            most = min(in_all - unseen, sight.most_pages(step_tokens, size))
            fresh += max(most - (begins_with - unseen), 0)
        return fresh

    def _own_pages(self, sequence: Sequence) -> int:
        """Pages that a fork will soon have beside the full ones of the prompt; none if its first token is its last."""
        num_tokens = max(len(sequence.tokens), sequence.num_prompt_tokens + 1)
        if num_tokens >= sequence.max_length:
            return 0
        size = self.table.page_size
        own = -(-num_tokens // size) - self._shared_pages(sequence)
        return sum(min(own, sight.most_pages(1, size)) for sight in self.table.groups)

    def _shared_pages(self, sequence: Sequence) -> int:
        """Full pages of the prompt."""
        return sequence.num_prompt_tokens // self.table.page_size

    def _least_needed(self, sequence: Sequence, enough: int, step_tokens: int) -> int:
        """A lower bound of what `_needed` says of a sequence alone, as a rule that number; more than enough will do."""
        num_tokens = len(sequence.tokens)
        if self.cache is None:
            return self._fresh_pages(num_tokens, 0, step_tokens)
        prefix = self.cache.match(sequence.tokens, sequence.params.cache_salt, near=sequence.prefix)
        sequence.prefix = prefix
        needed = self._fresh_pages(num_tokens, prefix.num_pages * self.table.page_size, step_tokens)
        # Who owns a page of a group that sees all tokens owns those before it: cached ones are the last ones.
        sees_all = self.table.groups[0].sees_all
        while (
            sees_all
            and needed <= enough
            and prefix.parent is not None
            and not self.table.allocator.refcount(prefix.page)
        ):
            needed += 1
            prefix = prefix.parent
        return needed

    def _explain(self, request: Request, start: Start) -> str:
        tokens = start.sequence.tokens
        found = f"{start.num_computed} of {len(tokens)} prompt tokens were found in pages"
        if self.cache is None or start.prefix is None:
            return f"{found}: enable_prefix_caching is off"
        if request.lacks_prompt_logprobs:
            return f"{found}: prompt_logprobs asks for logits of all of them"
        if not start.next_page:
            return f"{found}: the rest is there too, but the last token is computed for its logits"
        salt = start.sequence.params.cache_salt
        under = "" if salt is None else f", under cache_salt {salt!r}"
        return f"{found}{under}: {self.cache.explain(start.prefix, tokens)}"
