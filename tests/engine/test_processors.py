"""A caller's functions over logits, inside the engine: whom they change, and whom they end."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError, UnsupportedError

from .fakes import EOS, FakeModel, byte_tokenizer, fork

PROMPTS = [[i, i + 1, i + 2] for i in range(4)]
PLAIN = SamplingParams(max_tokens=6)


def fails_at(count: int, error: BaseException):
    def processor(token_ids, logits):
        if len(token_ids) == count:
            logits.fill_(torch.inf)
            raise error
        return logits

    return processor


def processed(*processors, **params) -> SamplingParams:
    return SamplingParams(logits_processors=processors, max_tokens=6, **params)


def steps(engine: Engine) -> tuple[dict[int, list[int]], list[Exception]]:
    """Step until nothing is left: each request's tokens, and what steps raised."""
    tokens: dict[int, list[int]] = {}
    errors = []
    while engine.has_unfinished:
        try:
            for delta in engine.step():
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        except Exception as error:
            errors.append(error)
    return tokens, errors


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize(
    "others", [PLAIN, SamplingParams(temperature=1.0, seed=1, logit_bias={3: 1.0}, max_tokens=6)]
)
def test_a_processor_that_fails_ends_its_request_alone_with_its_error(count, others):
    model = FakeModel()
    expected = [Engine(model).generate(prompt, others)[0].token_ids for prompt in PROMPTS]
    engine = Engine(model)
    error = RuntimeError("my own")
    ids = [
        engine.add_request(prompt, processed(fails_at(count, error)) if i == 1 else others)
        for i, prompt in enumerate(PROMPTS)
    ]
    tokens, errors = steps(engine)
    assert errors == [error]
    assert [tokens[i] for i in (ids[0], *ids[2:])] == [expected[0], *expected[2:]]
    assert len(tokens.get(ids[1], [])) == count
    assert model.allocator.num_available == model.num_pages


def test_rules_that_leave_no_token_end_their_request_alone():
    engine = Engine(FakeModel(eos_token_ids=(7,)))
    bad = engine.add_request([1], SamplingParams(allowed_token_ids=[7], min_tokens=1))
    good = engine.add_request([2], PLAIN)
    tokens, [error] = steps(engine)
    assert isinstance(error, ArgumentError)
    assert "must leave a token to choose; got none after 0 generated tokens" in str(error)
    assert tokens == {bad: [], good: engine.model.continuation([2], 6)}


def test_the_failure_is_raised_to_the_caller_of_the_request_and_to_nobody_else():
    model = FakeModel()
    engine = Engine(model)
    outputs = {}

    def ask_well():
        outputs["good"] = engine.generate(PROMPTS[0], SamplingParams(max_tokens=40))[0].token_ids

    well = threading.Thread(target=ask_well)
    well.start()
    with pytest.raises(RuntimeError, match="my own"):
        engine.generate(PROMPTS[1], processed(fails_at(2, RuntimeError("my own"))))
    well.join()
    assert outputs["good"] == model.continuation(PROMPTS[0], 40)
    assert model.allocator.num_available == model.num_pages


def test_a_failing_sequence_ends_all_of_its_request_and_nobody_else():
    engine = Engine(FakeModel())
    forked = engine.add_request([1, 2, 3], processed(fails_at(2, RuntimeError("my own"))))
    other = engine.add_request([4, 5], PLAIN)
    engine.step()
    fork(engine, forked, 9)
    tokens, errors = steps(engine)
    assert [str(error) for error in errors] == ["my own"]
    assert tokens[other] == engine.model.continuation([4, 5], 6)[1:]
    assert engine.table.allocator.num_available == engine.model.num_pages


def test_an_interrupted_processor_loses_no_request():
    interruptions = [KeyboardInterrupt()]

    def interrupted(token_ids, logits):
        if len(token_ids) == 2 and interruptions:
            raise interruptions.pop()
        return logits

    engine = Engine(FakeModel())
    ids = [engine.add_request(PROMPTS[0], processed(interrupted)), engine.add_request(PROMPTS[1], PLAIN)]
    engine.step()
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    tokens, errors = steps(engine)
    assert errors == []
    for request_id, prompt in zip(ids, PROMPTS, strict=False):
        assert tokens[request_id] == engine.model.continuation(prompt, 6)[2:]


def test_a_processor_may_abort_its_own_request_but_not_wait_for_the_engine():
    engine = Engine(FakeModel())
    calls = []

    def aborts(token_ids, logits):
        if len(token_ids) == 2:
            calls.append(engine.abort(aborted))
        return logits

    def asks(token_ids, logits):
        engine.generate([1], PLAIN)
        return logits

    aborted = engine.add_request([1, 2], processed(aborts))
    engine.add_request([3, 4], processed(asks))
    other = engine.add_request([5], PLAIN)
    tokens, [error] = steps(engine)
    assert isinstance(error, UnsupportedError)
    assert calls == [True]
    assert aborted not in engine.requests
    assert tokens[other] == engine.model.continuation([5], 6)
    assert engine.table.allocator.num_available == engine.model.num_pages


@pytest.mark.parametrize(("num_pages", "preempted"), [(64, False), (8, True)])
def test_a_processor_sees_the_tokens_that_were_generated_so_far_also_after_preemption(num_pages, preempted):
    seen = {}

    def watching(name):
        def processor(prompt, token_ids, logits):
            seen.setdefault(name, []).append((list(prompt), list(token_ids)))
            return logits

        return processor

    engine = Engine(FakeModel(num_pages=num_pages))
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, SamplingParams(max_tokens=20, logits_processors=[watching(i)]))
    deltas = []
    while engine.has_unfinished:
        deltas += engine.step()
    assert any(delta.output.preemptions for delta in deltas if delta.output) == preempted
    for i, prompt in enumerate(PROMPTS):
        tokens = engine.model.continuation(prompt, 20)
        assert seen[i] == [(prompt, tokens[:count]) for count in range(20)]


class OneNumber:
    """Forces {"size": N} with one to three digits: a small grammar, as a grammar library would hand out its masks.

    The text so far decides what may come, so that a step may ask twice.
    """

    BEGIN, END = '{"size": ', "}"

    def allowed(self, text: str) -> list[int]:
        if len(text) < len(self.BEGIN):
            return [ord(self.BEGIN[len(text)])]
        digits = text[len(self.BEGIN) :]
        if digits.endswith(self.END):
            return [EOS]
        may_end = [ord(self.END)] if digits else []
        more = list(b"123456789") if not digits else list(b"0123456789") if len(digits) < 3 else []
        return may_end + more

    def __call__(self, token_ids, logits):
        mask = torch.full_like(logits, -torch.inf)
        mask[self.allowed(bytes(token_ids).decode())] = 0
        return logits + mask


def test_a_grammar_by_hand_makes_every_text_json_of_its_schema_and_leaves_others_alone():
    model = FakeModel(vocab_size=257, eos_token_ids=(EOS,), num_pages=200)
    engine = Engine(model, byte_tokenizer())
    grammar = [
        SamplingParams(temperature=2.0 * (seed > 0), seed=seed, logits_processors=[OneNumber()])
        for seed in range(12)
    ]
    plain = SamplingParams(temperature=1.0, seed=5, max_tokens=8)
    alone = engine.generate("free", plain)[0].token_ids
    *texts, free = engine.generate(["size: "] * 12 + ["free"], [*grammar, plain])
    assert free.token_ids == alone
    for output in texts:
        assert re.fullmatch(r'\{"size": [1-9][0-9]{0,2}\}', output.text)
        assert isinstance(json.loads(output.text)["size"], int)
        assert output.finish_reason == "stop"
    assert len({output.text for output in texts}) > 6, "the grammar was meant to leave a choice"
