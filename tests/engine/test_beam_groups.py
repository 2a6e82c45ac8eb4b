"""Beams as sequences of one request: they share pages, give them back, and run beside others in any pool."""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

from quire.engine import beams, core
from quire.engine.core import Engine
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.errors import ArgumentError

from .fakes import EOS, FakeModel, byte_tokenizer

PROMPT = [1, 2, 3, 4, 5, 6]
SEARCH = BeamSearchParams(beam_width=4, max_tokens=10)


def texts_of(output) -> list[tuple[list[int], float]]:
    return [
        (completion.token_ids, pytest.approx(completion.score, rel=1e-6)) for completion in output.outputs
    ]


def serve(engine: Engine) -> dict:
    outputs = {}
    while engine.has_unfinished:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    assert engine.model.allocator.num_available == engine.model.num_pages
    return outputs


def copies_of(engine: Engine) -> list[tuple[int, int]]:
    """A list to which every page that is copied from now on is added."""
    copied, copy_pages = [], engine.model.copy_pages
    engine.model.copy_pages = lambda copies: copied.extend(copies) or copy_pages(copies)
    return copied


def shared_writes(engine: Engine) -> int:
    """Copies that the next step owes: of each partly filled page one for all but the last of its owners."""
    table = engine.table
    partial = [i for i in table.seq_ids if table.length(i) % engine.model.page_size]
    owners = Counter(table.pages(seq_id)[-1] for seq_id in partial)
    return sum(owners.values()) - len(owners)


@pytest.mark.parametrize("num_prompt_tokens", [2048, 2041])
def test_beams_of_a_long_prompt_hold_its_pages_once_and_copy_only_what_two_of_them_write(num_prompt_tokens):
    size, width, num_new = 16, 8, 40
    engine = Engine(FakeModel(num_pages=300, page_size=size), max_batch_tokens=512)
    prompt = [i % 50 for i in range(num_prompt_tokens)]
    params = BeamSearchParams(width, num_new)
    copied = copies_of(engine)
    request = engine.requests[engine.add_request(prompt, params)]
    shared, most = num_prompt_tokens // size, 0
    while request.request_id in engine.requests:
        expected = shared_writes(engine)
        copied.clear()
        [delta] = engine.step() or [None]
        assert len(copied) == expected
        live = [beam.seq_id for beam in request.sequences]
        assert sorted(engine.table.seq_ids) == sorted(live), "a beam that is given up keeps no page"
        pages = {page for seq_id in live for page in engine.table.pages(seq_id)}
        assert len(pages) == engine.model.allocator.num_owned
        prompts = {tuple(engine.table.pages(seq_id)[:shared]) for seq_id in live}
        assert len(prompts) <= 1, "the prompt is stored once"
        most = max(most, len(pages))
    assert texts_of(delta.output) == engine.model.beams(prompt, params)
    # Every beam would have its own pages behind the prompt if all had parted with their first token.
    assert (
        most
        <= engine.stats.peak_pages
        <= shared + width * (-(-(num_prompt_tokens + num_new - 1) // size) - shared)
    )
    assert engine.stats.peak_pages < shared + 2 * width, (
        "texts of beams begin alike, and share the pages of that too"
    )
    assert engine.stats.computed_tokens == num_prompt_tokens + width * (num_new - 1)
    assert engine.stats.generated_tokens == width * num_new


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("num_pages", "max_batch_tokens"), [(64, 2048), (64, 3), (18, 7)])
@pytest.mark.parametrize("eos", [(), (3, 30)])
def test_beams_beside_others_are_those_of_a_search_alone(num_pages, max_batch_tokens, caching, eos):
    model = FakeModel(num_pages=num_pages, eos_token_ids=eos)
    engine = Engine(model, max_batch_tokens=max_batch_tokens, enable_prefix_caching=caching)
    drawn = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=9, ignore_eos=True)
    greedy = SamplingParams(max_tokens=20, ignore_eos=True)
    older, samples = engine.add_request([9, 9], greedy), engine.add_request(PROMPT, drawn)
    prompts = [PROMPT, [*PROMPT, 7, 8], [5]]
    ids = [engine.add_request(prompt, SEARCH) for prompt in prompts]
    outputs = serve(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert texts_of(outputs[request_id]) == model.beams(prompt, SEARCH)
    assert outputs[older].token_ids == model.continuation([9, 9], 20)
    assert [completion.token_ids for completion in outputs[samples].outputs] == model.samples(PROMPT, drawn)
    assert sum(output.preemptions for output in outputs.values()) > 0 or num_pages == 64


@pytest.mark.parametrize("caching", [True, False])
def test_a_group_that_just_fits_the_pool_also_ends_after_it_was_preempted_at_any_step(caching):
    params, prompt = BeamSearchParams(3, 8), list(range(18))
    model = FakeModel(num_pages=4 + 3 * 3)
    engine = Engine(model, enable_prefix_caching=caching)
    expected = model.beams(prompt, params)
    for preempted_before in range(1, 9):
        request_id = engine.add_request(prompt, params)
        deltas = []
        for step in range(24):
            if step == preempted_before:
                engine._scheduler.preempt_all()
                model.prefix_cache.evict(preempted_before)
            deltas += engine.step()
        [delta] = deltas
        assert delta.request_id == request_id
        assert texts_of(delta.output) == expected
        assert delta.output.preemptions == (preempted_before < 8)
    sentence = "in each of 3 beams must fit the pool; got a need of 16 pages .* a smaller beam_width"
    with pytest.raises(ArgumentError, match=sentence):
        engine.add_request(prompt, BeamSearchParams(3, 12))
    with pytest.raises(
        ArgumentError, match=r"prompts\[1\]: prompt of 18 tokens plus 12 to generate in each of 3 beams"
    ):
        engine.beam_search([[1], prompt], BeamSearchParams(3, 12))
    assert not engine.has_unfinished


def test_a_search_waits_for_pages_for_all_its_beams_and_not_for_those_of_its_prompt_alone():
    engine = Engine(FakeModel(num_pages=11), enable_prefix_caching=False)
    first = engine.add_request([9] * 20, SamplingParams(max_tokens=6))
    engine.step()
    search = engine.requests[engine.add_request(PROMPT, BeamSearchParams(5, 5))]
    engine.step()
    assert [request.request_id for request in engine._scheduler.running] == [first]
    outputs = serve(engine)
    assert outputs[search.request_id].preemptions == 0
    assert outputs[first].token_ids == engine.model.continuation([9] * 20, 6)
    assert texts_of(outputs[search.request_id]) == engine.model.beams(PROMPT, BeamSearchParams(5, 5))


def test_a_prompt_found_in_pages_is_not_computed_and_its_texts_are_the_same():
    engine = Engine(FakeModel())
    prompt = list(range(12))
    [cold], [warm] = engine.beam_search(prompt, SEARCH), engine.beam_search(prompt, SEARCH)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 11)
    assert cold.outputs == warm.outputs
    [turn] = engine.generate(prompt + warm.token_ids, SamplingParams(max_tokens=1))
    assert turn.num_cached_tokens >= 20, "the best text's pages are found too"


@pytest.mark.parametrize("after", range(6))
def test_an_abort_returns_the_best_texts_so_far_and_all_pages(after):
    engine = Engine(FakeModel(eos_token_ids=(3, 30, 31, 32)), max_batch_tokens=4)
    request = engine.requests[engine.add_request(PROMPT, SEARCH)]
    for _ in range(after):
        engine.step()
    assert engine.abort(request.request_id)
    assert not engine.abort(request.request_id)
    assert engine.model.allocator.num_available == engine.model.num_pages
    outputs = request.output().outputs
    assert 1 <= len(outputs) <= 4
    assert [each.score for each in outputs] == sorted((each.score for each in outputs), reverse=True)
    assert "abort" in {each.finish_reason for each in outputs}
    assert not engine.has_unfinished
    assert engine.step() == []


def interrupt_step(engine: Engine, at: int) -> tuple[int, list]:
    """Ctrl-C before the at-th line that chooses beams or exchanges their pages: lines that were reached, and deltas."""
    files, lines = {beams.__file__: beams, core.__file__: core}, []
    sources = {file: inspect.getsource(module).splitlines() for file, module in files.items()}

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_filename not in files or (
            code.co_filename == core.__file__ and code.co_name != "_regroup"
        ):
            return None
        line = sources[code.co_filename][frame.f_lineno - 1].lstrip()
        if event == "line" and not line.startswith(("with ", "try:")):
            lines.append(frame.f_lineno)
            if len(lines) == at:
                raise KeyboardInterrupt
        return trace

    before, deltas = sys.gettrace(), []
    sys.settrace(trace)
    try:
        with suppress(KeyboardInterrupt):
            deltas = engine.step()
    finally:
        sys.settrace(before)
    return len(lines), deltas


@pytest.mark.parametrize("steps_before", [1, 4])
def test_an_interruption_between_two_generations_leaves_one_of_them(steps_before):
    """Also the last one, after which the search has ended."""
    params = BeamSearchParams(2, 5)
    model = FakeModel(num_pages=12)
    expected = model.beams(PROMPT, params)
    for at in itertools.count(1, 3):
        engine = Engine(model, enable_prefix_caching=False)
        request_id = engine.add_request(PROMPT, params)
        deltas = [delta for _ in range(steps_before) for delta in engine.step()]
        reached, of_step = interrupt_step(engine, at)
        deltas += of_step
        while engine.has_unfinished:
            deltas += engine.step()
        assert [delta.request_id for delta in deltas] == [request_id]
        assert texts_of(deltas[0].output) == expected
        assert model.allocator.num_available == 12
        if reached < at:
            break
    assert at > 30


def test_the_one_delta_of_a_search_brings_the_best_text():
    tokenizer = byte_tokenizer()
    model = FakeModel(vocab_size=257, eos_token_ids=(EOS,))
    letters = np.zeros(257, dtype=np.float32)
    letters[97:107] = 9.0
    letters[EOS] = 9.0
    model.rule = lambda history: model.logits_of(history) + letters
    engine = Engine(model, tokenizer)
    params = BeamSearchParams(3, 12, 0.5)
    engine.add_request("hello", params)
    deltas = []
    while engine.has_unfinished:
        deltas += engine.step()
    [delta] = deltas
    output = delta.output
    assert texts_of(output) == model.beams(list(b"hello"), params)
    assert (delta.text, delta.token_ids, delta.sequence) == (output.text, output.token_ids, 0)
    assert delta.finish_reason == output.finish_reason
    for completion in output.outputs:
        letters_of = [token for token in completion.token_ids if token != EOS]
        assert completion.text == bytes(letters_of).decode()
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == EOS)
    assert "stop" in {completion.finish_reason for completion in output.outputs}
    assert output.prompt == "hello"
    assert 0 < output.time_to_first_token <= output.seconds


def test_logits_that_are_no_numbers_end_their_search_alone():
    model = FakeModel()
    usual = model.rule
    model.rule = lambda history: usual(history) * (np.nan if history[0] == 40 else 1)
    engine = Engine(model)
    engine.add_request([40, 1], SEARCH)
    other = engine.add_request(PROMPT, SEARCH)
    with pytest.raises(ArgumentError, match="logits of a beam search must leave a token to choose"):
        engine.step()
    assert set(engine.requests) == {other}
    assert texts_of(serve(engine)[other]) == model.beams(PROMPT, SEARCH)


def test_tokens_that_a_model_rules_out_are_in_no_text():
    model = FakeModel(vocab_size=12)
    usual = model.rule
    model.rule = lambda history: np.where(np.arange(12) < 9, -np.inf, usual(history)).astype(np.float32)
    [output] = Engine(model).beam_search(PROMPT, BeamSearchParams(5, 1))
    assert sorted(tokens for [tokens] in (completion.token_ids for completion in output.outputs)) == [
        9,
        10,
        11,
    ]
    [output] = Engine(model).beam_search(PROMPT, BeamSearchParams(5, 4))
    assert len(output.outputs) == 5
    assert {token for completion in output.outputs for token in completion.token_ids} <= {9, 10, 11}


def test_searches_of_two_threads_share_a_small_pool():
    model = FakeModel(num_pages=26)
    engines = [Engine(model, max_batch_tokens=9), Engine(model)]
    got: dict[int, list] = {}

    def work(thread):
        for i in range(thread, 12, 2):
            engine = engines[i % 3 == 0]
            if i % 4 == 3:
                got[i] = engine.generate([*PROMPT, i], SamplingParams(max_tokens=10))[0].token_ids
            else:
                got[i] = texts_of(engine.beam_search([*PROMPT, i], BeamSearchParams(1 + i % 4, 8))[0])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(12):
        if i % 4 == 3:
            assert got[i] == model.continuation([*PROMPT, i], 10)
        else:
            assert got[i] == model.beams([*PROMPT, i], BeamSearchParams(1 + i % 4, 8))
    assert model.allocator.num_available == 26


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beam_width": 0}, "beam_width must be an int of at least 1; got 0"),
        ({"beam_width": True}, "beam_width must be an int of at least 1; got True"),
        ({"max_tokens": None}, "max_tokens must be an int of at least 1; got None"),
        ({"length_penalty": float("nan")}, "length_penalty must be from -50 to 50; got nan"),
        ({"length_penalty": "1"}, "length_penalty must be from -50 to 50"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never'; got 'always'"),
        ({"early_stopping": 1}, "early_stopping must be True, False or 'never'; got 1"),
    ],
)
def test_params_out_of_range_are_refused(options, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        BeamSearchParams(**({"beam_width": 4, "max_tokens": 8} | options))


def test_each_call_names_the_params_that_it_takes():
    engine = Engine(FakeModel())
    with pytest.raises(ArgumentError, match=r"a BeamSearchParams.*got SamplingParams.*llm.generate takes"):
        engine.beam_search([1], SamplingParams())
    with pytest.raises(ArgumentError, match=r"a SamplingParams.*got BeamSearchParams.*llm.beam_search takes"):
        engine.generate([1], SEARCH)
    with pytest.raises(ArgumentError, match=r"a BeamSearchParams.*got NoneType"):
        engine.beam_search([1], None)
    with pytest.raises(ArgumentError, match="one BeamSearchParams or one per prompt, 2; got 1"):
        engine.beam_search([[1], [2]], [SEARCH])
    outputs = engine.beam_search([[1], [2]], [SEARCH, BeamSearchParams(2, 3)])
    assert [len(output.outputs) for output in outputs] == [4, 2]
    assert engine.beam_search([], SEARCH) == []
