"""What a caller may ask for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quire.engine.params import SamplingParams
from quire.errors import ArgumentError


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0; got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be None or an int of at least 1; got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_k": 5}, "top_k and top_p must be left out when temperature is 0"),
        ({"top_p": 0.5}, "top_k and top_p must be left out when temperature is 0"),
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


def test_one_stop_string_or_several():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
