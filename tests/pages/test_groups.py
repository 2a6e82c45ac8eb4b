"""Several page tables for one text: what each gives back, and when a beginning is found in all of them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from quire.errors import ArgumentError
from quire.pages import PageAllocator, PageTable, PrefixCache
from quire.spec import Visibility

ALL, WINDOW, CHUNKS = Visibility(), Visibility(window_left=5), Visibility(chunk_size=8)
SIZE = 4


def make_table(groups, num_pages=60):
    dropped: list[int] = []
    return PageTable(PageAllocator(num_pages, on_drop=dropped.extend), SIZE, groups), dropped


def compute(table, cache, seq_id, tokens, prefix):
    """Append tokens, name their pages as an engine does after a step, and give back what is out of sight."""
    start = table.length(seq_id)
    assert start == prefix.num_pages * SIZE
    table.append(seq_id, len(tokens))
    count = len(tokens) // SIZE
    pages = [
        page
        for group in range(len(table.groups))
        for page in table.pages(seq_id, prefix.num_pages, group)[:count]
    ]
    first = prefix.num_pages
    prefix = named = cache.insert(prefix, tokens[: count * SIZE], pages)
    for index in range(count - 1, -1, -1):
        for group in range(len(table.groups)):
            if named.page_of(group) != pages[group * count + index]:
                table.replace(seq_id, first + index, named.page_of(group), group)
        named = named.parent
    table.release_unseen(seq_id)
    return prefix


# --- the table -------------------------------------------------------------------------------------------


def test_every_token_has_a_slot_of_its_own_in_each_group():
    table, _ = make_table((ALL, WINDOW, WINDOW))
    table.add("a")
    slots, copies = table.append("a", 6)
    assert slots.shape == (3, 6)
    assert len(set(slots.reshape(-1).tolist())) == 18
    assert copies == []
    for group in range(3):
        pages = table.pages("a", 0, group)
        assert slots[group].tolist() == [pages[t // SIZE] * SIZE + t % SIZE for t in range(6)]
    one = table.append("a", 1).slot_mapping
    assert one.tolist() == [[table.page_at("a", 1, group) * SIZE + 2] for group in range(3)]


@pytest.mark.parametrize("sight", [WINDOW, CHUNKS, Visibility(0), Visibility(3), Visibility(4)], ids=str)
def test_a_sequence_keeps_the_pages_that_its_next_token_sees_and_gives_back_the_others(sight):
    table, dropped = make_table((ALL, sight))
    table.add("a")
    draw = random.Random(0)
    while table.length("a") < 60:
        table.append("a", draw.choice([1, 1, 1, 2, 7]))
        table.release_unseen("a")
        length = table.length("a")
        # The next token's own slot may be on the last page.
        wanted = {t // SIZE for t in range(sight.first_key(length), length + 1)} & set(
            range(math.ceil(length / SIZE))
        )
        held = len(table.pages("a", 0, 1))
        assert held == len(wanted)
        assert table.num_released("a", 1) == math.ceil(length / SIZE) - held
        assert len(table.pages("a")) == math.ceil(length / SIZE)
        assert len(dropped) == table.num_released("a", 1)
    assert sorted(table.all_pages("a")) == sorted(table.pages("a") + table.pages("a", 0, 1))


def test_pages_given_back_are_page_0_in_the_table_that_a_plan_reads():
    table, _ = make_table((ALL, WINDOW))
    table.allocator.allocate(1)
    for name, tokens in (("a", 17), ("b", 3)):
        table.add(name)
        table.append(name, tokens)
        table.release_unseen(name)
    dense = table.dense(["a", "b"])
    assert dense.shape == (2, 2, 5)
    assert dense[0, 0].tolist() == table.pages("a")
    assert dense[1, 0].tolist() == [0, 0, 0, *table.pages("a", 0, 1)]
    assert dense[:, 1, 1:].eq(-1).all()
    indptr, indices = table.csr(["a", "b"], 1)
    assert indptr.tolist() == [0, 5, 6]
    assert torch.equal(indices[:5], dense[1, 0])


def test_one_group_with_a_window_has_a_table_as_every_model_has():
    table, _ = make_table((WINDOW,))
    table.add("a")
    assert table.append("a", 13)[0].shape == (13,)
    table.release_unseen("a")
    assert table.dense(["a"]).tolist() == [[0, 0, *table.pages("a")]]
    assert len(table.pages("a")) == 2


def test_forks_share_what_is_in_sight_and_each_gives_back_its_own():
    table, dropped = make_table((ALL, WINDOW))
    table.add("a")
    table.append("a", 14)
    table.release_unseen("a")
    held = table.all_pages("a")
    table.fork("a", "b")
    assert table.all_pages("b") == held
    assert table.pages_needed("a", 1) == 2, "the last page of each group is shared"
    copies = table.append("a", 1)[1]
    assert [source for source, _ in copies] == [table.pages("b")[-1], table.pages("b", 0, 1)[-1]]
    assert not table.append("b", 1)[1]
    dropped.clear()
    table.append("a", 8)
    table.release_unseen("a")
    assert not set(dropped) & set(held), "b still sees them"
    table.append("b", 8)
    table.release_unseen("b")
    assert set(dropped) >= set(held) - set(table.pages("b"))
    slots = [table.pages(name, 0, group) for name in "ab" for group in range(2)]
    pages = {page for each in slots for page in each}
    # Each of the four last pages has three of its four slots filled.
    assert table.occupancy() == (len(pages), 4 * len(pages) - 4)
    assert {page for page, owners in enumerate(table.page_owners()) if owners} == pages


def test_a_kept_page_that_falls_out_of_sight_is_cached():
    table, dropped = make_table((WINDOW,))
    table.add("a")
    table.append("a", 8)
    [first, second] = table.pages("a")
    table.allocator.keep([first])
    table.append("a", 8)
    table.release_unseen("a")
    assert table.allocator.is_cached(first)
    assert dropped == [second]


def test_a_sequence_is_not_trimmed_to_where_it_would_see_a_page_that_it_gave_back():
    table, _ = make_table((ALL, WINDOW))
    table.add("a")
    table.append("a", 17)
    table.release_unseen("a")
    with pytest.raises(ArgumentError, match=r"a window of 6; got 16, .* given back its first 3 pages"):
        table.trim("a", 16)
    assert table.length("a") == 17
    table.append("a", 3)
    assert len(table.trim("a", 17)) == 0
    assert table.length("a") == 17
    with pytest.raises(ArgumentError, match="index must be from 3 to 4"):
        table.page_at("a", 2, 1)


def test_a_start_needs_the_pages_in_sight_of_each_group():
    table, _ = make_table((ALL, WINDOW))
    pages = table.allocator.allocate(6)
    for wrong in (pages[:5], pages, []):
        with pytest.raises(ArgumentError, match="6 in 2 groups") as raised:
            table.add("a", wrong if wrong != pages else [*pages, pages[0]], 16)
        assert "a" not in table
        assert "Fix: " in str(raised.value)
    table.add("a", pages, 16)  # four pages, and the two that token 16 sees
    assert table.pages("a") == pages[:4]
    assert table.pages("a", 0, 1) == pages[4:]
    assert table.length("a") == 16
    assert table.allocator.refcount(pages[5]) == 2


def test_groups_are_checked():
    for groups in ((), (Visibility(chunk_size=6),)):
        with pytest.raises(ArgumentError, match="groups must be"):
            PageTable(PageAllocator(4), SIZE, groups)
    for groups in ((), (WINDOW, ALL)):
        with pytest.raises(ArgumentError, match="groups must be"):
            PrefixCache(PageAllocator(4), SIZE, groups)


# --- the prefix cache ------------------------------------------------------------------------------------


def cached(groups, num_tokens, num_pages=60):
    """A table and cache after a text of so many tokens has been computed and has ended."""
    table, _ = make_table(groups, num_pages)
    cache = PrefixCache(table.allocator, SIZE, groups)
    tokens = list(range(num_tokens))
    table.add("a")
    prefix = compute(table, cache, "a", tokens, cache.match(()))
    pages = {group: [prefix.pages(group)[i] for i in range(prefix.num_pages)] for group in range(len(groups))}
    table.free("a")
    return table, cache, tokens, pages


def drop(cache, page):
    """Lose one cached page."""
    cache.allocator.unkeep([page])


@pytest.mark.parametrize(
    "groups", [(ALL, WINDOW), (WINDOW,), (ALL, CHUNKS, WINDOW), (Visibility(3), WINDOW)], ids=str
)
def test_a_prefix_is_found_where_each_group_has_what_the_next_token_sees(groups):
    """Against all subsets of lost pages of a short text, by the definition."""
    for seed in range(40):
        draw = random.Random(seed)
        table, cache, tokens, pages = cached(groups, 26)
        lost = [{i for i in range(6) if draw.random() < 0.25} for _ in groups]
        for group, indices in enumerate(lost):
            for index in indices:
                drop(cache, pages[group][index])
        possible = [
            count
            for count in range(7)
            if not any(
                set(range(sight.first_key(count * SIZE) // SIZE, count)) & lost[group]
                for group, sight in enumerate(groups)
            )
        ]
        prefix = cache.match(tokens)
        assert prefix.num_pages == max(possible)
        found = cache.pages(prefix)
        assert found == [
            page
            for group, sight in enumerate(groups)
            for page in pages[group][sight.first_key(prefix.num_pages * SIZE) // SIZE : prefix.num_pages]
        ]
        table.add("b", found, prefix.num_pages * SIZE)
        assert table.length("b") == prefix.num_pages * SIZE


@pytest.mark.parametrize("groups", [(ALL, WINDOW), (WINDOW,)], ids=str)
def test_what_is_computed_again_takes_the_place_of_what_was_lost(groups):
    table, cache, tokens, pages = cached(groups, 24)
    last = len(groups) - 1
    drop(cache, pages[last][4])
    prefix = cache.match(tokens)
    assert prefix.num_pages == 4, "token 20 and 24 see page 4"
    table.add("b", cache.pages(prefix), 16)
    compute(table, cache, "b", tokens[16:], prefix)
    assert cache.match(tokens).num_pages == 6
    new = cache.match(tokens).pages(last)
    assert new[:4] + new[5:] == pages[last][:4] + pages[last][5:], (
        "pages that were there are taken, not exchanged"
    )
    if last:
        assert cache.match(tokens).pages() == pages[0]
    assert set(table.all_pages("b")) <= set(new) | set(pages[0])


def test_a_page_is_named_in_one_group_only_and_owned_pages_are_never_dropped():
    table, cache, tokens, pages = cached((ALL, WINDOW), 24, num_pages=12)
    assert cache.num_named == 12
    assert {cache.name_of(page).num_pages for page in pages[1]} == {1, 2, 3, 4, 5, 6}
    prefix = cache.match(tokens)
    table.add("b", cache.pages(prefix), 24)
    assert table.allocator.num_available == 4, "of the window, the first four"
    assert cache.evict(12) == 4
    assert cache.match(tokens).num_pages == 6


def test_a_chain_over_lost_pages_is_forgotten_with_its_last_page():
    table, cache, tokens, _ = cached((WINDOW,), 400, num_pages=100)
    assert len(cache._links) == 100
    table.add("b")
    for _ in range(88):  # other tokens, on the pages that were released first
        table.append("b", 4)
        table.release_unseen("b")
    assert cache.match(tokens).num_pages == 100, "the end is there, so the beginning is known without pages"
    table.free("b")
    other = list(range(1000, 1400))
    table.add("c")
    compute(table, cache, "c", other, cache.match(()))
    assert len(cache._links) == 100, "nothing is left of the first text"
    assert cache.match(tokens).num_pages == 0
    assert cache.match(other).num_pages == 100


def test_explain_names_the_page_that_some_layers_lost():
    _, cache, tokens, pages = cached((ALL, Visibility(9)), 26)
    assert "the rest, 2 tokens" in cache.explain(cache.match(tokens), tokens)
    drop(cache, pages[1][1])
    assert cache.match(tokens).num_pages == 6
    found = cache.match(tokens[:19])
    assert found.num_pages == 1, "tokens 8, 12 and 16 see the lost page"
    why = "the page of tokens 4 to 7 was dropped in layers that see a window of 10"
    assert cache.explain(found, tokens) == why
    drop(cache, pages[0][0])
    why = "the page of tokens 0 to 3 was dropped in layers that see all earlier tokens"
    assert cache.explain(cache.match(tokens), tokens) == why


def test_clearing_forgets_the_pages_of_all_groups():
    _, cache, tokens, _ = cached((ALL, WINDOW), 24)
    cache.clear()
    assert cache.num_named == 0
    assert cache.allocator.num_free == 60
    assert cache.match(tokens).num_pages == 0
