"""Which prompts can be served at all."""

from __future__ import annotations

import pytest

from quire.engine.admission import max_length
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError

from .fakes import FakeModel


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
    ("num_prompt_tokens", "max_tokens", "pages"), [(5, 29, 9), (33, None, 9), (60, 1, 15)]
)
def test_what_could_not_finish_with_the_whole_pool_is_refused_with_the_pages_it_needs(
    num_prompt_tokens, max_tokens, pages
):
    model = FakeModel(num_pages=8, page_size=4)
    sentence = f"prompt of {num_prompt_tokens} tokens plus .* a need of {pages} pages .* the pool has 8"
    with pytest.raises(ArgumentError, match=sentence):
        max_length(num_prompt_tokens, SamplingParams(max_tokens=max_tokens), model)
