"""A long random walk of allocator, tables and prefix cache over a pool that is always full, beside a plain model.

The state machine looks at everything after every operation; this looks at the sequence that was touched, and at
everything now and then, so that it gets far enough for pages to be dropped and named many times. It also walks with
tables of several groups, of which those with a window or chunks give pages back and lose them one by one.
"""

import itertools
import random

import pytest

from quire.errors import ArgumentError
from quire.pages import PageAllocator, PageTable, PrefixCache
from quire.pages.balance import find_fault, is_balanced
from quire.spec import Visibility

TOKENS, WEIGHTS = (0, 1), (12, 1)  # so that beginnings often agree, and not for ever
SALTS = (None, "a")
LONGEST = 24  # tokens that a sequence begins with

ALL = Visibility()
GROUPS = {
    "one": (ALL,),
    "a window": (Visibility(4),),
    "all and a window": (ALL, Visibility(5)),
    "two kinds that see all, a window and chunks": (ALL, ALL, Visibility(3), Visibility(chunk_size=12)),
    "two windows": (Visibility(1), Visibility(6)),
}

Name = tuple[str | None, int]  # the salt, and the history at the end of the page


class Walk:
    """What slots hold is a hash of their token's history: the same for the same tokens from the beginning."""

    def __init__(self, seed: int, num_pages: int, size: int, groups: tuple[Visibility, ...]) -> None:
        self.random = random.Random(seed)
        self.size, self.groups = size, groups
        self.allocator = PageAllocator(num_pages, on_drop=self.drop)
        self.cache = PrefixCache(self.allocator, size, groups)
        self.tables = [PageTable(self.allocator, size, groups) for _ in range(2)]
        self.pool = [[-1] * size for _ in range(num_pages)]
        self.pages_of: dict[Name, list[int | None]] = {}  # of each group; None where it was dropped
        self.name_of: dict[int, tuple[Name, int]] = {}  # by page, with its group
        # Named pages of a group that the cache may have forgotten with the page of the first group before them.
        self.forgotten: set[int] = set()
        self.live: dict[int, dict] = {}
        self.drops = self.found = self.releases = self.losses = 0

    # The plain model

    def drop(self, pages) -> None:
        for page in pages:
            self.pool[page] = [-1] * self.size
            self.forgotten.discard(page)
            if page in self.name_of:
                name, group = self.name_of.pop(page)
                self.pages_of[name][group] = None
                if self.groups[0].sees_all and not group:
                    self.forgotten.update(held for held in self.pages_of[name] if held is not None)
                if not any(held is not None for held in self.pages_of[name]):
                    del self.pages_of[name]
                self.drops += 1

    def history(self, tokens) -> list[int]:
        ids, last = [], 0
        for token in tokens:
            last = hash((last, token))
            ids.append(last)
        return ids

    def names(self, tokens, salt) -> list[Name]:
        return [(salt, history) for history in self.history(tokens)[self.size - 1 :: self.size]]

    def held(self, names, position: int) -> list[int] | None:
        """The pages of a prefix, group by group, that a token at a position sees; None if one was dropped."""
        pages = []
        for group, sight in enumerate(self.groups):
            seen = names[sight.first_key(position) // self.size :]
            pages += [self.pages_of.get(name, {group: None})[group] for name in seen]
        return None if None in pages else pages

    def expected(self, tokens, salt) -> tuple[int, list[int]]:
        """How many pages the longest prefix has that can be gone on with, and those in sight."""
        names = self.names(tokens, salt)
        for count in range(len(names), -1, -1):
            pages = self.held(names[:count], count * self.size)
            if pages is not None:
                return count, pages
        raise AssertionError

    # What an engine does

    def begin(self, number: int) -> None:
        tokens = self.random.choices(TOKENS, WEIGHTS, k=self.random.randrange(LONGEST))
        salt = self.random.choice(SALTS)
        count, pages = self.expected(tokens, salt)
        prefix = self.cache.match(tokens, salt)
        assert prefix.num_pages == count
        assert self.cache.pages(prefix) == pages
        self.found += count
        kept = count * self.size
        if count and kept == len(
            tokens
        ):  # the last token is computed, into a copy of its page if all it sees is here
            pages = self.held(self.names(tokens, salt), kept - 1)
            lacking = self.cache.lacking(prefix, kept - 1)
            assert (lacking is None) == (pages is not None)
            if lacking is None and self.size > 1:
                assert self.cache.pages(prefix, kept - 1) == pages
                prefix, kept = prefix.parent, kept - 1
            else:
                count, pages = self.expected(tokens[:-1], salt)
                prefix, kept = self.cache.match(tokens[:-1], salt), count * self.size
                assert prefix.num_pages == count
        table = self.random.choice(self.tables)
        table.add(number, pages, kept)
        self.live[number] = {"tokens": tokens[:kept], "salt": salt, "prefix": prefix, "table": table}
        self.write(number, tokens[kept:])

    def write(self, number: int, tokens) -> None:
        sequence = self.live[number]
        table = sequence["table"]
        while table.pages_needed(number, len(tokens)) > self.allocator.num_available:
            if self.end(self.random.choice(list(self.live))) == number:
                return
        slots, copies = table.append(number, len(tokens))
        for source, destination in copies:
            self.pool[destination] = list(self.pool[source])
        sequence["tokens"] = sequence["tokens"] + list(tokens)
        written = self.history(sequence["tokens"])[len(sequence["tokens"]) - len(tokens) :]
        for of_group in slots.reshape(len(self.groups), -1).tolist():
            for slot, history in zip(of_group, written, strict=True):
                assert slot // self.size not in self.name_of, "a named page is written"
                self.pool[slot // self.size][slot % self.size] = history
        self.name(number)
        if self.random.random() < 0.8:
            table.release_unseen(number)
            self.releases += sum(table.num_released(number, group) for group in range(len(self.groups)))

    def name(self, number: int) -> None:
        sequence = self.live[number]
        prefix, tokens, table = sequence["prefix"], sequence["tokens"], sequence["table"]
        if prefix is None:
            return
        first, end = prefix.num_pages, len(tokens) // self.size
        own = [table.pages(number, first, group)[: end - first] for group in range(len(self.groups))]
        names = self.names(tokens, sequence["salt"])[:end]
        known = not sequence.get("cleared") and (not first or self.holds(number, first - 1, names[first - 1]))
        pages = list(itertools.chain.from_iterable(own))
        longer = self.cache.insert(prefix, tokens[first * self.size : end * self.size], pages)
        sequence["prefix"] = longer
        assert known <= (longer is not None), "a page that is held was forgotten"
        self.losses += longer is None
        last = longer
        for index in range(end - 1, first - 1, -1):
            if last is None:
                break
            for group in range(len(self.groups)):
                self.take(number, index, group, names[index], own[group][index - first], last.page_of(group))
            last = last.parent

    def holds(self, number: int, index: int, name: Name) -> bool:
        """Whether a sequence holds a page of this name, so that what comes after it can be named."""
        table = self.live[number]["table"]
        groups = range(1 if self.groups[0].sees_all else len(self.groups))
        return any(
            index >= table.num_released(number, group)
            and self.name_of.get(table.page_at(number, index, group)) == (name, group)
            for group in groups
        )

    def take(self, number: int, index: int, group: int, name: Name, own: int, named: int) -> None:
        """A page has a name now: the sequence's own, or the one that had it before."""
        before = self.pages_of.setdefault(name, [None] * len(self.groups))
        if before[group] is not None and before[group] != named:
            assert before[group] in self.forgotten, "two pages with one name"
            del self.name_of[before[group]]
            before[group] = None
        assert named == (own if before[group] is None else before[group])
        before[group] = named
        self.forgotten.discard(named)
        self.name_of[named] = (name, group)
        if named != own:
            self.live[number]["table"].replace(number, index, named, group)

    def trim(self, number: int, length: int) -> None:
        sequence = self.live[number]
        table = sequence["table"]
        firsts = [table.num_released(number, group) for group in range(len(self.groups))]
        allowed = all(
            not first or sight.first_key(length) // self.size >= first
            for sight, first in zip(self.groups, firsts, strict=True)
        )
        if not allowed:
            with pytest.raises(ArgumentError, match="must leave every page in sight"):
                table.trim(number, length)
            return
        table.trim(number, length)
        sequence["tokens"] = sequence["tokens"][:length]
        while sequence["prefix"] is not None and sequence["prefix"].num_pages > length // self.size:
            sequence["prefix"] = sequence["prefix"].parent

    def end(self, number: int) -> int:
        self.live.pop(number)["table"].free(number)
        return number

    def clear(self) -> None:
        self.cache.clear()
        self.pages_of.clear()
        self.name_of.clear()
        self.forgotten.clear()
        for sequence in self.live.values():
            sequence["cleared"] = True

    def step(self, number: int) -> None:
        action = self.random.random()
        touched = self.random.choice(list(self.live)) if self.live else None
        if touched is None or action < 0.3:
            touched = number
            self.begin(number)
        elif action < 0.7:
            self.write(touched, self.random.choices(TOKENS, WEIGHTS, k=self.random.randrange(1, 6)))
        elif action < 0.75:
            child = self.live[touched]
            child["table"].fork(touched, number)
            self.live[number] = dict(child)
        elif action < 0.85:
            self.trim(touched, self.random.randint(0, len(self.live[touched]["tokens"])))
        elif action < 0.97:
            self.end(touched)
        elif action < 0.98:  # a step that breaks off: nothing was written or named
            if self.live[touched]["table"].pages_needed(touched, 5) <= self.allocator.num_available:
                self.live[touched]["table"].append(touched, 5)
            self.end(touched)
        elif action < 0.999:
            self.cache.evict(self.random.randrange(3))
        else:
            self.clear()
        if touched in self.live:
            self.check_sequence(touched)

    # What must hold

    def check_sequence(self, number: int) -> None:
        sequence = self.live[number]
        written = self.history(sequence["tokens"])
        for group in range(len(self.groups)):
            first = sequence["table"].num_released(number, group) * self.size
            pages = sequence["table"].pages(number, group=group)
            held = [history for page in pages for history in self.pool[page]]
            assert held[: len(written) - first] == written[first:]

    def check_all(self) -> None:
        owners = [0] * self.allocator.num_pages
        for number, sequence in self.live.items():
            self.check_sequence(number)
            for page in sequence["table"].all_pages(number):
                owners[page] += 1
        pages = range(self.allocator.num_pages)
        assert [self.allocator.refcount(page) for page in pages] == owners
        assert is_balanced(self.allocator, recounts=True)
        assert find_fault(self.allocator) is None
        named = {page for page in pages if self.cache.name_of(page)}
        assert set(self.name_of) <= named <= set(self.name_of) | self.forgotten
        assert self.allocator.num_cached == sum(not owners[page] for page in named)
        assert self.allocator.num_available == owners.count(0)
        for page, (_, group) in self.name_of.items():
            parent = self.cache.name_of(page).parent
            if self.groups[0].sees_all and not group:
                assert parent.parent is None or self.cache.name_of(parent.page) is parent, (
                    "dropped before its leaf"
                )


LONG = [
    *(("one", 500_000, size) for size in (2, 3)),
    *((name, 250_000, size) for name in list(GROUPS)[1:] for size in (2, 3)),
]


@pytest.mark.parametrize(
    ("groups", "operations", "size"),
    [
        ("one", 8_000, 1),
        ("one", 8_000, 4),
        *((name, 4_000, 3) for name in list(GROUPS)[1:]),
        *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in LONG),
    ],
)
def test_a_long_walk_over_a_full_pool_agrees_with_the_plain_model(groups, operations, size):
    kinds = GROUPS[groups]
    walk = Walk(seed=size, num_pages=80 * len(kinds) // size, size=size, groups=kinds)
    for number in range(operations):
        walk.step(number)
        if number % 200 == 0:
            walk.check_all()
    walk.check_all()
    assert walk.drops > operations / 10, "pages were meant to be dropped all the time"
    assert walk.found > operations / 20, "pages were meant to be found all the time"
    assert (walk.releases > operations / 10) == (groups != "one"), "pages were meant to fall out of sight"
