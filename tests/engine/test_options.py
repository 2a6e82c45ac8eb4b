"""Options of a request as the engine takes them: checked at its door, and what of them ends and shows a text."""

from __future__ import annotations

from random import Random

import pytest
from tokenizers.processors import TemplateProcessing

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError

from .fakes import EOS, FakeModel, byte_tokenizer, scripted

VOCAB = 257


def test_options_that_name_tokens_the_model_does_not_have_are_refused_before_any_work():
    engine = Engine(FakeModel(vocab_size=VOCAB, eos_token_ids=(EOS,)), byte_tokenizer())
    for name, value in {"logit_bias": {VOCAB: 1.0}, "allowed_token_ids": [3, VOCAB]}.items():
        with pytest.raises(ArgumentError, match=f"{name} must hold token ids from 0 to 256; got 257"):
            engine.generate([1, 2], SamplingParams(**{name: value}))
    with pytest.raises(ArgumentError, match="allowed_token_ids must hold token ids from 0 to 256; got -1"):
        engine.generate([1, 2], SamplingParams(allowed_token_ids=[-1]))
    with pytest.raises(ArgumentError, match="bad_words must be None, as this engine has no tokenizer"):
        Engine(engine.model).generate([1, 2], SamplingParams(bad_words=["word"]))
    assert not engine.has_unfinished


def test_end_of_text_waits_for_min_tokens_also_where_it_is_ignored():
    """As in vLLM: min_tokens rules the model's own end-of-text tokens out, whatever they would do."""
    engine = Engine(FakeModel(vocab_size=VOCAB, eos_token_ids=(EOS,)), byte_tokenizer())
    forced = {"logit_bias": {EOS: 1000.0}, "max_tokens": 8}
    [ends] = engine.generate("x", SamplingParams(min_tokens=3, **forced))
    assert (len(ends.token_ids), ends.token_ids[3], ends.finish_reason) == (4, EOS, "stop")
    assert EOS not in ends.token_ids[:3]
    [goes_on] = engine.generate("x", SamplingParams(min_tokens=3, ignore_eos=True, **forced))
    assert goes_on.token_ids == [*ends.token_ids[:3], *[EOS] * 5]


def test_bad_words_do_not_begin_a_text():
    engine = Engine(FakeModel(vocab_size=VOCAB), byte_tokenizer())
    params = SamplingParams(max_tokens=1)
    [plain] = engine.generate([1, 2], params)
    engine.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS)]
    )
    forced = SamplingParams(max_tokens=1, bad_words=["z"], logit_bias={ord("z"): 1000.0})
    assert engine.generate([1, 2], forced)[0].token_ids == plain.token_ids


def says(text: bytes | list[int], **params) -> tuple[str, str, list[int]]:
    """Text, finish_reason and tokens of a request whose model says this, one byte or token after the other."""
    model = FakeModel(vocab_size=VOCAB, rule=scripted(VOCAB, 3, list(text)), eos_token_ids=(EOS,))
    engine = Engine(model, byte_tokenizer())
    deltas = list(engine.stream([0, 0, 0], SamplingParams(**params)))
    output = deltas[-1].output
    assert "".join(delta.text for delta in deltas) == output.text
    assert [token for delta in deltas for token in delta.token_ids] == output.token_ids
    return output.text, output.finish_reason, output.token_ids


@pytest.mark.parametrize(
    ("include", "stop_at", "text"),
    [
        (False, {"stop": "END"}, "one. "),
        (True, {"stop": "END"}, "one. END"),
        (False, {"stop_token_ids": [ord("E")]}, "one. "),
        (True, {"stop_token_ids": [ord("E")]}, "one. E"),
        (True, {"stop_token_ids": [ord("N")], "stop": ["ENORMOUS", ". E"]}, "one. E"),
    ],
)
def test_what_ended_a_text_stands_in_it_where_that_is_asked(include, stop_at, text):
    found = says(b"one. END more", include_stop_str_in_output=include, **stop_at)
    assert found[:2] == (text, "stop")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "ab"),
        ({"skip_special_tokens": False}, "ab"),
        ({"include_stop_str_in_output": True}, "ab"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "ab<eos>"),
        ({"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 4}, "ab<eos>a"),
        ({"ignore_eos": True, "max_tokens": 4}, "aba"),
    ],
)
def test_the_token_that_ends_a_text_is_shown_only_as_a_special_token_and_as_what_ended_it(params, text):
    assert says([*b"ab", EOS], **params)[0] == text


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "a "), (4, "a "), (5, "a END b "), (10, "a END b "), (11, "a END b END c")]
)
def test_a_stop_string_that_is_complete_within_min_tokens_is_text(min_tokens, text):
    """The words are complete with tokens 5 and 11."""
    reason = "length" if min_tokens == 11 else "stop"
    assert says(b"a END b END c", stop="END", min_tokens=min_tokens, max_tokens=13)[:2] == (text, reason)


def test_a_stop_string_in_the_last_of_min_tokens_is_text_when_the_length_ends_it():
    assert says(b"the END", stop="END", min_tokens=7, max_tokens=7)[:2] == ("the END", "length")
    assert says(b"the END", stop="END", min_tokens=6, max_tokens=7)[:2] == ("the ", "stop")


@pytest.mark.parametrize(("min_tokens", "text"), [(6, "the "), (7, "the END")])
def test_a_stop_string_hidden_behind_a_character_cut_off_may_be_within_min_tokens(min_tokens, text):
    model = FakeModel(vocab_size=258, rule=scripted(258, 3, [*b"the EN", EOS + 1]))
    engine = Engine(model, byte_tokenizer(b"D\xe2"))  # the last token: the D, and the first byte of three
    params = SamplingParams(min_tokens=min_tokens, max_tokens=7, stop="END")
    [output] = engine.generate([0, 0, 0], params)
    assert (output.text, output.finish_reason) == (text, "stop" if min_tokens == 6 else "length")


def test_stop_tokens_are_not_chosen_within_min_tokens():
    text, reason, tokens = says(b"abcd", stop_token_ids=[ord("b"), -1, 99999], min_tokens=3, max_tokens=9)
    assert (tokens, reason) == ([ord("a"), 0, ord("c"), ord("d"), ord("a"), ord("b")], "stop")
    assert text == "a\0cda"


def own_failure(token_ids, logits):
    if len(token_ids) == 4:
        raise ZeroDivisionError("my own")
    return logits


MIXED = [
    {},
    {"temperature": 1.0, "min_p": 0.05},
    {"repetition_penalty": 1.5, "logprobs": 3},
    {
        "temperature": 0.8,
        "frequency_penalty": 1.0,
        "presence_penalty": -1.0,
        "top_k": 20,
        "prompt_logprobs": 1,
    },
    {"allowed_token_ids": range(30), "min_tokens": 9, "stop_token_ids": range(10), "logprobs": 0},
    {
        "bad_words": ["a", "b c"],
        "logit_bias": {ord("a"): 9.0, ord("d"): 4.0},
        "temperature": 1.2,
        "top_p": 0.9,
    },
    {"logits_processors": [own_failure]},
    {"logits_processors": [lambda token_ids, logits: logits.flip(0)], "prompt_logprobs": 0, "logprobs": 1},
]


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_options_in_a_small_pool_gives_what_each_gives_alone(seed):
    random = Random(seed)
    asked = [
        (
            [random.randrange(120) for _ in range(random.randint(1, 20))],
            SamplingParams(seed=i, max_tokens=14, **mixed),
        )
        for i, mixed in enumerate(random.choices(MIXED, k=12))
    ]
    model = FakeModel(vocab_size=VOCAB, num_pages=12)
    roomy = Engine(FakeModel(vocab_size=VOCAB), byte_tokenizer())
    engine = Engine(model, byte_tokenizer(), max_batch_tokens=random.choice([5, 13, 64]))
    ids, outputs, failures = [], {}, 0
    waiting, aborted = list(asked), set()
    while waiting or engine.has_unfinished:
        if waiting and random.random() < 0.5:
            ids.append(engine.add_request(*waiting.pop()))
        if ids and random.random() < 0.02:
            aborted.add(request_id := random.choice(ids))
            engine.abort(request_id)
        try:
            outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output}
        except ZeroDivisionError:
            failures += 1
    assert model.allocator.num_available == model.num_pages
    fail = {
        i
        for i, (_, params) in zip(ids, reversed(asked), strict=True)
        if params.logits_processors == [own_failure]
    }
    assert len(fail - aborted) <= failures <= len(fail)
    for request_id, (prompt, params) in zip(ids, reversed(asked), strict=True):
        if request_id not in fail | aborted:
            [alone] = roomy.generate(prompt, params)
            found = outputs[request_id]
            assert (found.outputs, found.prompt_logprobs) == (alone.outputs, alone.prompt_logprobs)
