"""One engine, many threads: one batch, everyone's own tokens, and nobody hangs."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.engine.request import Request

from .fakes import FakeModel

NUM_THREADS = 8
HANGS = 60  # seconds after which a thread is taken for hanging; none comes near it
GREEDY = SamplingParams(max_tokens=12)


@pytest.fixture(autouse=True)
def _threads_change_places_often_and_wait_for_one_another_alone(monkeypatch):
    monkeypatch.setattr("quire.engine.core.SILENCE", 10 * HANGS)  # a sleeper whom nobody wakes hangs
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@contextmanager
def running(*calls: Callable[[], object]) -> Iterator[list[threading.Thread]]:
    """Calls in threads of their own, all of them back when the block ends; what one raises is raised here."""
    failures: list[BaseException] = []

    def caught(call):
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caught, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(HANGS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]


class Gate:
    """Stops a model's forward at a chosen step until it is opened."""

    def __init__(self, model: FakeModel, at: int = 1) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self._forward, self._left = model.forward, at
        model.forward = self._stopping

    def _stopping(self, step):
        self._left -= 1
        if self._left == 0:
            self.reached.set()
            assert self.opened.wait(HANGS)
        return self._forward(step)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    pause = threading.Event()
    for _ in range(HANGS * 1000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it never came")


def all_pages_are_free(engine: Engine) -> bool:
    return engine.model.allocator.num_available == engine.model.num_pages


def tokens_of(deltas: Sequence) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("num_pages", [64, 9])
@pytest.mark.parametrize("drawn", [False, True])
def test_fifty_calls_of_eight_threads_give_the_tokens_of_one_call_at_a_time(num_pages, drawn):
    def params(i):
        draw = {"temperature": 1.0, "top_k": 20, "seed": i} if drawn else {}
        return SamplingParams(max_tokens=1 + i % 14, **draw)

    def ask(engine, i):
        prompt = [i % 7, i, 3, *range(i % 5)]
        if i % 2:
            return engine.generate(prompt, params(i))[0].token_ids
        return tokens_of(engine.stream(prompt, params(i)))

    alone = Engine(FakeModel())
    expected = [ask(alone, i) for i in range(50)]
    engine = Engine(FakeModel(num_pages=num_pages), max_batch_tokens=16, max_num_seqs=6)
    got, left = [None] * 50, iter(range(50))

    def work():
        for i in left:
            got[i] = ask(engine, i)

    with running(*[work] * NUM_THREADS):
        pass
    assert got == expected
    assert all_pages_are_free(engine)
    assert not engine.has_unfinished
    if num_pages == 64:
        assert engine.stats.steps < alone.stats.steps / 2, "the threads did not share steps"


def test_requests_that_arrive_during_a_step_join_the_next_one():
    model = FakeModel()
    engine = Engine(model)
    gate = Gate(model)
    outputs = {}

    def ask(i):
        outputs[i] = engine.generate([i, 1], GREEDY)

    with running(lambda: ask(0)):
        assert gate.reached.wait(HANGS)
        with running(lambda: ask(1), lambda: ask(2)):
            until(lambda: len(engine.requests) == 3)
            gate.opened.set()
    assert model.step_sizes[:2] == [2, 1 + 2 + 2]
    assert [outputs[i][0].token_ids for i in range(3)] == [model.continuation([i, 1], 12) for i in range(3)]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_a_thread_that_fails_in_its_step_leaves_the_others_their_tokens(interruption):
    model = FakeModel()
    engine = Engine(model)
    gate = Gate(model, at=3)
    failing = []

    def fails():
        failing.append(threading.get_ident())
        with pytest.raises(interruption):
            engine.generate([9, 9], GREEDY)
        until(lambda: 0 not in engine.requests)  # at once, or after the step that another thread has begun

    outputs = {}
    with running(fails):
        assert gate.reached.wait(HANGS)  # so that it is this thread that runs the steps
        others = [
            lambda i=i: outputs.update({i: engine.generate([i, 1], GREEDY)[0].token_ids}) for i in range(3)
        ]
        with running(*others):
            until(lambda: len(engine.requests) == 4)
            forward = model.forward

            def forward_of(step):
                if threading.get_ident() in failing:
                    raise interruption
                return forward(step)

            model.forward = forward_of
            gate.opened.set()
    assert [outputs[i] for i in range(3)] == [model.continuation([i, 1], 12) for i in range(3)]
    assert all_pages_are_free(engine)


def test_what_fails_for_one_request_is_raised_to_its_caller_and_to_nobody_else():
    model = FakeModel()
    engine = Engine(model)
    gate = Gate(model)
    outputs = {}

    def fails():
        with pytest.raises(ValueError, match="no text"):
            engine.generate([[1, 2], [3, 4]], GREEDY)

    def failing_token(token):
        raise ValueError("no text")

    with running(lambda: outputs.update(good=engine.generate([7, 8], GREEDY))):
        assert gate.reached.wait(HANGS)  # the good one's thread runs the steps
        with running(fails):
            until(lambda: len(engine.requests) == 3)
            engine.requests[2].sequences[0].accept = failing_token
            gate.opened.set()
    assert outputs["good"][0].token_ids == model.continuation([7, 8], 12)
    assert all_pages_are_free(engine)
    assert not engine.has_unfinished


def test_a_stream_whose_reader_is_slow_holds_up_nobody_and_loses_nothing():
    model = FakeModel()
    engine = Engine(model)
    stream = engine.stream([1, 2], GREEDY)
    first = next(stream)
    outputs = []
    with running(lambda: outputs.append(engine.generate([[3], [4, 5]], GREEDY))):
        pass  # nobody reads the stream meanwhile
    assert [output.token_ids for output in outputs[0]] == [model.continuation(p, 12) for p in ([3], [4, 5])]
    [rest] = stream  # the steps of the other thread served it, too
    assert first.token_ids + rest.token_ids == model.continuation([1, 2], 12)


def test_a_stream_closed_while_another_thread_steps_is_ended_after_that_step():
    model = FakeModel()
    engine = Engine(model)
    stream = engine.stream([1, 2], GREEDY)
    next(stream)
    gate = Gate(model)
    outputs = []
    with running(lambda: outputs.append(engine.generate([3], GREEDY))):
        assert gate.reached.wait(HANGS)
        stream.close()  # does not wait for the step
        assert len(engine.requests) == 2
        gate.opened.set()
        until(lambda: 0 not in engine.requests)
    assert outputs[0][0].token_ids == model.continuation([3], 12)
    assert all_pages_are_free(engine)


def test_requests_of_step_and_abort_by_hand_stand_beside_those_of_other_threads():
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=16)
    outputs, by_hand = {}, {}

    def steps():
        kept = engine.add_request([5, 6, 7], GREEDY)
        dropped = engine.add_request([8, 9], GREEDY)
        by_hand[kept] = []
        while kept in engine.requests or engine.has_unfinished:
            for delta in engine.step():
                if delta.request_id in by_hand:
                    by_hand[delta.request_id].append(delta)
                else:
                    assert delta.request_id == dropped, "a delta of another caller's request"
            if len(by_hand[kept]) == 3:
                engine.abort(dropped)

    def asks(i):
        for _ in range(4):
            [output] = engine.generate([i, 1], GREEDY)
            outputs.setdefault(i, []).append(output.token_ids)

    with running(steps, lambda: asks(0), lambda: asks(1)):
        pass
    for i in range(2):
        assert outputs[i] == [model.continuation([i, 1], 12)] * 4
    [deltas] = by_hand.values()
    assert tokens_of(deltas) == deltas[-1].output.token_ids == model.continuation([5, 6, 7], 12)
    assert all_pages_are_free(engine)


def test_a_request_that_another_thread_aborts_comes_back_as_aborted():
    model = FakeModel()
    engine = Engine(model)
    gate = Gate(model, at=3)
    outputs = []
    with running(lambda: outputs.extend(engine.generate([[1], [2]], GREEDY))):
        assert gate.reached.wait(HANGS)
        with running(lambda: engine.abort(1)):
            gate.opened.set()
    assert outputs[0].token_ids == model.continuation([1], 12)
    assert outputs[1].finish_reason == "abort"
    assert outputs[1].token_ids == model.continuation([2], 12)[: len(outputs[1].token_ids)]


def test_an_abort_from_within_a_step_takes_effect_after_it():
    model = FakeModel()
    engine = Engine(model)
    forward = model.forward

    def aborting(step):
        logits = forward(step)
        assert engine.abort(1)
        return logits

    model.forward = aborting
    kept, dropped = engine.generate([[1], [2]], SamplingParams(max_tokens=1)), None
    assert [output.finish_reason for output in kept] == ["length", "length"]  # the step was the last of both
    model.forward = forward
    dropped = engine.add_request([3], GREEDY)
    model.forward = lambda step: (engine.abort(dropped), forward(step))[1]
    engine.step()
    assert not engine.has_unfinished
    assert all_pages_are_free(engine)


def test_streams_that_the_collector_drops_in_the_middle_of_a_step_are_ended_after_it():
    model = FakeModel(num_pages=16)
    engine = Engine(model)
    stream = engine.stream([1, 2], GREEDY)
    next(stream)
    circle = [stream]
    circle.append(circle)
    del stream, circle
    pages_of = engine.model.allocator.allocate

    def collecting(n, **options):
        gc.collect()
        return pages_of(n, **options)

    engine.model.allocator.allocate = collecting
    try:
        [output] = engine.generate([3, 4, 5, 6], GREEDY)
    finally:
        del engine.model.allocator.allocate
    assert output.token_ids == model.continuation([3, 4, 5, 6], 12)
    assert all_pages_are_free(engine)
    assert not engine.has_unfinished


def test_a_thread_sleeps_until_its_own_requests_have_news():
    engine = Engine(FakeModel(num_pages=200))
    gate, sleep, sleeps = Gate(engine.model), engine._sleep, []

    def counted(reader):
        sleeps.append(threading.current_thread().name)
        sleep(reader)

    engine._sleep = counted
    long = SamplingParams(max_tokens=60)
    streamed = []
    whole = [lambda i=i: engine.generate([i], long) for i in range(6)]
    with running(lambda: streamed.extend(engine.stream([9], long)), *whole) as threads:
        assert gate.reached.wait(HANGS)
        until(lambda: len(engine.requests) == 7)
        gate.opened.set()
    assert tokens_of(streamed) == engine.model.continuation([9], 60)
    for thread in threads[
        1:
    ]:  # once for its news, and now and then to run the steps after someone who has left
        assert sleeps.count(thread.name) <= 8, "it was woken for tokens of others"


@pytest.mark.parametrize("progress", [False, True])
def test_waiting_for_many_requests_costs_what_they_gain_and_not_how_many_they_are(progress, monkeypatch):
    looks = []
    finished = Request.finished.fget
    monkeypatch.setattr(
        Request, "finished", property(lambda request: (looks.append(1), finished(request))[1])
    )
    for count in (20, 200):
        engine = Engine(FakeModel(), max_num_seqs=2)
        looks.clear()
        engine.generate([[i % 50] for i in range(count)], SamplingParams(max_tokens=4), progress=progress)
        assert len(looks) < 5 * 4 * count


def test_the_progress_of_a_call_counts_its_own_tokens_only(monkeypatch):
    engine = Engine(FakeModel())
    counted = []

    @contextmanager
    def bar(num_requests, *, shown):
        yield (lambda deltas: counted.extend(deltas)) if shown else None

    monkeypatch.setattr("quire.engine.core.progress_bar", bar)
    stream = engine.stream([9, 9], GREEDY)
    next(stream)
    outputs = engine.generate([[1], [2]], GREEDY, progress=True)
    assert {delta.request_id for delta in counted} == {output.request_id for output in outputs}
    assert len(tokens_of(counted)) == 24


def test_threads_and_engines_that_share_a_small_pool_get_their_own_tokens_also_while_others_reset():
    model = FakeModel(num_pages=14, page_size=4)
    engines = [Engine(model, max_batch_tokens=12, max_num_seqs=3) for _ in range(2)]
    prompts = [[*range(n % 11), *[40 + n % 3] * (1 + n % 4)] for n in range(40)]
    got, left = {}, iter(range(40))

    def work():
        for i in left:
            if i % 10 == 5:
                engines[i % 2].reset_prefix_cache()
            got[i] = engines[i % 2].generate(prompts[i], SamplingParams(max_tokens=6))[0].token_ids

    with running(*[work] * 4):
        pass
    assert got == {i: model.continuation(prompt, 6) for i, prompt in enumerate(prompts)}
    assert model.allocator.num_available == model.num_pages
    assert sum(engine.stats.cached_tokens for engine in engines) > 0
