"""Ctrl-C at a chosen place: no lock stays held, no token is lost or doubled, and everyone else goes on."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import sys
import threading
from contextlib import suppress
from functools import partial

import pytest

from quire.engine import AsyncLLM, core, scheduler, turns
from quire.engine.core import Engine
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.engine.request import Request
from quire.errors import QuireError
from quire.pages import table

from .fakes import FakeModel, byte_tokenizer, scripted
from .interrupting import interrupted

HANGS = 60  # seconds after which a thread is taken for hanging; none comes near it


def run_on(engine: Engine, errors: type[BaseException] | tuple = ()) -> tuple[dict, list[BaseException]]:
    """Step until nothing is left: the outputs, and what was raised on the way."""
    outputs, raised = {}, []
    while engine.has_unfinished:
        try:
            outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output}
        except errors as error:
            raised.append(error)
    return outputs, raised


class InterruptedDecoder:
    """Decodes a token, and is interrupted before it can return its text."""

    def __init__(self, stream) -> None:
        self._stream = stream

    def step(self, tokenizer, token):
        self._stream.step(tokenizer, token)
        raise KeyboardInterrupt


class InterruptedLookup(frozenset):
    def __contains__(self, token):
        raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["the text", "the stop tokens"])
def test_a_request_interrupted_while_it_gets_a_token_ends_with_an_error_and_the_others_get_theirs(at):
    rule = scripted(257, 3, list(b"abcdefgh"))
    engine = Engine(FakeModel(vocab_size=257, rule=rule), byte_tokenizer())
    first, interrupted, last = [engine.add_request([0, 0, 0], SamplingParams(max_tokens=8)) for _ in range(3)]
    engine.step()
    [sequence] = engine.requests[interrupted].sequences
    if at == "the text":
        sequence._text._stream = InterruptedDecoder(sequence._text._stream)
    else:
        sequence._stop_token_ids = InterruptedLookup()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(
        QuireError, match=f"request {interrupted} must get its tokens whole; got KeyboardInterr"
    ):
        engine.step()
    outputs, _ = run_on(engine)
    assert {outputs[i].text for i in (first, last)} == {"abcdefgh"}
    assert outputs[interrupted].finish_reason == "abort"
    assert engine.model.allocator.num_available == engine.model.num_pages


def test_a_seed_gives_the_same_tokens_also_after_a_step_that_broke_off_once_it_had_drawn(monkeypatch):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=8)
    [expected] = Engine(FakeModel()).generate([1, 2, 3], params)
    engine, sample, calls = Engine(FakeModel()), core.sample, []

    def interrupted_sample(*args):
        tokens = sample(*args)
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tokens

    monkeypatch.setattr(core, "sample", interrupted_sample)
    request_id = engine.add_request([1, 2, 3], params)
    outputs, raised = run_on(engine, KeyboardInterrupt)
    assert len(raised) == 1
    assert outputs[request_id].token_ids == expected.token_ids


class InterruptedQueue(list):
    """Running requests; the first one to be taken from it is not, as Ctrl-C comes before."""

    left = 1

    def pop(self, *args):
        if self.left:
            self.left -= 1
            raise KeyboardInterrupt
        return super().pop(*args)


def test_an_interruption_while_a_request_is_preempted_does_not_lose_or_double_it():
    engine = Engine(FakeModel())
    request_id = engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))
    engine.step()
    scheduler = engine._scheduler
    scheduler.running = InterruptedQueue(scheduler.running)
    with pytest.raises(KeyboardInterrupt):
        scheduler.preempt_last()
    scheduler.preempt_all()
    assert [request.request_id for request in scheduler.waiting] == [request_id]
    outputs, _ = run_on(engine)
    assert outputs[request_id].token_ids == engine.model.continuation([1, 2, 3], 4)


def test_an_interruption_anywhere_between_the_queues_loses_and_doubles_no_request():
    """Samples begin, give their pages up and begin again in a pool too small for all, and one request is urgent."""
    params = SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=4)
    greedy = SamplingParams(max_tokens=3)
    expected = FakeModel().samples([1, 2, 3, 4, 5], params)
    functions = {"_let_in", "preempt_last", "_free", "_fork"}
    reached = set()
    for at in itertools.count(1):
        engine = Engine(FakeModel(num_pages=4), enable_prefix_caching=False)
        first, samples = engine.add_request([9, 9], greedy), engine.add_request([1, 2, 3, 4, 5], params)
        outputs, urgent = {}, None
        with interrupted(functions, at, scheduler) as lines:
            for step in range(60):
                if step == 5:
                    urgent = engine.add_request([7, 7, 7], greedy, priority=-1)
                if not engine.has_unfinished:
                    break
                with suppress(KeyboardInterrupt):
                    outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output}
        reached |= set(lines)
        assert outputs[first].token_ids == engine.model.continuation([9, 9], 3)
        assert outputs[urgent].token_ids == engine.model.continuation([7, 7, 7], 3)
        drawn = [completion.token_ids for completion in outputs[samples].outputs]
        assert drawn == expected
        assert engine.model.allocator.num_available == 4
        assert not engine.has_unfinished
        if len(lines) < at:
            assert outputs[samples].preemptions > 0, "without an interruption"
            break
    assert reached == functions


def test_an_interruption_while_another_engine_takes_pages_leaves_them_in_order():
    for at in itertools.count(1):
        model = FakeModel(num_pages=6)
        old, young = Engine(model, enable_prefix_caching=False), Engine(model, enable_prefix_caching=False)
        first = old.add_request([1] * 21, SamplingParams(max_tokens=3))
        second = young.add_request([2, 3], SamplingParams(max_tokens=8))
        young.step()
        with interrupted({"preempt_last", "_free"}, at, scheduler) as lines:
            for _ in range(2):
                with suppress(KeyboardInterrupt):
                    old.step()
        outputs = run_on(old)[0] | {("young", i): output for i, output in run_on(young)[0].items()}
        assert outputs["young", second].token_ids == model.continuation([2, 3], 8)
        assert outputs[first].token_ids == model.continuation([1] * 21, 3)
        assert model.allocator.num_available == 6
        if len(lines) < at:
            assert outputs["young", second].preemptions > 0, "without an interruption"
            break


@pytest.mark.parametrize(
    ("how", "params"),
    [
        ("abort", SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=50)),
        ("abort", BeamSearchParams(beam_width=2, max_tokens=50)),
        ("closed stream", SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=50)),
    ],
    ids=["abort", "abort of beams", "closed stream"],
)
@pytest.mark.parametrize(
    ("module", "functions"),
    [(core, {"_end", "<listcomp>"}), (table, {"free", "_let_go"})],
    ids=["engine", "pages"],
)
def test_an_interruption_anywhere_in_the_end_of_a_request_ends_it_all_the_same(
    how, params, module, functions
):
    """Its pages come back, it is not live any more, and the others get their tokens."""
    for at in itertools.count(1):
        engine = Engine(FakeModel(num_pages=40), enable_prefix_caching=False)
        other = engine.add_request([9, 9], SamplingParams(max_tokens=9))
        if how == "closed stream":
            stream = engine.stream([1, 2, 3], params)
            next(stream)
            end = stream.close
        else:
            end = partial(engine.abort, engine.add_request([1, 2, 3], params))
            engine.step(), engine.step()
        with interrupted(functions, at, module) as lines, suppress(KeyboardInterrupt):
            end()
        outputs, _ = run_on(engine)
        assert outputs[other].token_ids == engine.model.continuation([9, 9], 9), f"after line {at}"
        assert engine.stats.steps < 15, "the request that was to end went on"
        assert not engine.requests
        assert engine.model.allocator.num_available == 40
        if len(lines) < at:
            break
    assert at > 5


def test_a_driver_that_is_gone_without_saying_so_is_replaced():
    engine = Engine(FakeModel())
    gone = threading.Thread(target=lambda: setattr(engine, "_driver", threading.get_ident()))
    gone.start()
    gone.join()
    outputs = []
    asks = threading.Thread(
        target=lambda: outputs.extend(engine.generate([1], SamplingParams(max_tokens=2))), daemon=True
    )
    asks.start()
    asks.join(HANGS)
    assert [output.token_ids for output in outputs] == [engine.model.continuation([1], 2)]


@pytest.mark.parametrize("how", ["generate", "stream", "coroutine"])
def test_a_request_that_was_not_told_to_have_finished_is_seen_to_have(how, monkeypatch):
    """As Ctrl-C may come before the thread that runs the steps has told another one's reader."""
    monkeypatch.setattr(core, "SILENCE", 0.01)
    engine = Engine(FakeModel())
    tell, lost = Request.tell, []

    def tells(request):
        if request.prompt == "lost" and request.finished and not lost:
            lost.append(request)
        else:
            tell(request)

    monkeypatch.setattr(Request, "tell", tells)
    make = engine._intake.make_requests

    def makes(prompts, *args):
        requests = make(prompts, *args)
        for request in requests:
            request.prompt = "lost" if prompts == [[1]] else None
        return requests

    engine._intake.make_requests = makes
    got = {}

    def asks():
        params = SamplingParams(max_tokens=3)
        if how == "generate":
            got["tokens"] = engine.generate([1], params)[0].token_ids
        elif how == "stream":
            got["tokens"] = [token for delta in engine.stream([1], params) for token in delta.token_ids]
        else:
            got["tokens"] = asyncio.run(_awaited(AsyncLLM(engine).generate([1], params))).token_ids

    thread = threading.Thread(target=asks, daemon=True)
    thread.start()
    engine.generate([[2]] * 3, SamplingParams(max_tokens=20))
    thread.join(HANGS)
    assert lost
    assert got["tokens"] == engine.model.continuation([1], 3)


async def _awaited(answer):
    return await answer


def held(lock) -> bool:
    """Whether another thread cannot have a lock."""
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(blocking=False) and not lock.release()))
    thread.start()
    thread.join()
    return not got[0]


def interrupt_turn(engine: Engine, at: int) -> list[int]:
    """Run a turn that is interrupted before the at-th line of its module; returns the lines that were reached."""
    source, lines = inspect.getsource(turns).splitlines(), []

    def trace(frame, event, _):
        if frame.f_code.co_filename != turns.__file__:
            return None
        # Python looks for signals after calls: not before a line that begins or ends a `with` or begins a `try`.
        if event == "line" and not source[frame.f_lineno - 1].lstrip().startswith(("with ", "try:")):
            lines.append(frame.f_lineno)
            if len(lines) == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        engine._turns.run(lambda: None, engine._scheduler)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def test_an_interruption_before_any_line_of_a_turn_leaves_the_lock_free_and_the_next_turn_works():
    for at in itertools.count(1):
        engine = Engine(FakeModel())
        lines = interrupt_turn(engine, at)
        assert not held(engine.model.lock), f"held after an interruption at line {lines[-1]}"
        assert not engine._turns.in_turn
        [output] = engine.generate([1], SamplingParams(max_tokens=2))
        assert output.token_ids == engine.model.continuation([1], 2)
        if len(lines) < at:
            break
    assert at > 10
