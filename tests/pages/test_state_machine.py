"""Allocator and tables under random use, against sequences that are plain lists of values.

Every appended token writes a value of its own into a simulated pool, so sharing and copy-on-write
are judged by what each sequence reads back through its pages. Pages are poisoned as the allocator
reports that their content is dropped: too early, and an owner or a cached page reads poison; too
late, and a page handed out is not clean.
"""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from quire.errors import ArgumentError, OutOfPages
from quire.pages import PageAllocator, PageTable

pytestmark = pytest.mark.filterwarnings("error")  # torch warns of tensors over read-only memory

POISON = "poison"
token_counts = st.integers(0, 14)


class PagesUnderUse(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(num_pages=st.integers(1, 14), page_size=st.integers(1, 5))
    def start(self, num_pages, page_size):
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages, on_drop=self.poison)
        self.table = PageTable(self.allocator, page_size)
        self.pool = [[POISON] * page_size for _ in range(num_pages)]
        self.expected = {}  # seq_id → the values of its tokens
        self.outside = []  # pages held by an owner that is no sequence, one entry per reference
        self.kept = {}  # page → the content that is kept
        self.cached = []  # pages kept without an owner, the next to be evicted first
        self.generations = [0] * num_pages
        self.new_id = itertools.count()
        self.new_value = itertools.count()

    # The naive model's own arithmetic

    def owners(self, page):
        return sum(page in self.table.pages(s) for s in self.expected) + self.outside.count(page)

    def naive_pages_needed(self, seq_id, num_tokens):
        length = len(self.expected[seq_id])
        room = len(self.table.pages(seq_id)) * self.page_size - length
        last = self.table.pages(seq_id)[-1:]
        copied = num_tokens > 0 and room > 0 and (self.owners(*last) > 1 or last[0] in self.kept)
        grown = 0
        while room + grown * self.page_size < num_tokens:
            grown += 1
        return grown + copied

    def snapshot(self):
        refcounts = [self.allocator.refcount(page) for page in range(self.allocator.num_pages)]
        return (
            self.allocator.num_available,
            self.allocator.num_cached,
            refcounts,
            [self.allocator.generation(page) for page in range(self.allocator.num_pages)],
            {s: (self.table.length(s), self.table.pages(s)) for s in self.expected},
        )

    def poison(self, pages):
        for page in pages:
            self.pool[page] = [POISON] * self.page_size

    def is_clean(self, page):
        return self.pool[page] == [POISON] * self.page_size

    def write(self, seq_id, num_tokens):
        before = self.table.pages(seq_id)
        self.evicted(self.table.pages_needed(seq_id, num_tokens) - self.allocator.num_free)
        slot_mapping, copies, held = self.append_and_hold_sources(seq_id, num_tokens)
        assert all(self.is_clean(page) for page in self.table.pages(seq_id) if page not in before)
        self.copy(copies, held)
        self.write_values(seq_id, num_tokens, slot_mapping)

    def append_and_hold_sources(self, seq_id, num_tokens):
        slot_mapping, copies = self.table.append(seq_id, num_tokens)
        sources = [source for source, _ in copies if not self.allocator.refcount(source)]
        self.allocator.share(sources)
        self.outside += sources
        return slot_mapping, copies, sources

    def copy(self, copies, held):
        for source, destination in copies:
            self.pool[destination] = list(self.pool[source])
        for source in held:
            self.outside.remove(source)
            self.gave_up([source], self.allocator.free([source]))

    def write_values(self, seq_id, num_tokens, slot_mapping):
        assert len(slot_mapping) == num_tokens
        for slot in slot_mapping.tolist():
            value = next(self.new_value)
            self.pool[slot // self.page_size][slot % self.page_size] = value
            self.expected[seq_id].append(value)

    def gave_up(self, pages, released):
        """Owners gave up pages, in this order: those without another one are cached where kept, else free."""
        gone = [page for i, page in enumerate(pages) if page not in pages[i + 1 :] and not self.owners(page)]
        assert released == [page for page in gone if page not in self.kept]
        self.cached += [page for page in reversed(gone) if page in self.kept]
        self.dropped(released)

    def dropped(self, pages):
        for page in pages:
            self.generations[page] += 1

    def evicted(self, num_pages):
        pages = self.cached[: max(0, num_pages)]
        del self.cached[: len(pages)]
        for page in pages:
            del self.kept[page]
        self.dropped(pages)
        return pages

    # What callers do

    @rule(target=sequences, num_tokens=token_counts)
    def add(self, num_tokens):
        seq_id = next(self.new_id)
        self.table.add(seq_id)
        self.expected[seq_id] = []
        self.append(seq_id, num_tokens)
        return seq_id

    @rule(seq_id=sequences, num_tokens=token_counts)
    def append(self, seq_id, num_tokens):
        if seq_id not in self.expected:
            return
        needed = self.naive_pages_needed(seq_id, num_tokens)
        assert self.table.pages_needed(seq_id, num_tokens) == needed
        room = self.table.room(seq_id)
        assert self.table.pages_needed(seq_id, room) <= self.allocator.num_available
        assert self.table.pages_needed(seq_id, room + 1) > self.allocator.num_available
        before = self.snapshot()
        if needed > before[0]:
            with pytest.raises(OutOfPages):
                self.table.append(seq_id, num_tokens)
            assert self.snapshot() == before
        else:
            self.write(seq_id, num_tokens)
            assert before[0] - self.allocator.num_available in (
                needed,
                needed - 1,
            )  # 1 less: the copied page is cached

    @rule(seq_ids=st.lists(sequences, unique=True, max_size=5), num_tokens=token_counts)
    def append_to_all_that_fit_together(self, seq_ids, num_tokens):
        live = [s for s in seq_ids if s in self.expected]
        if sum(self.table.pages_needed(s, num_tokens) for s in live) <= self.allocator.num_available:
            copies, held, slots = [], [], {}
            for seq_id in live:
                self.evicted(self.table.pages_needed(seq_id, num_tokens) - self.allocator.num_free)
                slots[seq_id], copied, its_held = self.append_and_hold_sources(seq_id, num_tokens)
                copies += copied
                held += its_held
            self.copy(copies, held)  # of the whole step at once: no later append has taken a source
            for seq_id in live:
                self.write_values(seq_id, num_tokens, slots[seq_id])

    @rule(target=sequences, parent=sequences)
    def fork(self, parent):
        if parent not in self.expected:
            return multiple()
        child = next(self.new_id)
        self.table.fork(parent, child)
        self.expected[child] = list(self.expected[parent])
        return child

    @rule(seq_id=sequences, data=st.data())
    def trim(self, seq_id, data):
        if seq_id in self.expected:
            length = data.draw(st.integers(0, len(self.expected[seq_id])))
            given_up = self.table.pages(seq_id)[-(-length // self.page_size) :]
            released = self.table.trim(seq_id, length)
            del self.expected[seq_id][length:]
            self.gave_up(given_up, released)

    @rule(seq_id=sequences)
    def free(self, seq_id):
        if seq_id in self.expected:
            given_up = self.table.pages(seq_id)
            released = self.table.free(seq_id)
            del self.expected[seq_id]
            self.gave_up(given_up, released)

    @rule(seq_id=sequences)
    def share_with_an_outside_owner(self, seq_id):
        if seq_id in self.expected:
            pages = self.table.pages(seq_id)
            self.allocator.share(pages)
            self.outside += pages

    @rule(data=st.data())
    def outside_owner_lets_go(self, data):
        kept = data.draw(st.integers(0, len(self.outside)))
        given_up = self.outside[kept:]
        released = self.allocator.free(given_up)
        del self.outside[kept:]
        self.gave_up(given_up, released)

    @rule(seq_id=sequences)
    def keep_the_full_pages(self, seq_id):
        if seq_id in self.expected:
            full = self.table.pages(seq_id)[: len(self.expected[seq_id]) // self.page_size]
            self.allocator.keep(full)
            self.kept |= {page: list(self.pool[page]) for page in full}

    @rule(data=st.data())
    def an_outside_owner_takes_cached_pages(self, data):
        if self.cached:
            pages = data.draw(st.lists(st.sampled_from(self.cached), max_size=4))
            self.allocator.share(pages)
            self.outside += pages
            self.cached = [page for page in self.cached if page not in pages]

    @rule(num_pages=st.integers(0, 4))
    def evict(self, num_pages):
        expected = self.evicted(num_pages)
        assert self.allocator.evict(num_pages) == expected
        assert all(self.is_clean(page) for page in expected)

    @rule(pages=st.lists(st.integers(-1, 14), max_size=4))
    def free_more_than_there_are_owners(self, pages):
        before = self.snapshot()
        too_many = [p for p in range(self.allocator.num_pages) if not self.allocator.refcount(p)][:1] or [99]
        for change in (self.allocator.free, self.allocator.keep):
            with pytest.raises(ArgumentError):
                change(pages + too_many)
            assert self.snapshot() == before

    # What must hold at all times

    @invariant()
    def every_sequence_reads_back_its_own_values(self):
        for seq_id, values in self.expected.items():
            pages, length = self.table.pages(seq_id), self.table.length(seq_id)
            assert length == len(values)
            assert len(pages) * self.page_size - length in range(self.page_size)
            assert [v for page in pages for v in self.pool[page]][:length] == values

    @invariant()
    def every_page_has_exactly_its_owners_and_none_is_lost(self):
        counts = [self.allocator.refcount(page) for page in range(self.allocator.num_pages)]
        assert counts == [self.owners(page) for page in range(self.allocator.num_pages)]
        assert self.allocator.num_available == counts.count(0) == len(counts) - self.allocator.num_owned
        assert self.allocator.num_cached == len(self.cached) == counts.count(0) - self.allocator.num_free
        held = self.table.page_owners()
        assert held == [[s for s in self.expected if p in self.table.pages(s)] for p in range(len(counts))]

    @invariant()
    def occupancy_counts_each_page_and_each_token_once(self):
        slots = {
            (page, offset)
            for seq_id in self.expected
            for i, page in enumerate(self.table.pages(seq_id))
            for offset in range(min(self.page_size, self.table.length(seq_id) - i * self.page_size))
        }
        assert self.table.occupancy() == (len({page for page, _ in slots}), len(slots))

    @invariant()
    def kept_pages_hold_what_they_held_when_they_were_kept(self):
        assert {page: self.pool[page] for page in self.kept} == self.kept

    @invariant()
    def a_generation_counts_how_often_content_was_dropped(self):
        assert [self.allocator.generation(p) for p in range(self.allocator.num_pages)] == self.generations

    @invariant()
    def free_pages_can_be_had_without_touching_the_cached_ones_and_then_no_more_than_these(self):
        pages = self.allocator.allocate(self.allocator.num_free)
        unowned = [p for p in range(self.allocator.num_pages) if not self.owners(p)]
        assert sorted([*pages, *self.cached]) == unowned
        with pytest.raises(OutOfPages):
            self.allocator.allocate(len(self.cached) + 1)
        assert self.allocator.free(pages) == pages
        self.dropped(pages)

    @invariant()
    def the_batch_arrays_agree(self):
        batch = list(self.expected)
        pages = [self.table.pages(s) for s in batch]
        width = max(map(len, pages), default=0)
        assert self.table.dense(batch).tolist() == [p + [-1] * (width - len(p)) for p in pages]
        assert self.table.seq_lens(batch).tolist() == [len(self.expected[s]) for s in batch]
        page_indptr, page_indices = self.table.csr(batch)
        assert [page_indices[a:b].tolist() for a, b in itertools.pairwise(page_indptr.tolist())] == pages


PagesUnderUse.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPagesUnderUse = PagesUnderUse.TestCase
