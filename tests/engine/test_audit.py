"""Pages that nobody accounts for: each loss raises, names page and owners, and costs no page and no token."""

from __future__ import annotations

import pytest

from quire.engine import audit
from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import PageStateError
from quire.pages import PageTable
from quire.pages.balance import find_fault

from .fakes import FakeModel, drain

PAGE = 4
PARAMS = SamplingParams(max_tokens=6)


def make_engine() -> Engine:
    return Engine(FakeModel(num_pages=64, page_size=PAGE))


def losses(engine: Engine, request_id: int) -> dict:
    """What loses a page, each with the page that an error names and its owners in words."""
    table, allocator = engine.table, engine.model.allocator
    page = table.pages(request_id)[-1]
    nobody, one = "held by sequences \\[\\]", f"held by sequences \\[{request_id}\\]"

    def is_forgotten():
        del table._sequences[request_id]

    def is_no_longer_held():
        table._let_go([table._sequence(request_id).groups[0].pop()])
        table._sequence(request_id).length -= 1

    def is_shared_and_forgotten():
        allocator.share([page], counted=True)

    def goes_with_its_table():
        dropped = PageTable(allocator, PAGE)
        dropped.add("dropped")
        dropped.append("dropped", 1)

    def leaves_the_free_list():
        allocator._free.pop()

    def is_free_and_owned():
        allocator._free.append(page)

    def is_free_twice():
        allocator._free.append(allocator._free[-1])

    free = allocator._free[-1]
    return {
        is_forgotten: (table.pages(request_id)[0], "0 owners, as nobody else holds it: it was lost; got 1", nobody),
        is_no_longer_held: (page, "0 owners, as nobody else holds it: it was lost; got 1", nobody),
        is_shared_and_forgotten: (page, "1 owners, as nobody else holds it: it was lost; got 2", one),
        goes_with_its_table: (free, "0 owners, as nobody else holds it: it was lost; got 1", nobody),
        leaves_the_free_list: (free, "an owner, or be free or cached: it was lost; got 0", nobody),
        is_free_and_owned: (page, "no owner and one place among the pages that are free or cached; got 1", one),
        is_free_twice: (free, "no owner and one place among the pages that are free or cached; got 0", nobody),
    }  # fmt: skip


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("number", range(7))
def test_a_page_that_nobody_accounts_for_is_named_once_and_comes_back(number, debug, monkeypatch):
    monkeypatch.setenv("QUIRE_DEBUG", "1" if debug else "0")
    monkeypatch.setattr(audit, "STEPS_PER_COUNT", 2)
    engine = make_engine()
    mine, other = engine.add_request(list(range(9)), PARAMS), engine.add_request([20, 21], PARAMS)
    engine.step()
    lose, (page, expected, owners) = list(losses(engine, mine).items())[number]
    lose()
    with pytest.raises(PageStateError, match=f"page {page} must have {expected} owners, .*{owners}"):
        engine.step()
    outputs = drain(engine)
    assert outputs[mine].token_ids == engine.model.continuation(range(9), 6)
    assert outputs[other].token_ids == engine.model.continuation([20, 21], 6)
    allocator = engine.model.allocator
    assert allocator.num_available == allocator.num_pages, lose.__name__
    assert find_fault(allocator) is None


def test_pages_that_others_hold_are_not_lost_and_are_theirs_also_after_an_error(monkeypatch):
    monkeypatch.setenv("QUIRE_DEBUG", "1")
    engine = make_engine()
    allocator, second = engine.model.allocator, Engine(engine.model)
    beside, taken = PageTable(allocator, PAGE), allocator.allocate(2)
    beside.add("beside", taken[:1])
    beside.append("beside", 1)
    ids = [each.add_request([20, 21], PARAMS) for each in (engine, second)]
    engine.step(), second.step()
    pages = beside.pages("beside"), second.table.pages(ids[1])
    allocator._free.pop()
    with pytest.raises(PageStateError, match="it was lost"):
        engine.step()
    assert (beside.pages("beside"), second.table.pages(ids[1])) == pages
    assert [allocator.refcount(page) for page in (*pages[0], *pages[1], taken[1])] == [2, 1, 1, 1]
    for each, request_id in zip((engine, second), ids, strict=True):
        assert drain(each)[request_id].token_ids == engine.model.continuation([20, 21], 6)
    allocator.free(taken), beside.free("beside")
    assert allocator.num_available == allocator.num_pages


def test_a_pool_without_pages_says_that_they_were_lost():
    engine = make_engine()
    allocator = engine.model.allocator
    dropped = PageTable(allocator, PAGE)
    dropped.add("dropped")
    dropped.append("dropped", allocator.num_pages * PAGE)
    del dropped
    request_id = engine.add_request([1, 2], PARAMS)
    with pytest.raises(
        PageStateError, match="page 0 must have 0 owners, as nobody else holds it: it was lost"
    ):
        engine.step()
    assert drain(engine)[request_id].token_ids == engine.model.continuation([1, 2], 6)
