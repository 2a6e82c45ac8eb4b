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


def encoded(**options):
    return byte_tokenizer()(["ab", "cd"], **options)


@pytest.mark.parametrize(
    ("prompts", "got", "fix"),
    [
        (3, "int", "tokenizer(text)['input_ids']"),
        (None, "NoneType", "tokenizer(text)['input_ids']"),
        (b"text", "bytes", "bytes(prompts).decode()"),
        ({"a": 1}, "dict", "tokenizer(text)['input_ids']"),
        ({"input_ids": IDS}, "dict", "prompts['input_ids']"),
        (encoded(), "BatchEncoding", "prompts['input_ids']"),
        (encoded(return_tensors="pt"), "BatchEncoding", "prompts['input_ids'].tolist()"),
        (np.array(IDS), "ndarray", "prompts.tolist()"),
        (torch.tensor([IDS, IDS]), "Tensor", "prompts.tolist()"),
        ((p for p in ["a", "b"]), "generator", "list(prompts)"),
        ({"a"}, "set", "list(prompts)"),
        ([np.array(IDS)], "a list with ndarray", "[prompt.tolist() for prompt in prompts]"),
        ([torch.tensor(IDS)] * 2, "a list with Tensor", "[prompt.tolist() for prompt in prompts]"),
        ([[1], torch.tensor(IDS)], "a list with Tensor", "prompts[1].tolist() as that entry"),
        ([{"input_ids": IDS}], "a list with dict", "[prompt['input_ids'] for prompt in prompts]"),
        ([b"a"], "a list with bytes", "[bytes(prompt).decode() for prompt in prompts]"),
        ([{"role": "user", "content": "hi"}], "a list with dict", "tokenizer.apply_chat_template("),
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
        (torch.tensor(IDS), "Tensor", "prompt.tolist()"),
        (np.array(IDS), "ndarray", "prompt.tolist()"),
        (encoded(), "BatchEncoding", "prompt['input_ids']"),
        (b"ab", "bytes", "bytes(prompt).decode()"),
        (5, "int", "tokenizer(text)['input_ids']"),
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
