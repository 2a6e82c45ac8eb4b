"""Who runs first: lower priorities, then those who came first; and nobody waits for ever."""

from __future__ import annotations

import pytest

from quire.engine import request
from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError

from .fakes import FakeModel

GREEDY = SamplingParams(max_tokens=12)
PROMPT = [1, 2, 3, 4, 5, 6]


class Clock:
    """Stands in for the module `time`: a request arrives when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(request, "time", clock)
    return clock


def running(engine: Engine) -> list[int]:
    return [request.request_id for request in engine._scheduler.running]


def finish_order(engine: Engine) -> list[int]:
    """Step until nothing is left; the requests in the order of their ends, each with the tokens it has alone."""
    ended = []
    while engine.has_unfinished:
        for delta in engine.step():
            if delta.output is not None:
                prompt, tokens = delta.output.prompt_token_ids, delta.output.token_ids
                assert tokens == engine.model.continuation(prompt, len(tokens))
                ended.append(delta.output)
    assert engine.model.allocator.num_available == engine.model.num_pages
    return [output.request_id for output in ended]


def test_lower_priorities_run_first_and_those_of_one_in_the_order_of_arrival():
    engine = Engine(FakeModel(), max_num_seqs=1)
    ids = [
        engine.add_request([i], SamplingParams(max_tokens=2), priority=p)
        for i, p in enumerate([1, 0, 5, -3, 0, 1])
    ]
    assert finish_order(engine) == [ids[i] for i in (3, 1, 4, 0, 5, 2)]


def test_an_urgent_request_takes_the_place_of_a_running_one_and_gives_it_back():
    engine = Engine(FakeModel(), max_num_seqs=2)
    low = engine.add_request(PROMPT, GREEDY, priority=1)
    usual = engine.add_request([7], GREEDY)
    for _ in range(3):
        engine.step()
    preempted = engine.requests[low]
    urgent = engine.add_request([8], GREEDY, priority=-1)
    engine.step()
    assert running(engine) == [urgent, usual]
    assert preempted.preemptions == 1
    assert finish_order(engine) == [usual, urgent, low]


def test_an_urgent_request_takes_pages_from_less_urgent_ones_alone():
    engine = Engine(FakeModel(num_pages=8), enable_prefix_caching=False)
    usual = engine.add_request(PROMPT, SamplingParams(max_tokens=8))
    low = [engine.add_request(PROMPT, SamplingParams(max_tokens=8), priority=priority) for priority in (1, 2)]
    engine.step()
    requests = dict(engine.requests)
    assert running(engine) == [usual, *low]
    urgent = engine.add_request(list(range(12)), SamplingParams(max_tokens=4), priority=-1)
    engine.step()
    assert running(engine) == [urgent, usual], "the pages of one were not enough"
    assert [requests[i].preemptions for i in (usual, *low)] == [0, 1, 1]
    assert finish_order(engine) == [urgent, usual, *low]


def test_a_request_takes_nothing_from_one_of_its_own_priority():
    engine = Engine(FakeModel(num_pages=4))
    first = engine.add_request(PROMPT, SamplingParams(max_tokens=8), priority=3)
    engine.step()
    second = engine.add_request(list(range(12)), SamplingParams(max_tokens=2), priority=3)
    engine.step()
    assert running(engine) == [first]
    assert finish_order(engine) == [first, second]


def test_an_urgent_prompt_is_computed_before_the_rest_of_a_less_urgent_one():
    engine = Engine(FakeModel(), max_batch_tokens=8)
    engine.add_request(list(range(40)), GREEDY, priority=1)
    engine.step()
    urgent = engine.add_request(PROMPT, SamplingParams(max_tokens=1))
    [delta] = engine.step()
    assert delta.request_id == urgent
    assert engine.model.step_sizes == [8, 6 + 2]


def test_who_has_no_pages_left_takes_those_of_the_lowest_priority_and_not_of_the_youngest():
    engine = Engine(FakeModel(num_pages=7), enable_prefix_caching=False)
    low = engine.add_request([9] * 4, SamplingParams(max_tokens=9), priority=1)
    usual = [engine.add_request([i] * 4, SamplingParams(max_tokens=9)) for i in range(2)]
    requests = dict(engine.requests)
    assert finish_order(engine) == [*usual, low]
    assert [requests[i].preemptions > 0 for i in (low, *usual)] == [True, False, False]


def test_an_urgent_request_takes_pages_from_another_engine_also_where_it_is_younger():
    model = FakeModel(num_pages=4)
    old, young = (Engine(model, enable_prefix_caching=False) for _ in range(2))
    low = old.requests[old.add_request(PROMPT, SamplingParams(max_tokens=8), priority=1)]
    old.step()
    urgent = young.add_request(list(range(12)), SamplingParams(max_tokens=4))
    young.step()
    assert running(young) == [urgent]
    assert (running(old), low.preemptions) == ([], 1)
    finish_order_of_both = [young.step() for _ in range(3)]
    assert finish_order_of_both[-1][0].output.token_ids == model.continuation(list(range(12)), 4)
    assert finish_order(old) == [low.request_id]


def test_a_request_lets_those_of_a_lower_priority_pass_for_a_minute_and_no_longer(clock):
    """The rule that keeps a request from waiting for ever behind others that go on arriving."""
    engine = Engine(FakeModel(), max_num_seqs=1)
    late = {}
    waiting = engine.add_request([0], SamplingParams(max_tokens=1), priority=1)
    patient = engine.add_request([1], SamplingParams(max_tokens=1), priority=3)
    for seconds in (1, 59, 61, 179, 181):
        clock.now = 100.0 + seconds
        late[seconds] = engine.add_request([seconds % 50], SamplingParams(max_tokens=1))
    expected = [late[1], late[59], waiting, late[61], late[179], patient, late[181]]
    assert finish_order(engine) == expected


def test_a_request_ends_though_urgent_ones_never_stop_arriving(clock):
    engine = Engine(FakeModel(num_pages=8), max_num_seqs=2)
    waiting = engine.add_request(PROMPT, SamplingParams(max_tokens=4), priority=2)
    for i in range(100):
        clock.now += 10
        engine.add_request([i % 50, 1], SamplingParams(max_tokens=4))
        for _ in range(2):  # two of four steps that each takes: they are never through
            for delta in engine.step():
                if delta.request_id == waiting and delta.output is not None:
                    assert delta.output.token_ids == engine.model.continuation(PROMPT, 4)
                    return
    raise AssertionError("it starved")


@pytest.mark.parametrize("priority", [1.0, True, None, 2**31, "high"])
def test_what_is_no_priority_is_refused(priority):
    engine = Engine(FakeModel())
    with pytest.raises(ArgumentError, match="priority must be an int"):
        engine.add_request([1], GREEDY, priority=priority)
    assert not engine.has_unfinished


def test_extreme_priorities_keep_the_order_of_arrival():
    engine = Engine(FakeModel(), max_num_seqs=1)
    ids = [engine.add_request([i], SamplingParams(max_tokens=1), priority=2**31 - 1) for i in range(4)]
    assert finish_order(engine) == ids
