"""A snapshot says of every page what the page table and the allocator say, at a moment between two steps."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace

import pytest

from quire.engine import Engine, SamplingParams
from quire.engine.rates import Rates
from quire.engine.snapshot import MAX_REQUESTS, NOBODY, Cell, Snapshot, take
from quire.errors import ArgumentError
from quire.spec import Visibility

from .fakes import FakeModel, fork
from .test_threads import HANGS, Gate

ALL, WINDOW = Visibility(), Visibility(5)


def expected_cells(engine: Engine) -> list[Cell]:
    """Each page on its own, from the tables' lists and one question after the other."""
    table, allocator, size = engine.table, engine.table.allocator, engine.table.page_size
    request_of = {
        s.seq_id: request.request_id for request in engine.requests.values() for s in request.sequences
    }
    unused = dict.fromkeys(range(allocator.num_pages), 0)
    for seq_id in table.seq_ids:
        for group in range(len(table.groups)):
            if table.length(seq_id) % size:
                unused[table.pages(seq_id, 0, group)[-1]] = size - table.length(seq_id) % size
    cells = []
    for page, owners in enumerate(table.page_owners()):
        count = allocator.refcount(page)
        alone = count == 1 and len(owners) == 1
        cells.append(
            Cell(
                owner=request_of[owners[0]] if alone else NOBODY,
                owned=int(alone),
                shared=int(count > 1),
                others=int(count == 1 and not owners),
                cached=int(allocator.is_cached(page)),
                unused=unused[page],
            )
        )
    return cells


def busy_engine(**options) -> Engine:
    """Requests of all lengths that begin alike, more than fit, some of several samples."""
    engine = Engine(FakeModel(**{"num_pages": 24, **options}), max_batch_tokens=12)
    draw = random.Random(1)
    beginning = [draw.randrange(50) for _ in range(10)]
    for i in range(9):
        prompt = beginning[: draw.choice((4, 8, 10))] + [
            draw.randrange(50) for _ in range(draw.randrange(1, 12))
        ]
        params = SamplingParams(max_tokens=draw.randrange(1, 14), n=1 + i % 3, temperature=1.0, seed=i)
        engine.add_request(prompt, params)
    return engine


@pytest.mark.parametrize("groups", [(ALL,), (ALL, WINDOW)], ids=["one group", "a group with a window"])
def test_every_page_and_every_figure_is_that_of_the_tables_after_each_step(groups):
    engine = busy_engine(groups=groups, num_pages=24 * len(groups))
    allocator, seen = engine.table.allocator, set()
    while engine.has_unfinished:
        engine.step()
        if engine.stats.steps % 5 == 0 and engine.num_running > 1:
            engine._scheduler.preempt_last()
        found = engine.snapshot()
        # What several sequences of one prompt have in common may be partly filled; it is shared, and counted by hand.
        cells = expected_cells(engine)
        assert [cell._replace(unused=0) for cell in found.cells] == [
            cell._replace(unused=0) for cell in cells
        ]
        held, filled = engine.table.occupancy()
        assert (found.held_slots - found.unused_slots, sum(found.group_pages)) == (filled, held)
        assert found.unused_slots == sum(cell.unused for cell in found.cells)
        for one, other in zip(found.cells, cells, strict=True):
            assert one.shared or one.unused == other.unused
        assert (found.num_owned, found.num_cached, found.num_free) == (
            allocator.num_owned, allocator.num_cached, allocator.num_free,
        )  # fmt: skip
        assert found.num_owned + found.num_cached + found.num_free == found.num_pages == len(found.cells)
        assert found.num_shared == sum(cell.shared for cell in found.cells)
        assert (found.num_running, found.num_waiting) == (
            engine.num_running, len(engine.requests) - engine.num_running,
        )  # fmt: skip
        assert {each.request_id for each in found.requests} == set(engine.requests)
        for each in found.requests:
            sequences = engine.requests[each.request_id].sequences
            pages = {
                p for s in sequences if s.seq_id in engine.table for p in engine.table.all_pages(s.seq_id)
            }
            assert (each.pages, each.state == "running") == (len(pages), bool(pages))
            assert each.generated_tokens == sum(s.num_generated for s in sequences)
            seen.add(each.state)
        seen |= {kind for kind in ("owned", "shared", "cached") if any(getattr(c, kind) for c in found.cells)}
    assert seen == {"running", "waiting", "preempted", "owned", "shared", "cached"}
    assert engine.snapshot().requests == ()


def test_a_shared_page_counts_the_slots_of_whoever_has_filled_most_of_it():
    engine = Engine(FakeModel(page_size=8))
    request_id = engine.add_request([1, 2, 3])
    engine.step()
    second = fork(engine, request_id, 7)
    engine.step()  # each writes its own fourth token, one of them into a copy
    assert engine.snapshot().unused_slots == 2 * (8 - 4)
    engine.table.fork(second.seq_id, "a third")
    assert engine.snapshot().unused_slots == 2 * (8 - 4)
    assert engine.snapshot().num_shared == 1


def test_neighbouring_pages_share_a_cell_where_there_are_more_pages_than_cells():
    engine = busy_engine()
    for _ in range(5):
        engine.step()
    whole, few = engine.snapshot(), take(engine, max_cells=5)  # 5 pages each, and 4 in the last one
    assert (few.pages_per_cell, len(few.cells), whole.pages_per_cell) == (5, 5, 1)
    for place, cell in enumerate(few.cells):
        pages = whole.cells[5 * place : 5 * place + 5]
        assert cell[1:] == tuple(map(sum, zip(*pages, strict=True)))[1:]
        owners = [page.owner for page in pages if page.owner != NOBODY]
        assert (
            cell.owner == NOBODY if not owners else owners.count(cell.owner) == max(map(owners.count, owners))
        )
    assert len({cell.owner for cell in few.cells}) > 2


def test_pages_of_another_engine_and_of_other_code_belong_to_others():
    model = FakeModel()
    one, other = Engine(model), Engine(model)
    one.add_request([1] * 9)
    other.add_request([2] * 5)
    one.step(), other.step()
    taken = model.allocator.allocate(1)
    found = one.snapshot()
    assert (found.num_owned, found.num_others, found.num_shared) == (3 + 2 + 1, 3, 0)
    assert [each.request_id for each in found.requests] == [0]
    assert found.cells[taken[0]] == Cell(NOBODY, 0, 0, 1, 0, 0)
    model.allocator.free(taken)


def test_more_requests_than_are_named_are_counted():
    engine = Engine(FakeModel(num_pages=8))
    for i in range(MAX_REQUESTS + 5):
        engine.add_request([i % 50], SamplingParams(max_tokens=5))
    engine.step()
    found = engine.snapshot()
    assert len(found.requests) == MAX_REQUESTS
    assert found.num_running + found.num_waiting == MAX_REQUESTS + 5
    assert [each.state for each in found.requests[: found.num_running]] == ["running"] * found.num_running


def test_pages_in_host_memory_are_counted():
    engine = Engine(FakeModel(num_pages=8, page_size=4, num_host_pages=64))
    for token in range(4):
        engine.generate([[token] * 17], SamplingParams(max_tokens=5))
    found = engine.snapshot()
    assert (found.num_swapped, found.num_host_pages) == (engine.model.swap.num_swapped, 64)
    assert found.num_swapped > 0


def test_a_step_that_runs_in_another_thread_is_waited_for():
    engine = Engine(FakeModel(), max_batch_tokens=8)
    gate, found = Gate(engine.model, at=2), []
    steps = threading.Thread(target=engine.generate, args=([[1] * 20],))
    looks = threading.Thread(target=lambda: found.append(engine.snapshot()))
    steps.start()
    assert gate.reached.wait(HANGS)
    looks.start()
    looks.join(0.05)
    assert not found, "the pages of the second step are taken and not written"
    gate.opened.set()
    looks.join(HANGS), steps.join(HANGS)
    [taken] = found
    assert taken.steps >= 2
    if taken.requests:  # two chunks of 8 tokens, one of 4, then one token each
        assert taken.held_slots - taken.unused_slots == (16 if taken.steps == 2 else 17 + taken.steps)


def test_snapshots_of_many_threads_hold_together_while_steps_run():
    engine = busy_engine()
    ended, wrong, count = threading.Event(), [], [0]

    def look():
        while not ended.is_set():
            found = engine.snapshot()
            held = sum(each.pages for each in found.requests)
            if sum(found.group_pages) > held or found.num_owned != sum(
                c.owned + c.shared for c in found.cells
            ):
                wrong.append(found)
            count[0] += 1

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for each in lookers:
        each.start()
    for _ in range(3):
        engine.generate([[i, 2, 3, 4, 5] for i in range(6)], SamplingParams(max_tokens=8))
    ended.set()
    for each in lookers:
        each.join(HANGS)
    assert not wrong
    assert count[0] > 0


def test_within_a_step_it_is_as_of_now_and_whoever_holds_the_lock_may_look():
    engine, found = Engine(FakeModel()), []

    def processor(token_ids, logits):
        found.append(engine.snapshot())
        return logits

    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, logits_processors=[processor]))
    assert [each.num_running for each in found] == [1, 1]
    with engine.model.lock:
        assert engine.snapshot().num_running == 0


def test_who_looks_does_not_make_an_engine_that_nobody_steps_seem_at_work():
    """Else its requests would keep their pages for as long as someone looks at it."""
    engine, waiting = Engine(FakeModel()), []
    with engine.model.lock:
        looker = threading.Thread(target=engine.snapshot)
        looker.start()
        while not waiting:
            waiting = list(engine._turns._waiting.values())
    looker.join(HANGS)
    assert waiting == [None]


def test_json_gives_the_snapshot_back():
    engine = busy_engine()
    for _ in range(6):
        engine.step()
        found = engine.snapshot()
        assert Snapshot.from_json(json.loads(json.dumps(found.as_json(), allow_nan=False))) == found


WRONG = {
    "no object": lambda plain: [],
    "a field is missing": lambda plain: {k: v for k, v in plain.items() if k != "cells"},
    "text for a number": lambda plain: plain | {"num_pages": "<b>"},
    "below zero": lambda plain: plain | {"num_cached": -1},
    "no number": lambda plain: plain | {"tokens_per_second": float("nan")},
    "a bool": lambda plain: plain | {"steps": True},
    "a state": lambda plain: plain | {"requests": [plain["requests"][0] | {"state": "<script>"}]},
    "too many cells": lambda plain: plain | {"cells": [[-1, 0, 0, 0, 0, 0, 10**9]]},
    "too few cells": lambda plain: plain | {"cells": plain["cells"][1:]},
    "more pages than a cell has": lambda plain: plain | {"cells": [[-1, 1, 1, 0, 0, 0, plain["num_pages"]]]},
    "an owner of text": lambda plain: plain | {"cells": [["x", 0, 0, 0, 0, 0, plain["num_pages"]]]},
    "a short cell": lambda plain: plain | {"cells": [[]]},
    "many requests": lambda plain: plain | {"requests": plain["requests"] * 99},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_json_of_another_form_is_refused(wrong):
    engine = busy_engine()
    engine.step()
    with pytest.raises(ArgumentError, match="must be what Snapshot"):
        Snapshot.from_json(wrong(engine.snapshot().as_json()))


def test_the_hit_rate_and_the_waste_are_shares():
    engine = Engine(FakeModel())
    engine.generate([[1] * 9])
    before = engine.snapshot()
    assert (before.hit_rate, before.unused_slots, before.held_slots) == (0, 0, 0)
    engine.generate([[1] * 9])
    assert engine.snapshot().hit_rate == engine.stats.hit_rate == 8 / 18
    assert "0 requests running" in str(replace(before))


def test_tokens_per_second_are_those_of_the_last_five_seconds():
    rates = Rates()
    assert rates.tokens_per_second(100.0) == 0
    for i in range(1000):  # of a tenth of a second and two tokens each
        rates.count(i / 10, (i + 1) / 10, 2 * (i + 1))
        assert len(rates._pieces) <= 53
    assert rates.tokens_per_second(100.0) == pytest.approx(20, rel=0.03)
    assert rates.tokens_per_second(102.5) == pytest.approx(10, rel=0.05)  # nothing came for half of the time
    assert rates.tokens_per_second(106.0) == 0


def test_the_rate_of_an_engine_that_has_just_begun_does_not_count_the_time_before():
    rates = Rates()
    rates.count(1000.0, 1000.5, 30)
    rates.count(1000.5, 1001.0, 60)
    assert rates.tokens_per_second(1001.0) == 60
    rates.count(1001.0, 1001.5, 15)  # someone has set the total back
    assert rates.tokens_per_second(1001.5) == 40


def test_one_step_longer_than_the_window_counts_by_its_time():
    rates = Rates()
    rates.count(0.0, 9.0, 18)
    assert rates.tokens_per_second(9.0) == pytest.approx(18 / 5)


def test_waits_are_those_of_requests_that_finished():
    engine = Engine(FakeModel())
    assert engine.snapshot().first_token_seconds is None
    outputs = engine.generate([[1], [2], [3]], SamplingParams(max_tokens=5))
    found = engine.snapshot()
    firsts = sorted(output.time_to_first_token for output in outputs)
    assert found.first_token_seconds == pytest.approx(firsts[1])
    between = sorted((output.seconds - output.time_to_first_token) / 4 for output in outputs)
    assert found.between_tokens_seconds == pytest.approx(between[1])
    assert found.generated_tokens == 15
