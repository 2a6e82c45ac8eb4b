"""Several samples of one prompt: each is what a request of its own would draw; their common pages are stored once."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.engine.request import RequestOutput
from quire.errors import ArgumentError
from quire.spec import Visibility

from .fakes import FakeModel, byte_tokenizer

PROMPT = [1, 2, 3, 4, 5, 6]
DRAWN = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=14)


def serve(engine: Engine) -> dict[int, RequestOutput]:
    """Step until nothing is left; the outputs by request id."""
    outputs = {}
    while engine.has_unfinished:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    assert engine.model.allocator.num_available == engine.model.num_pages
    return outputs


def alone(model: FakeModel, prompt: list[int], params: SamplingParams, tokenizer=None) -> list[RequestOutput]:
    """Each sample as a request of its own, on an engine of its own that finds no page of another."""
    return [
        Engine(model, tokenizer, enable_prefix_caching=False).generate(
            prompt, replace(params, n=1, seed=params.seed + index)
        )[0]
        for index in range(params.n)
    ]


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("num_pages", "max_batch_tokens"), [(64, 2048), (64, 3), (18, 7)])
@pytest.mark.parametrize("prompt", [PROMPT, list(range(8)), [5]], ids=["partial", "full", "one"])
def test_each_sample_is_what_a_request_with_its_seed_draws(prompt, num_pages, max_batch_tokens, caching):
    engine = Engine(
        FakeModel(num_pages=num_pages), max_batch_tokens=max_batch_tokens, enable_prefix_caching=caching
    )
    older = engine.add_request([9, 9], SamplingParams(max_tokens=30))
    ids = [engine.add_request(prompt, replace(DRAWN, seed=seed)) for seed in (7, 70)]
    outputs = serve(engine)
    for request_id, seed in zip(ids, (7, 70), strict=True):
        output = outputs[request_id]
        assert tokens_of(output) == engine.model.samples(prompt, replace(DRAWN, seed=seed))
        assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
        assert len({tuple(tokens) for tokens in tokens_of(output)}) == 4, "samples must differ"
    assert outputs[older].token_ids == engine.model.continuation([9, 9], 30)
    assert sum(output.preemptions for output in outputs.values()) > 0 or num_pages == 64


def test_without_a_seed_samples_differ_and_one_seed_of_torch_repeats_them():
    engine = Engine(FakeModel())
    params = replace(DRAWN, seed=None)

    def ask(n):
        torch.manual_seed(3)
        return tokens_of(engine.generate(PROMPT, replace(params, n=n))[0])

    first = ask(4)
    assert ask(4) == first
    assert ask(1) == first[:1]
    assert len({tuple(tokens) for tokens in first}) == 4


def test_the_largest_seed_has_samples_too():
    engine = Engine(FakeModel())
    [output] = engine.generate(PROMPT, replace(DRAWN, seed=2**63 - 1))
    assert len({tuple(tokens) for tokens in tokens_of(output)}) == 4


@pytest.mark.parametrize("num_prompt_tokens", [2048, 2041])
def test_eight_samples_of_a_long_prompt_hold_its_pages_once_and_compute_it_once(num_prompt_tokens):
    size, num_new = 16, 40
    model = FakeModel(num_pages=200, page_size=size)
    copied = []
    copy_pages = model.copy_pages
    model.copy_pages = lambda copies: copied.extend(copies) or copy_pages(copies)
    engine = Engine(model, max_batch_tokens=512)
    prompt = [i % 50 for i in range(num_prompt_tokens)]
    params = SamplingParams(n=8, temperature=1.0, seed=1, max_tokens=num_new)
    [output] = engine.generate(prompt, params)
    assert tokens_of(output) == model.samples(prompt, params)
    shared = num_prompt_tokens // size
    assert engine.stats.peak_pages == shared + 8 * (-(-(num_prompt_tokens + num_new - 1) // size) - shared)
    assert engine.stats.computed_tokens == num_prompt_tokens + 8 * (num_new - 1)
    assert engine.stats.generated_tokens == 8 * num_new
    # The page that the prompt fills in part is copied for all but the last to write it.
    assert len(copied) == (7 if num_prompt_tokens % size else 0)
    assert len({source for source, _ in copied}) <= 1


@pytest.mark.parametrize("caching", [True, False])
def test_samples_that_just_fit_the_pool_also_finish_after_they_were_preempted(caching):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8)
    model = FakeModel(
        num_pages=4 + 3 * 3
    )  # 18 + 7 tokens: four full pages of the prompt, 3 pages of each sample
    prompt = list(range(18))
    engine = Engine(model, enable_prefix_caching=caching)
    for preempted_before in range(1, 12):
        request_id = engine.add_request(prompt, params)
        deltas = []
        for step in range(40):
            if step == preempted_before:
                engine._scheduler.preempt_all()
                model.prefix_cache.evict(preempted_before)
            deltas += engine.step()
        assert tokens_of(deltas[-1].output) == model.samples(prompt, params)
        assert deltas[-1].output.request_id == request_id
        assert deltas[-1].output.preemptions == (preempted_before < 8)
    with pytest.raises(ArgumentError, match="in each of 3 samples must fit the pool; got a need of 16 pages"):
        engine.add_request(prompt, replace(params, max_tokens=12))


@pytest.mark.parametrize("evicted", range(13, 21))
def test_samples_that_just_fit_also_finish_where_one_of_them_does_not_find_the_prompt(evicted):
    groups = (Visibility(), Visibility(chunk_size=2), Visibility(1))
    params = SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=9)
    # 13 pages of the prompt and 8 of each sample; 2 pages of each sample in each of the other groups.
    model = FakeModel(num_pages=13 + 2 * 8 + 2 * 2 * 2, page_size=1, groups=groups)
    engine = Engine(model, max_batch_tokens=1)
    prompt = list(range(13))
    engine.add_request(prompt, params)
    for _ in range(20):  # 13 tokens of the prompt, and more of one sample than of the other
        engine.step()
    engine._scheduler.preempt_all()
    # Small windows keep no page of the prompt: who does not find the end of its own tokens finds none of them.
    model.prefix_cache.evict(evicted)
    [output] = serve(engine).values()
    assert tokens_of(output) == model.samples(prompt, params)


def test_a_prompt_that_is_computed_again_is_computed_once_for_all_samples():
    engine = Engine(FakeModel(), enable_prefix_caching=False)
    engine.add_request(list(range(10)), DRAWN)
    for _ in range(3):
        engine.step()
    engine._scheduler.preempt_all()
    before = engine.stats.computed_tokens
    engine.step()
    assert engine.stats.computed_tokens - before == 10
    engine.step()
    assert engine.stats.computed_tokens - before == 10 + 4 * 3
    assert engine.stats.admitted_tokens == 10 + 10 + 4 * 3


def test_stop_strings_penalties_and_logprobs_are_each_samples_own():
    tokenizer = byte_tokenizer()
    model = FakeModel(vocab_size=257, num_pages=256)
    letters = np.zeros(257, dtype=np.float32)
    letters[97:107] = 6.0
    model.rule = lambda history: model.logits_of(history) + letters
    params = SamplingParams(
        n=5,
        temperature=0.9,
        top_p=0.95,
        seed=11,
        max_tokens=40,
        stop=["aa", "bc", "j"],
        frequency_penalty=0.3,
        presence_penalty=0.2,
        repetition_penalty=1.1,
        min_tokens=2,
        logprobs=2,
    )
    [output] = Engine(model, tokenizer).generate([list(b"hello")], params)
    expected = alone(model, list(b"hello"), params, tokenizer)
    for completion, own in zip(output.outputs, expected, strict=True):
        assert replace(completion, index=0) == own.outputs[0]
    assert len({len(completion.token_ids) for completion in output.outputs}) > 1, "all stopped together"
    assert "stop" in {completion.finish_reason for completion in output.outputs}


def test_a_stream_tells_the_samples_apart():
    engine = Engine(FakeModel(vocab_size=257), byte_tokenizer())
    texts, tokens, output = [""] * 4, [[] for _ in range(4)], None
    for delta in engine.stream("hello", DRAWN):
        texts[delta.sequence] += delta.text
        tokens[delta.sequence] += delta.token_ids
        output = delta.output or output
    assert tokens == tokens_of(output) == engine.model.samples(list(b"hello"), DRAWN)
    assert texts == [completion.text for completion in output.outputs]


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_abort_ends_all_samples_wherever_they_are(after):
    engine = Engine(FakeModel(), max_batch_tokens=4)  # the prompt takes two steps
    request = engine.requests[engine.add_request(PROMPT, DRAWN)]
    for _ in range(after):
        engine.step()
    assert engine.abort(request.request_id)
    assert engine.model.allocator.num_available == engine.model.num_pages
    output = request.output()
    assert [completion.finish_reason for completion in output.outputs] == ["abort"] * 4
    expected = engine.model.samples(PROMPT, DRAWN)
    assert [own[: len(got)] for own, got in zip(expected, tokens_of(output), strict=True)] == tokens_of(
        output
    )
    assert not engine.has_unfinished


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("caching", [True, False])
def test_an_interruption_between_the_first_tokens_of_samples_loses_none_of_them(at, caching):
    engine = Engine(FakeModel(), enable_prefix_caching=caching)
    hand_out, calls = engine._hand_out, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return hand_out(*arguments)

    engine._hand_out = interrupted
    request_id = engine.add_request(PROMPT, DRAWN)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.model.allocator.num_owned == 0
    assert tokens_of(serve(engine)[request_id]) == engine.model.samples(PROMPT, DRAWN)


def test_a_processor_sees_the_tokens_of_its_sample_and_a_failure_ends_all_samples_of_its_request():
    seen = []

    def note(token_ids, logits):
        seen.append(list(token_ids))
        return logits

    engine = Engine(FakeModel())
    [output] = engine.generate(PROMPT, replace(DRAWN, logits_processors=[note]))
    assert tokens_of(output) == engine.model.samples(PROMPT, DRAWN)
    assert sorted(seen) == sorted(tokens[:end] for tokens in tokens_of(output) for end in range(14))

    third = tokens_of(output)[2][:3]

    def fail(token_ids, logits):
        if token_ids == third:
            raise RuntimeError("my own")
        return logits

    engine.add_request(PROMPT, replace(DRAWN, logits_processors=[fail]))
    other = engine.add_request([4, 5], SamplingParams(max_tokens=6))
    for _ in range(3):
        engine.step()
    with pytest.raises(RuntimeError, match="my own"):
        engine.step()
    assert set(engine.requests) == {other}
    assert serve(engine)[other].token_ids == engine.model.continuation([4, 5], 6)


def test_the_prompt_is_reported_once_and_first_tokens_have_the_logprobs_of_one_row():
    model = FakeModel()
    params = replace(DRAWN, logprobs=1, prompt_logprobs=1)
    [output] = Engine(model, max_batch_tokens=4).generate(PROMPT, params)
    expected = alone(model, PROMPT, params)
    assert output.prompt_logprobs == expected[0].prompt_logprobs
    assert len(output.prompt_logprobs) == len(PROMPT)
    for completion, own in zip(output.outputs, expected, strict=True):
        assert replace(completion, index=0) == own.outputs[0]


def test_samples_find_the_pages_of_others_and_others_find_theirs():
    engine = Engine(FakeModel())
    prompt = list(range(8))
    [first] = engine.generate(prompt, DRAWN)
    [again] = engine.generate(
        prompt, DRAWN
    )  # also the page that the last token is in, of which it takes a copy
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 7)
    assert tokens_of(again) == tokens_of(first)
    for completion in first.outputs:
        [turn] = engine.generate([*prompt, *completion.token_ids], SamplingParams(max_tokens=1))
        assert turn.num_cached_tokens == 20, "all full pages of what the sample computed"


def test_requests_of_several_samples_from_two_threads_share_a_small_pool():
    engine = Engine(FakeModel(num_pages=20), max_batch_tokens=9)
    got: dict[int, list[list[int]]] = {}

    def work(thread):
        for i in range(thread, 16, 2):
            params = replace(DRAWN, n=1 + i % 4, seed=i)
            got[i] = tokens_of(engine.generate([*PROMPT, i % 3], params)[0])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(16):
        params = replace(DRAWN, n=1 + i % 4, seed=i)
        assert got[i] == engine.model.samples([*PROMPT, i % 3], params)
    assert engine.model.allocator.num_available == engine.model.num_pages


@pytest.mark.parametrize("caching", [True, False])
def test_samples_that_do_not_fit_one_step_take_turns(caching):
    engine = Engine(FakeModel(), max_batch_tokens=3, enable_prefix_caching=caching)
    request = engine.requests[engine.add_request(PROMPT, DRAWN)]
    while engine.has_unfinished:
        engine.step()
        lengths = [sequence.num_generated for sequence in request.sequences]
        assert max(lengths) - min(lengths) <= 1
    assert tokens_of(request.output()) == engine.model.samples(PROMPT, DRAWN)


def test_samples_that_end_early_give_their_pages_back_while_others_go_on():
    ends = 3
    model = FakeModel(eos_token_ids=(ends,), vocab_size=10)
    engine = Engine(model)
    request = engine.requests[engine.add_request(PROMPT, replace(DRAWN, max_tokens=30))]
    seen = set()
    while engine.has_unfinished:
        engine.step()
        live = [sequence.seq_id for sequence in request.live()]
        assert sorted(engine.table.seq_ids) == sorted(live)
        seen.add(len(live))
    assert len(seen) > 2, "samples must end at different times"
    for completion in request.output().outputs:
        assert (completion.token_ids[-1] == ends) == (completion.finish_reason == "stop")


def test_cached_or_not_whole_or_in_chunks_samples_are_counted_once():
    engine = Engine(FakeModel(page_size=4))
    engine.add_request(list(range(9)), replace(DRAWN, n=2, max_tokens=2))
    serve(engine)
    # Two full pages are shared; the tenth token of each sample stands in a page of its own, half full.
    assert (engine.stats.peak_pages, engine.stats.peak_unused_slots) == (4, 2 * 2)
    assert engine.stats.admitted_tokens == 9
