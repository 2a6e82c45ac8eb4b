"""A long random walk of allocator, tables and prefix cache over a pool that is always full, beside a plain model.

The state machine looks at everything after every operation; this looks at the sequence that was touched, and at
everything now and then, so that it gets far enough for pages to be dropped and named many times.
"""

import random

import pytest

from quire.pages import PageAllocator, PageTable, PrefixCache

TOKENS, WEIGHTS = (0, 1), (12, 1)  # so that beginnings often agree, and not for ever
SALTS = (None, "a")


class Walk:
    """What slots hold is a hash of their token's history: the same for the same tokens from the beginning."""

    def __init__(self, seed: int, num_pages: int, size: int) -> None:
        self.random = random.Random(seed)
        self.size = size
        self.allocator = PageAllocator(num_pages, on_drop=self.drop)
        self.cache = PrefixCache(self.allocator, size)
        self.tables = [PageTable(self.allocator, size), PageTable(self.allocator, size)]
        self.pool = [[-1] * size for _ in range(num_pages)]
        self.page_of: dict[tuple[str | None, int], int] = {}  # salt, history at the end of the page
        self.name_of: dict[int, tuple[str | None, int]] = {}
        self.live: dict[int, dict] = {}
        self.drops = self.found = 0

    def drop(self, pages) -> None:
        for page in pages:
            self.pool[page] = [-1] * self.size
            if page in self.name_of:
                del self.page_of[self.name_of.pop(page)]
                self.drops += 1

    def history(self, tokens) -> list[int]:
        ids, last = [], 0
        for token in tokens:
            last = hash((last, token))
            ids.append(last)
        return ids

    def begin(self, number: int) -> None:
        tokens, salt = (
            self.random.choices(TOKENS, WEIGHTS, k=self.random.randrange(24)),
            self.random.choice(SALTS),
        )
        pages = []
        for history in self.history(tokens)[self.size - 1 :: self.size]:
            if (salt, history) not in self.page_of:
                break
            pages.append(self.page_of[salt, history])
        prefix = self.cache.match(tokens, salt)
        assert prefix.pages() == pages
        self.found += len(pages)
        table = self.random.choice(self.tables)
        table.add(number, pages)
        kept = len(pages) * self.size
        self.live[number] = {"tokens": tokens[:kept], "salt": salt, "prefix": prefix, "table": table}
        if pages and kept == len(tokens):
            self.trim(number, kept - 1)
        self.write(number, tokens[len(self.live[number]["tokens"]) :])

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
        for slot, history in zip(slots.tolist(), written, strict=True):
            assert slot // self.size not in self.name_of, "a named page is written"
            self.pool[slot // self.size][slot % self.size] = history
        self.name(number)

    def name(self, number: int) -> None:
        sequence = self.live[number]
        prefix, tokens = sequence["prefix"], sequence["tokens"]
        if prefix is None:
            return
        first, end = prefix.num_pages, len(tokens) // self.size
        own = sequence["table"].pages(number, first)[: end - first]
        longer = self.cache.insert(prefix, tokens[first * self.size : end * self.size], own)
        sequence["prefix"] = longer
        if longer is None:
            return
        named, histories = longer.pages(), self.history(tokens)
        for index in range(first, end):
            name = (sequence["salt"], histories[(index + 1) * self.size - 1])
            self.page_of.setdefault(name, own[index - first])
            self.name_of[self.page_of[name]] = name
            assert named[index] == self.page_of[name]
            if named[index] != own[index - first]:
                sequence["table"].replace(number, index, named[index])

    def trim(self, number: int, length: int) -> None:
        sequence = self.live[number]
        sequence["table"].trim(number, length)
        sequence["tokens"] = sequence["tokens"][:length]
        while sequence["prefix"] is not None and sequence["prefix"].num_pages > length // self.size:
            sequence["prefix"] = sequence["prefix"].parent

    def end(self, number: int) -> int:
        self.live.pop(number)["table"].free(number)
        return number

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
            self.cache.clear()
            self.page_of.clear()
            self.name_of.clear()
        if touched in self.live:
            self.check_sequence(touched)

    def check_sequence(self, number: int) -> None:
        sequence = self.live[number]
        held = [history for page in sequence["table"].pages(number) for history in self.pool[page]]
        assert held[: len(sequence["tokens"])] == self.history(sequence["tokens"])

    def check_all(self) -> None:
        owners = [0] * self.allocator.num_pages
        for number, sequence in self.live.items():
            self.check_sequence(number)
            for page in sequence["table"].pages(number):
                owners[page] += 1
        pages = range(self.allocator.num_pages)
        assert [self.allocator.refcount(page) for page in pages] == owners
        assert {page for page in pages if self.cache.name_of(page)} == set(self.name_of)
        assert self.allocator.num_cached == sum(not owners[page] for page in self.name_of)
        assert self.allocator.num_available == owners.count(0)
        for page in self.name_of:
            parent = self.cache.name_of(page).parent
            assert parent.parent is None or self.cache.name_of(parent.page) is parent, (
                "dropped before its leaf"
            )


@pytest.mark.parametrize(
    ("operations", "size"),
    [(8_000, 1), (8_000, 4), *(pytest.param(500_000, size, marks=pytest.mark.exhaustive) for size in (2, 3))],
)
def test_a_long_walk_over_a_full_pool_agrees_with_the_plain_model(operations, size):
    walk = Walk(seed=size, num_pages=80 // size, size=size)
    for number in range(operations):
        walk.step(number)
        if number % 200 == 0:
            walk.check_all()
    walk.check_all()
    assert walk.drops > operations / 10, "pages were meant to be dropped all the time"
    assert walk.found > operations / 20, "pages were meant to be found all the time"
