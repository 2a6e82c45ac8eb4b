"""Allocator, tables and prefix cache under random use, against texts and pages that are plain lists.

What a slot holds is the whole history of its token, as keys and values depend on it: a page found for the wrong text,
written by a second owner, or taken while it has one, changes what a sequence reads back.
"""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.pages import PageAllocator, PageTable, PrefixCache

POISON = "poison"
texts = st.lists(st.integers(0, 1), max_size=8)  # of two tokens, so that beginnings often agree
salts = st.sampled_from([None, "a"])


class PrefixesUnderUse(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 3), num_tables=st.integers(1, 2))
    def start(self, num_pages, page_size, num_tables):
        self.size = page_size
        self.allocator = PageAllocator(num_pages, on_drop=self.dropped)
        self.cache = PrefixCache(self.allocator, page_size)
        self.tables = [PageTable(self.allocator, page_size) for _ in range(num_tables)]
        self.pool = [[POISON] * page_size for _ in range(num_pages)]
        self.texts = {}  # seq_id → its tokens
        self.salt, self.table, self.prefix = {}, {}, {}  # by seq_id
        self.names = {}  # page → (salt, all tokens to its end)
        self.released = {}  # cached page → when it lost its last owner
        self.just_dropped = []
        self.clock = itertools.count()

    # The plain model

    def dropped(self, pages):
        for page in pages:
            assert self.allocator.refcount(page) == 0, "dropped while it had an owner"
            self.pool[page] = [POISON] * self.size
            self.names.pop(page, None)
            self.released.pop(page, None)
        self.just_dropped += pages

    def owners(self, page):
        return sum(page in self.table[s].pages(s) for s in self.texts if s in self.table[s])

    def named(self, salt, tokens):
        """The pages of the longest beginning of which every page has a name."""
        by_name = {name: page for page, name in self.names.items()}
        assert len(by_name) == len(self.names), "two pages with the same name"
        found = []
        for end in range(self.size, len(tokens) + 1, self.size):
            page = by_name.get((salt, tuple(tokens[:end])))
            if page is None:
                break
            found.append(page)
        return found

    def see_releases(self):
        """Take down which pages have lost their last owner in this call."""
        now = next(self.clock)
        for page in self.names:
            if self.owners(page):
                self.released.pop(page, None)
            else:
                self.released.setdefault(page, now)

    # What an engine does

    def write(self, seq_id, tokens):
        """Append tokens, write them, and name the pages that are full now; False when there are too few pages."""
        table = self.table[seq_id]
        if table.pages_needed(seq_id, len(tokens)) > self.allocator.num_available:
            return False
        slots, copies = table.append(seq_id, len(tokens))
        for source, destination in copies:
            self.pool[destination] = list(self.pool[source])
        text = self.texts[seq_id]
        for slot, token in zip(slots.tolist(), tokens, strict=True):
            page = slot // self.size
            assert page not in self.names, "a named page is written"
            text.append(token)
            self.pool[page][slot % self.size] = tuple(text)
        self.name_full_pages(seq_id)
        return True

    def name_full_pages(self, seq_id):
        prefix, text, table = self.prefix[seq_id], self.texts[seq_id], self.table[seq_id]
        if prefix is None:
            return
        first, end = prefix.num_pages, len(text) // self.size
        pages = table.pages(seq_id)[first:end]
        longer = self.cache.insert(prefix, text[first * self.size : end * self.size], pages)
        self.prefix[seq_id] = longer
        if longer is None:
            return
        for index in range(first, end):
            name = (self.salt[seq_id], tuple(text[: (index + 1) * self.size]))
            taken = longer.pages()[index]
            if name not in self.names.values():
                assert taken == pages[index - first]
                self.names[taken] = name
            assert self.names[taken] == name
            if taken != pages[index - first]:
                table.replace(seq_id, index, taken)

    @rule(tokens=texts, salt=salts, data=st.data())
    def begin(self, tokens, salt, data):
        expected = self.named(salt, tokens)
        near = data.draw(
            st.sampled_from([None, *(s for s in self.texts if self.texts[s][: len(tokens)] == tokens)])
        )
        if near is not None and self.prefix[near] is not None and self.salt[near] == salt:
            start = self.prefix[near]
            while start.num_pages > len(tokens) // self.size:
                start = start.parent
            assert self.cache.match(tokens, salt, near=start).pages() == expected
        prefix = self.cache.match(tokens, salt)
        assert prefix.pages() == expected
        table = data.draw(st.sampled_from(self.tables))
        seq_id = next(self.clock)
        table.add(seq_id, expected)
        self.texts[seq_id] = tokens[: len(expected) * self.size]
        self.salt[seq_id], self.table[seq_id], self.prefix[seq_id] = salt, table, prefix
        self.see_releases()
        if expected and len(tokens) == len(expected) * self.size:
            self.trim(seq_id, len(tokens) - 1)  # the last token is computed for its logits
        rest = tokens[len(self.texts[seq_id]) :]
        if not self.write(seq_id, rest):
            self.end(seq_id)
        self.see_releases()

    def trim(self, seq_id, length):
        self.table[seq_id].trim(seq_id, length)
        del self.texts[seq_id][length:]
        while self.prefix[seq_id] is not None and self.prefix[seq_id].num_pages > length // self.size:
            self.prefix[seq_id] = self.prefix[seq_id].parent

    def end(self, seq_id):
        self.table[seq_id].free(seq_id)
        for by_id in (self.texts, self.salt, self.table, self.prefix):
            del by_id[seq_id]
        self.see_releases()

    def draw_sequence(self, data):
        return data.draw(st.sampled_from(sorted(self.texts)))

    @precondition(lambda self: self.texts)
    @rule(tokens=texts, data=st.data())
    def go_on(self, tokens, data):
        self.write(self.draw_sequence(data), tokens)
        self.see_releases()

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data):
        parent, child = self.draw_sequence(data), next(self.clock)
        self.table[parent].fork(parent, child)
        self.texts[child] = list(self.texts[parent])
        for by_id in (self.salt, self.table, self.prefix):
            by_id[child] = by_id[parent]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def reject_tokens(self, data):
        seq_id = self.draw_sequence(data)
        self.trim(seq_id, data.draw(st.integers(0, len(self.texts[seq_id]))))
        self.see_releases()

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def finish(self, data):
        self.end(self.draw_sequence(data))

    @precondition(lambda self: self.texts)
    @rule(num_tokens=st.integers(1, 6), data=st.data())
    def break_off_before_anything_is_written(self, num_tokens, data):
        seq_id = self.draw_sequence(data)
        table = self.table[seq_id]
        if table.pages_needed(seq_id, num_tokens) <= self.allocator.num_available:
            table.append(seq_id, num_tokens)
            self.end(seq_id)

    @rule(num_pages=st.integers(0, 3))
    def evict(self, num_pages):
        for _ in range(num_pages):
            del self.just_dropped[:]
            leaves = [
                page
                for page in self.released
                if not any(
                    salt == self.names[page][0] and tokens[: -self.size] == self.names[page][1]
                    for salt, tokens in self.names.values()
                )
            ]
            oldest = {page for page in leaves if self.released[page] == min(map(self.released.get, leaves))}
            assert self.cache.evict(1) == bool(leaves)
            assert len(self.just_dropped) == bool(leaves)
            assert set(self.just_dropped) <= oldest

    @rule()
    def clear(self):
        self.cache.clear()
        self.names.clear()
        self.released.clear()

    # What must hold at all times

    @invariant()
    def every_sequence_reads_back_its_own_history(self):
        for seq_id, text in self.texts.items():
            pages = self.table[seq_id].pages(seq_id)
            values = [value for page in pages for value in self.pool[page]][: len(text)]
            assert values == [tuple(text[: i + 1]) for i in range(len(text))]

    @invariant()
    def a_named_page_holds_what_its_name_says(self):
        for page, (_, tokens) in self.names.items():
            assert self.pool[page] == [
                tokens[:end] for end in range(len(tokens) - self.size + 1, len(tokens) + 1)
            ]

    @invariant()
    def the_cache_knows_the_same_names_and_no_more(self):
        known = {p for p in range(self.allocator.num_pages) if self.cache.name_of(p) is not None}
        assert known == set(self.names)
        assert self.cache.num_named == len(known)

    @invariant()
    def every_named_page_can_be_found(self):
        for page, (salt, tokens) in self.names.items():
            assert self.cache.match(tokens, salt).pages()[-1] == page

    @invariant()
    def pages_are_counted(self):
        owned = [self.owners(page) for page in range(self.allocator.num_pages)]
        assert [self.allocator.refcount(page) for page in range(self.allocator.num_pages)] == owned
        assert self.allocator.num_cached == sum(not owned[page] for page in self.names)
        assert self.allocator.num_available == owned.count(0)


PrefixesUnderUse.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestPrefixesUnderUse = PrefixesUnderUse.TestCase
