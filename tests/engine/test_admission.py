"""Which prompts can be served at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.engine.admission import list_params, list_prompts, max_length
from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError

from .fakes import EOS, FakeModel, byte_tokenizer


@pytest.mark.parametrize(
    ("max_tokens", "max_seq_len", "expected"),
    [
        (3, None, 5 + 3),
        (3, 7, 7),  # the model ends first
        (None, 20, 20),
        (None, None, 8 * 4 + 1),  # the pool ends first; the last token needs no slot
        (28, None, 8 * 4 + 1),
    ],
)
def test_a_request_goes_as_far_as_its_max_tokens_the_model_and_the_pool_allow(
    max_tokens, max_seq_len, expected
):
    model = FakeModel(num_pages=8, page_size=4, max_seq_len=max_seq_len)
    assert max_length(5, SamplingParams(max_tokens=max_tokens), model) == expected


@pytest.mark.parametrize(
    ("num_prompt_tokens", "n", "max_tokens", "expected"),
    [
        (5, 2, 12, 5 + 12),  # one page of the prompt, and 3 of each sample
        (5, 2, None, 1 * 4 + 3 * 4 + 1),  # 7 pages for two: one stays unused
        (5, 7, None, 1 * 4 + 1 * 4 + 1),
        (8, 6, None, 2 * 4 + 1 * 4 + 1),
        (32, 5, 1, 33),  # nobody writes a token of its own
        (31, 5, 1, 32),
        (31, 5, None, 32),
    ],
)
def test_samples_go_as_far_as_the_pool_allows_with_the_full_pages_of_their_prompt_stored_once(
    num_prompt_tokens, n, max_tokens, expected
):
    model = FakeModel(num_pages=8, page_size=4)
    params = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens)
    assert max_length(num_prompt_tokens, params, model) == expected


@pytest.mark.parametrize(
    ("num_prompt_tokens", "n", "max_tokens", "pages"),
    [(5, 2, 13, 9), (32, 5, 2, 13), (30, 2, 2, 9), (33, 2, 1, 9)],
)
def test_samples_that_together_could_not_finish_are_refused_with_the_pages_they_need(
    num_prompt_tokens, n, max_tokens, pages
):
    model = FakeModel(num_pages=8, page_size=4)
    params = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens)
    sentence = (
        f"plus {max_tokens} to generate in each of {n} samples must fit the pool; got a need of {pages} pages"
    )
    with pytest.raises(ArgumentError, match=sentence):
        max_length(num_prompt_tokens, params, model)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "pages"), [(5, 29, 9), (33, None, 9), (60, 1, 15)]
)
def test_what_could_not_finish_with_the_whole_pool_is_refused_with_the_pages_it_needs(
    num_prompt_tokens, max_tokens, pages
):
    model = FakeModel(num_pages=8, page_size=4)
    sentence = f"prompt of {num_prompt_tokens} tokens plus .* a need of {pages} pages .* the pool has 8"
    with pytest.raises(ArgumentError, match=sentence):
        max_length(num_prompt_tokens, SamplingParams(max_tokens=max_tokens), model)


IDS = [1, 2, 3]


@pytest.mark.parametrize(
    ("prompts", "listed"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        (IDS, [IDS]),
        ([IDS, [4]], [IDS, [4]]),
        (["a", IDS], ["a", IDS]),
        (range(3), [range(3)]),
        ([], []),
        (list(np.array(IDS)), [IDS]),  # NumPy's ints are ints
        ([list(np.array(IDS))], [IDS]),
    ],
)
def test_prompts_are_text_token_ids_or_lists_of_these(prompts, listed):
    assert list_prompts(prompts) == listed


def encoded(texts=("ab", "cde"), **options):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<eos>"
    return tokenizer(texts if isinstance(texts, str) else list(texts), **options)


AB, CDE = list(b"ab"), list(b"cde")


@pytest.mark.parametrize(
    ("prompts", "listed"),
    [
        ({"input_ids": IDS}, [IDS]),
        ({"input_ids": [IDS, [4]]}, [IDS, [4]]),
        (encoded("ab"), [AB]),
        (encoded(), [AB, CDE]),
        (encoded(padding=True), [AB, CDE]),
        (encoded(padding=True, padding_side="left", return_tensors="pt"), [AB, CDE]),
        (encoded(padding=True, return_tensors="np"), [AB, CDE]),
        (encoded("ab", return_tensors="pt"), [AB]),
        ([encoded("ab"), encoded("cde", return_tensors="pt"), "text"], [AB, CDE, "text"]),
        (np.array(IDS), [IDS]),
        (np.array([IDS, IDS]), [IDS, IDS]),
        (torch.tensor([IDS]), [IDS]),
        (torch.tensor([IDS, IDS], dtype=torch.int32), [IDS, IDS]),
        ([np.array(IDS), torch.tensor([[4]])], [IDS, [4]]),
        ([{"input_ids": IDS}], [IDS]),
        ({"prompt": "text"}, ["text"]),
        ([{"prompt": "text"}, {"prompt_token_ids": IDS}], ["text", IDS]),
        (
            {"input_ids": [np.array(IDS), np.array([4, 5, 6])], "attention_mask": [[1, 1, 1], [0, 1, 1]]},
            [IDS, [5, 6]],
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_tokenizers_and_arrays_hold_are_prompts_without_their_padding(prompts, listed):
    assert list_prompts(prompts) == listed


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        (torch.tensor(IDS), IDS),
        (torch.tensor([IDS]), IDS),
        (np.array(IDS), IDS),
        (encoded("ab"), AB),
        (encoded("ab", return_tensors="pt"), AB),
        ({"prompt_token_ids": IDS}, IDS),
    ],
    ids=lambda value: str(value)[:30],
)
def test_one_prompt_may_be_an_encoding_or_an_array(prompt, ids):
    model = FakeModel(vocab_size=257)
    engine = Engine(model, byte_tokenizer())
    request = engine.requests[engine.add_request(prompt)]
    assert request.output().prompt_token_ids == ids
    assert [output.prompt_token_ids for output in engine.generate(prompt, SamplingParams(max_tokens=1))] == [
        ids
    ]


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ({"input_ids": IDS, "pixel_values": [1.0]}, "must be text alone; got pixel_values beside input_ids"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1]}, "must rule out padding alone"),
        ({"input_ids": IDS, "attention_mask": [1, 1]}, "must have the shape of input_ids"),
        ({"input_ids": [IDS], "attention_mask": IDS}, "must have the shape of input_ids"),
        ([{"input_ids": IDS, "attention_mask": 3}], "must have the shape of input_ids"),
    ],
)
def test_an_encoding_that_says_more_than_text_is_refused(prompts, sentence):
    with pytest.raises(ArgumentError, match=sentence) as refusal:
        list_prompts(prompts)
    assert "Fix: " in str(refusal.value)


def test_an_encoding_that_is_all_padding_is_an_empty_prompt():
    with pytest.raises(ArgumentError, match="prompt must not be empty"):
        Engine(FakeModel()).generate({"input_ids": IDS, "attention_mask": [0, 0, 0]})


@pytest.mark.parametrize(
    ("prompts", "got", "fix"),
    [
        (3, "int", "tokenizer(text)['input_ids']"),
        (None, "NoneType", "tokenizer(text)['input_ids']"),
        (b"text", "bytes", "bytes(prompts).decode()"),
        ({"a": 1}, "dict", "tokenizer(text)['input_ids']"),
        ((p for p in ["a", "b"]), "generator", "list(prompts)"),
        ({"a"}, "set", "list(prompts)"),
        ([b"a"], "a list with bytes", "[bytes(prompt).decode() for prompt in prompts]"),
        ([{"role": "user", "content": "hi"}], "a list with dict", "llm.chat(messages)"),
        ([[1], b"a"], "a list with bytes", "bytes(prompts[1]).decode() as that entry"),
        (np.array(3), "int", "tokenizer(text)['input_ids']"),
        (np.array([1.5]), "a list with float 1.5", "one prompt per entry"),
        (["ab", 3], "a list with int 3", "one prompt per entry"),
        ([None], "a list with NoneType", "one prompt per entry"),
        ([True, False], "a list with bool", "one prompt per entry"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_anything_else_is_refused_with_a_fix_that_works(prompts, got, fix):
    with pytest.raises(
        ArgumentError, match="prompts must be text, token ids or a list of these; got"
    ) as refusal:
        list_prompts(prompts)
    sentence = str(refusal.value)
    assert f"; got {got}" in sentence
    assert fix in sentence.partition("Fix: ")[2]
    expression = sentence.partition("Fix: ")[2]
    if "prompts" in expression and got != "generator":
        expression = expression.removesuffix(" as that entry")
        assert list_prompts(eval(expression, {"prompts": prompts}))


@pytest.mark.parametrize(
    ("prompt", "got", "fix"),
    [
        (b"ab", "bytes", "bytes(prompt).decode()"),
        (5, "int", "tokenizer(text)['input_ids']"),
        (torch.tensor([IDS, IDS]), "a list with list [1, 2, 3]", "tokenizer(text)['input_ids']"),
        (["a", "b"], "a list with str 'a'", "tokenizer(text)['input_ids']"),
        ([1, True], "a list with bool True", "tokenizer(text)['input_ids']"),
        ([1.5], "a list with float 1.5", "tokenizer(text)['input_ids']"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_one_prompt_that_is_neither_text_nor_token_ids_is_refused(prompt, got, fix):
    engine = Engine(FakeModel(), byte_tokenizer())
    sentence = "prompt must be text or a list of int token ids; got"
    with pytest.raises(ArgumentError, match=sentence) as refusal:
        engine.add_request(prompt)
    assert f"; got {got}" in str(refusal.value)
    assert fix in str(refusal.value).partition("Fix: ")[2]
    assert not engine.has_unfinished


def test_ids_of_numpy_are_served_as_ints():
    model = FakeModel()
    engine = Engine(model)
    [output] = engine.generate(list(np.array(IDS)), SamplingParams(max_tokens=3))
    assert output.token_ids == model.continuation(IDS, 3)
    assert {type(token) for token in output.prompt_token_ids} == {int}


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"max_tokens": 3}, r"got dict .* Fix: SamplingParams\(\*\*params\)"),
        (3, r"got int 3\. Fix: params=SamplingParams\("),
        ("greedy", "got str 'greedy'"),
        ([SamplingParams(), {"max_tokens": 3}], "got dict"),
        ([SamplingParams()], "one per prompt, 2; got 1"),
        pytest.param(iter([SamplingParams()] * 2), "got list_iterator", id="iterator"),
    ],
    ids=str,
)
def test_parameters_of_another_kind_or_number_are_refused(params, sentence):
    with pytest.raises(ArgumentError, match="params must be .*" + sentence):
        list_params(params, 2, SamplingParams)
    engine = Engine(FakeModel(vocab_size=EOS + 1), byte_tokenizer())
    for call in (engine.generate, engine.stream):
        with pytest.raises(ArgumentError, match="params must be"):
            call(["a", "b"], params)
    with pytest.raises(ArgumentError, match="params must be"):
        engine.add_request("a", params if not isinstance(params, list) else params * 2)
    assert not engine.has_unfinished
