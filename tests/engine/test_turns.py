"""Several engines on one model: one pool, pages for the oldest request, and nobody starves."""

from __future__ import annotations

import gc
import threading

import pytest

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import OutOfPages

from .fakes import FakeModel

GREEDY = SamplingParams(max_tokens=12)
PROMPTS = [[1, 2, 3], [4] * 9, [5, 6], [7] * 6]


def two_engines(**options) -> tuple[FakeModel, Engine, Engine]:
    model = FakeModel(**options)
    return model, Engine(model, max_batch_tokens=16), Engine(model, max_batch_tokens=16)


def all_pages_are_free(model: FakeModel) -> bool:
    return model.allocator.num_available == model.num_pages


@pytest.mark.parametrize("num_pages", [64, 8])
def test_engines_that_step_in_turns_give_each_request_its_own_tokens(num_pages):
    model, *engines = two_engines(num_pages=num_pages)
    owners = {
        (engine, engine.add_request(prompt, GREEDY)): prompt
        for engine, prompt in zip(engines * 2, PROMPTS, strict=True)
    }
    got = {}
    while any(engine.has_unfinished for engine in engines):
        for engine in engines:
            got |= {(engine, d.request_id): d.output.token_ids for d in engine.step() if d.output}
        held = [
            page
            for engine in engines
            for row in map(engine.table.pages, engine.table.seq_ids)
            for page in row
        ]
        assert len(set(held)) == len(held) == model.allocator.num_owned, "a page has two owners"
    assert got == {owner: model.continuation(prompt, 12) for owner, prompt in owners.items()}
    assert all_pages_are_free(model)


@pytest.mark.parametrize("num_pages", [64, 8])
def test_engines_in_threads_of_their_own_give_each_request_its_own_tokens(num_pages):
    model, *engines = two_engines(num_pages=num_pages)
    got = {}

    def ask(engine, i):
        for _ in range(3):
            got.setdefault(i, []).append([o.token_ids for o in engine.generate(PROMPTS[2 * i :][:2], GREEDY)])

    threads = [threading.Thread(target=ask, args=(e, i), daemon=True) for i, e in enumerate(engines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for i in range(2):
        assert got[i] == [[model.continuation(p, 12) for p in PROMPTS[2 * i :][:2]]] * 3
    assert all_pages_are_free(model)


def test_the_oldest_request_takes_pages_from_a_younger_one_of_another_engine_and_is_never_taken_from():
    # Both prompts take several chunks and more than half of the pool: whoever were taken from in turns would end never.
    model, first, second = two_engines(num_pages=12, page_size=4)
    older = first.add_request([1] * 30, GREEDY)
    younger = second.add_request([2] * 30, GREEDY)
    ended = []
    for _ in range(40):
        for engine in (first, second):
            ended += [(engine, delta.output) for delta in engine.step() if delta.output]
    assert [(engine, output.request_id) for engine, output in ended] == [(first, older), (second, younger)]
    assert [output.preemptions for _, output in ended] == [0, 1]
    assert [o.token_ids for _, o in ended] == [model.continuation([n] * 30, 12) for n in (1, 2)]


def test_an_older_request_that_nobody_serves_gives_its_pages_in_the_end_and_gets_its_tokens_later():
    model, first, second = two_engines(num_pages=8, page_size=4)
    suspended = first.stream([1] * 24, SamplingParams(max_tokens=8))
    tokens = next(suspended).token_ids
    assert model.allocator.num_free < 3
    [output] = second.generate([2] * 20, GREEDY)  # in the same thread: nobody else can go on with the stream
    assert output.token_ids == model.continuation([2] * 20, 12)
    tokens += [token for delta in suspended for token in delta.token_ids]
    assert tokens == model.continuation([1] * 24, 8)
    assert all_pages_are_free(model)


def test_step_gives_nothing_while_an_older_request_holds_the_pages_and_something_when_it_has_ended():
    model, first, second = two_engines(num_pages=7, page_size=4)
    first.add_request([1] * 16, SamplingParams(max_tokens=3))
    first.step()
    waits = second.add_request([2] * 16, SamplingParams(max_tokens=1))
    while first.has_unfinished:
        assert second.step() == []
        first.step()
    [delta] = second.step()
    assert (delta.request_id, delta.token_ids) == (waits, model.continuation([2] * 16, 1))


def test_pages_held_by_no_engine_are_an_error_also_beside_another_engine():
    model, first, second = two_engines(num_pages=8)
    taken = model.allocator.allocate(8)
    request_id = second.add_request([1, 2, 3], GREEDY)
    with pytest.raises(OutOfPages, match="got 0 free of 8"):
        second.generate([1], GREEDY)
    model.allocator.free(taken)
    while second.has_unfinished:
        for delta in second.step():
            assert delta.request_id == request_id
    assert first.stats.steps == 0


@pytest.mark.parametrize("in_a_circle", [False, True])
def test_a_dropped_engine_gives_its_pages_back(in_a_circle):
    model, first, second = two_engines(num_pages=8)
    first.add_request([1] * 16, GREEDY)
    first.step()
    second.add_request([2] * 5, GREEDY)
    second.step()
    assert model.allocator.num_owned == 6
    if in_a_circle:
        first.itself = first
    del first
    gc.collect()
    assert model.allocator.num_owned == 2
    del second
    gc.collect()
    assert all_pages_are_free(model)


def test_an_engine_dropped_while_another_one_steps_gives_its_pages_back_after_that_step():
    model, first, second = two_engines(num_pages=8)
    first.add_request([1] * 9, GREEDY)
    first.step()
    second.add_request([2] * 9, GREEDY)
    engines = [first]
    del first
    forward, seen = model.forward, []

    def dropping(step):
        engines.clear()
        gc.collect()
        seen.append(model.allocator.num_owned)
        return forward(step)

    model.forward = dropping
    second.step()
    assert seen == [6], "pages went back in the middle of a step"
    assert model.allocator.num_owned == 3


def test_no_thread_has_two_turns_in_a_row_while_another_waits_for_one():
    _, first, second = two_engines()
    turns, order = first._turns, []
    began = threading.Event()

    def has_two_turns(engine, name):
        for _ in range(2):
            turns.run(lambda: order.append(name), engine._scheduler)

    def begins(engine, name):
        def waits_for_the_other():
            order.append(name)
            began.set()
            while len(turns._waiting) < 1:
                pause.wait(0.001)

        turns.run(waits_for_the_other, engine._scheduler)
        turns.run(lambda: order.append(name), engine._scheduler)

    pause = threading.Event()
    threads = [
        threading.Thread(target=begins, args=(first, "a"), daemon=True),
        threading.Thread(target=has_two_turns, args=(second, "b"), daemon=True),
    ]
    threads[0].start()
    assert began.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert order[:3] == ["a", "b", "a"]


def test_deferred_work_is_done_at_the_start_of_a_turn_and_after_one_that_raised():
    _, first, _ = two_engines()
    turns, done = first._turns, []
    turns._deferred.append(lambda: done.append("before"))  # as left by a thread that found the lock held

    def raises():
        assert done == ["before"]
        turns.defer(lambda: done.append("after"))
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        turns.run(raises, first._scheduler)
    assert done == ["before", "after"]
    assert not turns.has_owner
