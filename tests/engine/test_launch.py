"""A step ahead: launched before the tokens of the one before are handed out. The same texts, no page left behind."""

from __future__ import annotations

import pytest
import torch

from quire.engine.core import Engine
from quire.engine.params import BeamSearchParams, SamplingParams

from .fakes import FakeModel, drain

SIX = SamplingParams(max_tokens=6)


def make_engine(**options) -> Engine:
    engine_options = {
        name: options.pop(name) for name in ("max_batch_tokens", "max_num_seqs") if name in options
    }
    return Engine(FakeModel(**{"runs_ahead": True} | options), **engine_options)


def launches(engine: Engine) -> list[bool]:
    """Notes of each forward whether its tokens came from the step before, on the device."""
    seen, forward = [], engine.model.forward

    def watched(step, input_ids=None):
        seen.append(input_ids is not None)
        return forward(step, input_ids)

    engine.model.forward = watched
    return seen


def texts(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def test_decode_steps_are_launched_with_the_tokens_of_the_step_before_and_none_too_many():
    engine = make_engine()
    seen = launches(engine)
    [output] = engine.generate([[1, 2, 3]], SIX)
    assert output.token_ids == engine.model.continuation([1, 2, 3], 6)
    assert seen == [False, *[True] * 5]
    assert engine.stats.steps == 6
    assert engine.stats.generated_tokens == 6


def test_each_call_of_step_hands_out_one_token_of_each_request():
    engine = make_engine()
    ids = [engine.add_request(prompt, SIX) for prompt in ([1, 2, 3], [4])]
    for _ in range(6):
        assert sorted(delta.request_id for delta in engine.step()) == ids
    assert not engine.has_unfinished
    assert engine.step() == []
    assert engine.model.allocator.num_owned == 0


def test_a_text_that_a_stop_token_ends_has_no_surplus_token():
    plain = FakeModel().continuation([5, 6], 10)
    stop = plain[4]
    engine = make_engine()
    [output] = engine.generate([[5, 6]], SamplingParams(max_tokens=10, stop_token_ids=[stop]))
    assert output.token_ids == plain[: plain.index(stop) + 1]
    assert output.finish_reason == "stop"
    assert engine.model.allocator.num_owned == 0
    assert engine._ahead is None, "what nobody needs is not kept"


@pytest.mark.parametrize("num_pages", [12, 64])
def test_texts_are_those_of_each_alone_whatever_ends_when(num_pages):
    """Ends by length and by stop tokens, at all times, also under preemption and with arrivals in between."""
    engine = make_engine(num_pages=num_pages, max_num_seqs=5)
    prompts = [[n, n + 1, n + 2][: 1 + n % 3] for n in range(20)]
    params = [
        SamplingParams(max_tokens=3 + 5 * n % 11, stop_token_ids=[n, 2 * n % 50]) for n in range(len(prompts))
    ]
    wanted = []
    for prompt, each in zip(prompts, params, strict=True):
        text = engine.model.continuation(prompt, each.max_tokens)
        stops = [place for place, token in enumerate(text) if token in each.stop_token_ids]
        wanted.append(text[: stops[0] + 1] if stops else text)
    ids = []
    outputs = {}
    for n, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        ids.append(engine.add_request(prompt, each))
        for _ in range(n % 3):
            outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    outputs |= drain(engine)
    assert texts(outputs[i] for i in ids) == wanted
    assert engine.model.allocator.num_owned == 0


def test_draws_are_those_of_a_model_that_does_not_run_ahead():
    params = SamplingParams(max_tokens=8, temperature=1.3, top_p=0.9, top_k=30, seed=11, n=3)
    prompts = [[1, 2, 3], [9], [4, 4]]
    here, there = (
        Engine(FakeModel(runs_ahead=ahead, num_pages=14)).generate(prompts, params) for ahead in (True, False)
    )
    assert [[o.token_ids for o in one.outputs] for one in here] == [
        [o.token_ids for o in one.outputs] for one in there
    ]


@pytest.mark.parametrize("written", [True, False])
def test_a_launch_ahead_that_fails_loses_no_token_and_draws_the_same_again(written):
    params = SamplingParams(max_tokens=8, temperature=1.3, seed=5)
    wanted = Engine(FakeModel()).generate([[1, 2]], params)[0].token_ids
    engine = make_engine()
    request_id = engine.add_request([1, 2], params)
    forward, count = engine.model.forward, []

    def failing(*step):
        count.append(1)
        if len(count) in (3, 6):
            if written:
                forward(*step)
            raise RuntimeError("the device is gone")
        return forward(*step)

    engine.model.forward = failing
    tokens, failures = [], 0
    while engine.has_unfinished:
        try:
            tokens += [token for delta in engine.step() for token in delta.token_ids]
        except RuntimeError:
            failures += 1
            assert engine.table.seq_ids == []
    assert (tokens, failures) == (wanted, 2)
    assert request_id not in engine.requests


def test_an_abort_between_steps_drops_what_is_on_its_way():
    engine = make_engine()
    first, second = (engine.add_request(prompt, SIX) for prompt in ([1, 2, 3], [4]))
    engine.step()
    engine.step()
    assert engine.abort(first)
    output = drain(engine)[second]
    assert output.token_ids == engine.model.continuation([4], 6)
    assert engine.model.allocator.num_owned == 0


def test_a_request_that_arrives_joins_the_step_after_the_next():
    engine = make_engine()
    seen = launches(engine)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=20))
    engine.step()
    engine.step()
    late = engine.add_request([7, 8], SIX)
    got = []
    while not got:
        got = [delta for delta in engine.step() if delta.request_id == late]
        assert len(seen) < 7
    assert drain(engine)[late].token_ids == engine.model.continuation([7, 8], 6)


def test_requests_that_wait_for_room_do_not_stop_it_and_are_let_in_when_there_is_some():
    engine = make_engine(max_num_seqs=2)
    seen = launches(engine)
    ids = [engine.add_request([n], SamplingParams(max_tokens=5 + n)) for n in range(5)]
    outputs = drain(engine)
    assert texts(outputs[i] for i in ids) == [engine.model.continuation([n], 5 + n) for n in range(5)]
    assert sum(seen) > len(seen) / 2


def test_a_request_that_waits_for_tokens_of_the_budget_alone_is_let_in_by_the_next_step():
    """Steps ahead would go on for ever with those that run."""
    engine = make_engine(max_batch_tokens=8)
    ids = [engine.add_request([n] * 8, SamplingParams(max_tokens=30)) for n in range(3)]
    for _ in range(6):
        engine.step()
    assert [request.request_id for request in engine._scheduler.running] == ids
    outputs = drain(engine)
    assert texts(outputs[i] for i in ids) == [engine.model.continuation([n] * 8, 30) for n in range(3)]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=6, logprobs=1),
        SamplingParams(max_tokens=6, presence_penalty=0.5),
        SamplingParams(max_tokens=6, logits_processors=[lambda tokens, logits: logits]),
        BeamSearchParams(beam_width=2, max_tokens=6),
    ],
)
def test_tokens_that_the_host_must_see_first_are_waited_for(params):
    engine = make_engine()
    seen = launches(engine)
    engine.add_request([1, 2, 3], params)
    drain(engine)
    assert not any(seen)


def test_two_engines_on_one_model_each_a_step_ahead_take_pages_from_one_another():
    model = FakeModel(runs_ahead=True, num_pages=8)
    engines = [Engine(model), Engine(model)]
    params = SamplingParams(max_tokens=9)
    ids = [(engine, engine.add_request([n, n], params), n) for n in range(4) for engine in engines]
    outputs = {}
    for _ in range(200):
        for engine in engines:
            outputs |= {(engine, d.request_id): d.output for d in engine.step() if d.output is not None}
    for engine, request_id, n in ids:
        assert outputs[engine, request_id].token_ids == model.continuation([n, n], 9)
    assert model.allocator.num_owned == 0


def test_ties_and_devices_aside_a_tensor_of_tokens_is_what_is_handed_on():
    engine = make_engine()
    tokens = []
    forward = engine.model.forward

    def watched(step, input_ids=None):
        if input_ids is not None:
            assert isinstance(input_ids, torch.Tensor)
            assert step.input_ids.tolist() == [0] * len(input_ids), "the host does not know them"
            tokens.append(input_ids.tolist())
        return forward(step, input_ids)

    engine.model.forward = watched
    outputs = engine.generate([[1, 2, 3], [4]], [SIX, SamplingParams(max_tokens=4)])
    first, second = texts(outputs)
    assert tokens == [*map(list, zip(first[:3], second[:3], strict=True)), [first[3]], [first[4]]]
