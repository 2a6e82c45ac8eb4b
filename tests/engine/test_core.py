"""The loop, over a model whose tokens depend on all that its pages hold."""

from __future__ import annotations

import pytest

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.engine.request import RequestOutput
from quire.errors import ArgumentError, OutOfPages, UnsupportedError

from .fakes import EOS, FakeModel, byte_tokenizer, fork, scripted

END = 7
GREEDY = SamplingParams(max_tokens=12)


def serve(engine: Engine) -> dict[int, RequestOutput]:
    """Step until nothing is left; the outputs by request id."""
    outputs = {}
    while engine.has_unfinished:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    return outputs


def all_pages_are_free(engine: Engine) -> bool:
    return engine.table.allocator.num_available == engine.model.num_pages


def says(text: str | bytes, **options) -> Engine:
    """An engine whose model says this text in bytes, one per token, after any prompt of three tokens."""
    script = list(text.encode() if isinstance(text, str) else text)
    return Engine(FakeModel(vocab_size=257, rule=scripted(257, 3, script), **options), byte_tokenizer())


def test_logits_are_computed_only_where_a_prompt_ends():
    model = FakeModel()
    engine = Engine(model, max_batch_tokens=8)
    engine.add_request(list(range(20)), GREEDY)
    engine.add_request(list(range(3)), GREEDY)
    for _ in range(4):
        engine.step()
    assert model.step_sizes == [8, 8, 7, 2]
    assert model.logits_rows == [0, 0, 2, 2]


def test_deltas_tell_the_tokens_of_each_step_and_the_last_one_brings_the_output():
    engine = Engine(FakeModel())
    request_id = engine.add_request([1, 2, 3], SamplingParams(max_tokens=2))
    [first] = engine.step()
    [second] = engine.step()
    expected = engine.model.continuation([1, 2, 3], 2)
    assert (first.request_id, first.token_ids, first.finish_reason) == (request_id, expected[:1], None)
    assert (second.request_id, second.token_ids, second.finish_reason) == (request_id, expected[1:], "length")
    assert second.output.token_ids == expected
    assert second.output.prompt_token_ids == [1, 2, 3]
    assert 0 < second.output.time_to_first_token <= second.output.seconds
    assert engine.step() == []


@pytest.mark.parametrize("waiting", [False, True])
def test_abort_frees_pages_at_once_and_leaves_the_others_their_tokens(waiting):
    engine = Engine(FakeModel(), max_num_seqs=1 if waiting else 9)
    kept = engine.add_request([1, 2, 3], GREEDY)
    dropped = engine.add_request([4, 5, 6, 7, 8], GREEDY)
    engine.step()
    free = engine.table.allocator.num_available
    assert engine.abort(dropped)
    assert engine.table.allocator.num_available == free + (0 if waiting else 2)
    assert not engine.abort(dropped)
    assert not engine.abort(99)
    assert serve(engine)[kept].token_ids == engine.model.continuation([1, 2, 3], 12)
    assert all_pages_are_free(engine)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_exception_inside_a_step_frees_all_pages_and_loses_no_request(interruption):
    engine = Engine(FakeModel(), max_batch_tokens=16)
    prompts = [[1, 2, 3], list(range(30)), [9] * 5]
    ids = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    for _ in range(3):
        engine.step()

    def interrupted(step):
        raise interruption

    forward, engine.model.forward = engine.model.forward, interrupted
    with pytest.raises(interruption):
        engine.step()
    assert all_pages_are_free(engine)
    engine.model.forward = forward
    outputs = serve(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert outputs[request_id].token_ids == engine.model.continuation(prompt, 12)


def test_a_token_that_one_request_cannot_accept_loses_no_other_requests_delta():
    engine = Engine(FakeModel())
    ids = [engine.add_request([i, 2, 3], SamplingParams(max_tokens=2)) for i in range(3)]
    engine.step()
    [sequence] = engine.requests[ids[1]].sequences
    accept = sequence.accept

    def failing(token):
        accept(token)
        raise ValueError("no text")

    sequence.accept = failing
    with pytest.raises(ValueError, match="no text"):
        engine.step()
    assert all_pages_are_free(engine)
    assert engine.has_unfinished
    deltas = engine.step()
    expected = [engine.model.continuation([i, 2, 3], 2) for i in range(3)]
    assert [(d.request_id, d.token_ids) for d in deltas] == [
        (i, e[1:]) for i, e in zip(ids, expected, strict=True)
    ]
    assert [d.output.token_ids for d in deltas] == expected
    assert not engine.has_unfinished


def test_sampling_with_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption():
    prompts = [[i, i + 1, i + 2] for i in range(5)]
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=100 + i, max_tokens=25) for i in range(5)]

    def tokens(num_pages: int, which: range) -> tuple[list[list[int]], int]:
        engine = Engine(FakeModel(num_pages=num_pages), max_batch_tokens=7)
        ids = [engine.add_request(prompts[i], params[i]) for i in which]
        outputs = serve(engine)
        return [outputs[i].token_ids for i in ids], sum(o.preemptions for o in outputs.values())

    alone = [tokens(64, range(i, i + 1))[0][0] for i in range(5)]
    together, preemptions = tokens(64, range(5))
    assert together == alone
    assert preemptions == 0
    crowded, preemptions = tokens(10, range(5))
    assert crowded == alone
    assert preemptions > 0
    greedy = Engine(FakeModel()).model.continuation(prompts[0], 25)
    assert alone[0] != greedy, "nothing was drawn"


def test_end_of_text_ends_a_request_unless_it_is_ignored():
    model = FakeModel(vocab_size=50, rule=scripted(50, 3, [1, 2, END, 4]), eos_token_ids=(END,))
    engine = Engine(model)
    stops = engine.add_request([0, 0, 0], GREEDY)
    ignores = engine.add_request([0, 0, 0], SamplingParams(max_tokens=5, ignore_eos=True))
    outputs = serve(engine)
    assert (outputs[stops].token_ids, outputs[stops].finish_reason) == ([1, 2, END], "stop")
    assert (outputs[ignores].token_ids, outputs[ignores].finish_reason) == ([1, 2, END, 4, 1], "length")


def test_stop_tokens_end_a_request_and_are_no_text():
    engine = says("abcdef")
    request_id = engine.add_request([0, 0, 0], SamplingParams(stop_token_ids=[ord("d")]))
    output = serve(engine)[request_id]
    assert (output.text, output.token_ids, output.finish_reason) == ("abc", list(b"abcd"), "stop")


def test_a_stop_string_over_several_tokens_is_cut_off_and_never_shown():
    engine = says("one. Two. END more")
    engine.add_request([0, 0, 0], SamplingParams(stop=["END", "NEVER"]))
    deltas = [delta for _ in range(13) for delta in engine.step()]
    assert deltas[-1].finish_reason == "stop"
    assert "".join(delta.text for delta in deltas) == deltas[-1].output.text == "one. Two. "
    assert deltas[-1].output.token_ids == list(b"one. Two. END")


def test_max_tokens_counts_generated_tokens_and_releases_held_text():
    engine = says("abcEN")
    request_id = engine.add_request([0, 0, 0], SamplingParams(max_tokens=5, stop="END"))
    output = serve(engine)[request_id]
    assert (output.text, output.finish_reason) == ("abcEN", "length")


def test_a_stop_string_in_the_last_token_counts_before_the_length():
    model = FakeModel(vocab_size=258, rule=scripted(258, 3, [*b"the EN", EOS + 1]))
    engine = Engine(model, byte_tokenizer(b"D\xe2"))
    request_id = engine.add_request([0, 0, 0], SamplingParams(max_tokens=7, stop="END"))
    output = serve(engine)[request_id]
    assert (output.text, output.finish_reason) == ("the ", "stop")


def test_a_character_over_four_tokens_arrives_whole():
    engine = says("😀é")
    engine.add_request([0, 0, 0], SamplingParams(max_tokens=6))
    assert [delta.text for _ in range(6) for delta in engine.step()] == ["", "", "", "😀", "", "é"]


def test_a_text_prompt_is_encoded_and_kept():
    engine = says("x")
    request_id = engine.add_request("abc", SamplingParams(max_tokens=1))
    output = serve(engine)[request_id]
    assert (output.prompt, output.prompt_token_ids, output.text) == ("abc", list(b"abc"), "x")


def test_the_models_longest_sequence_ends_a_request():
    engine = Engine(FakeModel(max_seq_len=10))
    request_id = engine.add_request([1] * 6, SamplingParams(max_tokens=100))
    output = serve(engine)[request_id]
    assert (len(output.token_ids), output.finish_reason) == (4, "length")


def test_a_request_that_just_fits_the_whole_pool_is_served_and_one_token_more_is_refused():
    engine = Engine(FakeModel(num_pages=4, page_size=4))
    request_id = engine.add_request([1] * 10, SamplingParams(max_tokens=7))  # the last token needs no slot
    sentence = (
        "prompt of 10 tokens plus 8 to generate must fit the pool; got a need of 5 pages .* the pool has 4"
    )
    with pytest.raises(ArgumentError, match=sentence):
        engine.add_request([1] * 10, SamplingParams(max_tokens=8))
    assert serve(engine)[request_id].token_ids == engine.model.continuation([1] * 10, 7)
    with pytest.raises(ArgumentError, match="prompt of 17 tokens"):
        engine.add_request([1] * 17, SamplingParams(max_tokens=None))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "prompt must not be empty"),
        ("", "prompt must not be empty"),
        ([1, 50], "prompt token ids must be from 0 to 49; got 50"),
        ([-1], "prompt token ids must be from 0 to 49; got -1"),
        ([1.5], "prompt must be text or a list of int token ids"),
        ([1] * 30, "prompt must be shorter than the model's 30 tokens; got 30"),
    ],
)
def test_a_bad_prompt_is_refused_in_one_sentence_and_the_others_go_on(prompt, sentence):
    engine = Engine(FakeModel(max_seq_len=30), byte_tokenizer())
    good = engine.add_request([1, 2, 3], GREEDY)
    engine.step()
    with pytest.raises(ArgumentError, match=sentence):
        engine.add_request(prompt, GREEDY)
    assert serve(engine)[good].token_ids == engine.model.continuation([1, 2, 3], 12)


def test_text_needs_a_tokenizer():
    engine = Engine(FakeModel())
    with pytest.raises(ArgumentError, match="prompt must be token ids, as this engine has no tokenizer"):
        engine.add_request("abc")
    with pytest.raises(ArgumentError, match="stop must be None, as this engine has no tokenizer"):
        engine.add_request([1], SamplingParams(stop="x"))
    with pytest.raises(UnsupportedError, match="got int"):
        Engine(FakeModel(), 3)


@pytest.mark.parametrize("limit", ["max_batch_tokens", "max_num_seqs"])
@pytest.mark.parametrize("value", [0, True, 1.5])
def test_limits_that_are_no_number_of_anything_are_refused(limit, value):
    with pytest.raises(ArgumentError, match=f"{limit} must be an int of at least 1; got {value}"):
        Engine(FakeModel(), **{limit: value})


def test_pages_held_by_someone_else_end_in_an_error_and_not_in_a_circle():
    engine = Engine(FakeModel(num_pages=8))
    taken = engine.table.allocator.allocate(8)
    request_id = engine.add_request([1, 2, 3], GREEDY)
    with pytest.raises(OutOfPages, match="got 0 free of 8"):
        engine.step()
    engine.table.allocator.free(taken)
    assert serve(engine)[request_id].token_ids == engine.model.continuation([1, 2, 3], 12)


def test_who_owns_which_page_can_be_read_after_each_step():
    engine = Engine(FakeModel(num_pages=8, page_size=4))
    first, second = engine.add_request([1] * 5, GREEDY), engine.add_request([2], GREEDY)
    engine.step()
    assert engine.table.page_owners() == [[first], [first], [second], [], [], [], [], []]
    assert set(engine.requests) == {first, second}


def test_stats_count_what_was_done():
    engine = Engine(FakeModel(num_pages=16, page_size=4), max_batch_tokens=64)
    engine.add_request([1] * 5, SamplingParams(max_tokens=3))
    engine.add_request([2] * 4, SamplingParams(max_tokens=1))
    serve(engine)
    assert engine.stats.steps == 3
    assert engine.stats.computed_tokens == 5 + 4 + 1 + 1
    assert engine.stats.generated_tokens == 4
    assert (engine.stats.peak_pages, engine.stats.peak_unused_slots) == (3, 12 - 9)


# Requests of several sequences


@pytest.mark.parametrize(("num_pages", "preemptions"), [(64, 0), (9, 1)])
def test_each_sequence_of_a_forked_request_goes_on_as_it_would_alone(num_pages, preemptions):
    engine = Engine(FakeModel(num_pages=num_pages, page_size=4), max_batch_tokens=9)
    older = engine.add_request([4, 5, 6, 7], SamplingParams(max_tokens=22))
    prompt = [1, 2, 3, 4, 5]
    forked = engine.add_request(prompt, GREEDY)
    deltas = engine.step()
    continuation = engine.model.continuation
    other = (deltas[-1].token_ids[0] + 1) % 50
    second = fork(engine, forked, other)
    assert engine.table.pages(second.seq_id) == engine.table.pages(forked)
    while engine.has_unfinished:
        deltas += engine.step()
    [output] = [delta.output for delta in deltas if delta.request_id == forked and delta.output]
    expected = [continuation(prompt, 12), [other, *continuation([*prompt, other], 11)]]
    assert [(o.index, o.token_ids, o.finish_reason) for o in output.outputs] == [
        (0, expected[0], "length"),
        (1, expected[1], "length"),
    ]
    assert (output.token_ids, output.finish_reason, output.preemptions) == (
        expected[0],
        "length",
        preemptions,
    )
    for index in range(2):
        own = [t for d in deltas if (d.request_id, d.sequence) == (forked, index) for t in d.token_ids]
        assert own == expected[index]
    assert [o.token_ids for d in deltas if d.request_id == older and d.output for o in d.output.outputs] == [
        continuation([4, 5, 6, 7], 22)
    ]
    assert all_pages_are_free(engine)


def test_a_sequence_that_ends_gives_its_pages_back_while_its_request_goes_on():
    engine = Engine(FakeModel(page_size=4, vocab_size=50))
    forked = engine.add_request([1] * 4, GREEDY)
    engine.step()
    second = fork(engine, forked, 9)
    second.max_length = 6
    engine.step()
    assert second.finish_reason == "length"
    assert engine.table.seq_ids == [forked]
    assert engine.table.allocator.num_owned == 2
    output = serve(engine)[forked]
    assert [len(o.token_ids) for o in output.outputs] == [12, 2]
    assert output.token_ids == engine.model.continuation([1] * 4, 12)


def test_an_abort_ends_all_sequences_of_a_request():
    engine = Engine(FakeModel())
    forked = engine.add_request([1] * 6, GREEDY)
    engine.step()
    second = fork(engine, forked, 9)
    engine.step()
    assert engine.abort(forked)
    assert second.finish_reason == "abort"
    assert all_pages_are_free(engine)
    assert not engine.has_unfinished


def test_stats_count_a_shared_page_once():
    engine = Engine(FakeModel(page_size=4))
    forked = engine.add_request([1] * 9, SamplingParams(max_tokens=2))
    engine.step()
    fork(engine, forked, 9)
    serve(engine)
    # Two full pages are shared; the tenth token of each sequence stands in a page of its own, half full.
    assert (engine.stats.peak_pages, engine.stats.peak_unused_slots) == (4, 2 * 2)


def test_an_engine_says_what_it_serves_and_how_much_is_free():
    engine = Engine(FakeModel(num_pages=8, page_size=4), max_num_seqs=1)
    engine.add_request([1, 2, 3], GREEDY)
    engine.add_request([4], GREEDY)
    engine.step()
    assert (
        repr(engine)
        == "Engine(1 running, 1 waiting, FakeModel(PageAllocator(num_pages=8: 1 owned, 0 cached, 7 free)))"
    )
