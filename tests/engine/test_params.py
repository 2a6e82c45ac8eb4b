"""What a caller may ask for."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from quire.engine.params import OWN_DEFAULTS, UNSET, SamplingParams, takes_prompt
from quire.errors import ArgumentError


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0; got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"top_k": -2}, r"top_k must be None or an int of at least 1 \(0 and -1: all\); got -2"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1; got -0.1"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1"),
        ({"min_p": math.nan}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0; got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number above 0"),
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2; got 2.1"),
        ({"frequency_penalty": "a"}, "frequency_penalty must be from -2 to 2; got 'a'"),
        ({"min_tokens": -1}, "min_tokens must be an int of at least 0; got -1"),
        ({"min_tokens": True}, "min_tokens must be an int of at least 0; got True"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens must be at most max_tokens, 5; got 6"),
        ({"logit_bias": [3]}, "logit_bias must be a dict of token ids"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias must be a dict of token ids"),
        ({"logit_bias": {3: math.inf}}, "logit_bias must be a dict of token ids to finite numbers"),
        ({"allowed_token_ids": []}, "allowed_token_ids must be None or a list of at least one int"),
        ({"allowed_token_ids": 3}, "allowed_token_ids must be None or a list of at least one int; got 3"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids must be None or a list of at least one int"),
        ({"bad_words": "word"}, "bad_words must be None or a list of non-empty strings; got 'word'"),
        ({"bad_words": [""]}, "bad_words must be None or a list of non-empty strings"),
        ({"bad_words": ["\ud800"]}, "bad_words must be None or a list of non-empty strings"),
        ({"logprobs": -2}, "logprobs must be None or an int of at least 0, or -1 for all tokens; got -2"),
        ({"logprobs": True}, "logprobs must be None or an int"),
        ({"prompt_logprobs": 1.0}, "prompt_logprobs must be None or an int of at least 0"),
        ({"skip_special_tokens": 0}, "skip_special_tokens must be a bool; got 0"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output must be a bool; got None"),
        ({"logits_processors": print}, "logits_processors must be None or a list of functions"),
        ({"logits_processors": [3]}, "logits_processors must be None or a list of functions"),
        (
            {"logits_processors": [lambda logits: logits]},
            "logits_processors must take .generated token ids, logits",
        ),
        ({"n": 0, "temperature": 1.0}, "n must be an int of at least 1; got 0"),
        ({"n": True}, "n must be an int of at least 1; got True"),
        ({"n": 2, "temperature": 0}, "n must be 1 with temperature 0, where all samples are the same; got 2"),
        ({"seed": -1}, "seed must be None or an int from 0"),
        ({"max_tokens": 0}, "max_tokens must be None or an int of at least 1; got 0"),
        ({"stop": ""}, "stop must be a non-empty string"),
        ({"stop": ["a", 3]}, "stop must be a non-empty string"),
        ({"stop": 5}, "stop must be a non-empty string or several; got 5"),
        ({"stop": b"end"}, "stop must be a non-empty string or several; got b'end'"),
        ({"stop": iter(["end"])}, "stop must be a non-empty string or several"),  # it could be read once only
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be a list of ints"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of ints; got 5"),
        ({"stop_token_ids": None}, "stop_token_ids must be a list of ints; got None"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be a list of ints"),
        ({"stop_token_ids": iter([5])}, "stop_token_ids must be a list of ints"),
        ({"stop_token_ids": torch.tensor([5])}, "stop_token_ids must be a list of ints"),
        ({"ignore_eos": 1}, "ignore_eos must be a bool; got 1"),
    ],
)
def test_params_out_of_range_are_refused_in_one_sentence_with_a_fix(params, sentence):
    with pytest.raises(ArgumentError, match=sentence) as refusal:
        SamplingParams(**params)
    assert "Fix: " in str(refusal.value)


@pytest.mark.parametrize("ids", [[5], (5,), {5}, range(5, 6), np.array([5])], ids=str)
def test_stop_tokens_may_come_in_any_collection(ids):
    assert list(SamplingParams(stop_token_ids=ids).stop_token_ids) == [5]


def test_greedy_choice_may_stand_beside_filters_of_a_draw():
    params = SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5)
    assert (params.top_k, params.top_p, params.min_p) == (5, 0.5, 0.5)


UNSETTABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "min_tokens")


def test_what_is_left_unset_says_so_and_is_filled_by_defaults_then_by_quires_own():
    params = SamplingParams(top_k=5, seed=1)
    for kept in (params, copy.deepcopy(params), pickle.loads(pickle.dumps(params)), replace(params, n=1)):
        assert [name for name in UNSETTABLE if getattr(kept, name) is UNSET] == [
            name for name in UNSETTABLE if name != "top_k"
        ]
    assert "temperature=unset, top_k=5" in repr(params)
    filled = params.with_defaults({"temperature": 0.7, "top_k": 9, "max_tokens": None})
    own = OWN_DEFAULTS | {"temperature": 0.7, "top_k": 5, "max_tokens": None}
    assert {name: getattr(filled, name) for name in UNSETTABLE} == own
    assert filled.seed == 1
    assert filled.with_defaults({"temperature": 0.1}) is filled


def test_none_is_a_value_and_no_unset_field():
    params = SamplingParams(top_k=None, max_tokens=None).with_defaults({"top_k": 9, "max_tokens": 9})
    assert (params.top_k, params.max_tokens) == (None, None)


def test_several_samples_of_an_unset_temperature_are_judged_once_it_is_known():
    params = SamplingParams(n=2)
    assert params.with_defaults({"temperature": 1.0}).n == 2
    with pytest.raises(ArgumentError, match="n must be 1 with temperature 0"):
        params.with_defaults()


def test_a_processor_takes_the_generated_tokens_or_the_prompt_before_them():
    assert not takes_prompt(lambda token_ids, logits: logits)
    assert takes_prompt(lambda prompt, token_ids, logits: logits)
    assert not takes_prompt(lambda *arguments: arguments[-1])
    assert not takes_prompt(print)


def test_one_stop_string_or_several():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
