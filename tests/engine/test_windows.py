"""Layers with a window or chunks give pages back while their sequences go on: how many are held, and when."""

from __future__ import annotations

import math

import pytest
from hf.families import tiny_model

from quire.engine.core import Engine
from quire.engine.llm import LLM
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError, PageStateError
from quire.hf import PagedModel
from quire.spec import Visibility

from .fakes import FakeModel
from .texts import one_by_one

ALL, WINDOW = Visibility(), Visibility(5)
SIZE = 4


def make_engine(groups, *, num_pages=200, max_batch_tokens=8, page_size=SIZE, **options) -> Engine:
    model = FakeModel(num_pages=num_pages, page_size=page_size, groups=groups)
    return Engine(model, max_batch_tokens=max_batch_tokens, **options)


def pages_of(tokens: int, size: int = SIZE) -> int:
    return math.ceil(tokens / size)


# --- how much is held ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "local", "whole"),
    [
        ("gpt_oss", {}, 2, 2),
        (
            "gemma3",
            {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
            5,
            1,
        ),
    ],
)
def test_peak_bytes_are_those_of_the_tokens_that_layers_see(family, overrides, local, whole):
    """Of a window the tokens in it and those of a step, of other layers all; within a page per kind of layer."""
    model = tiny_model(family, eos_token_id=None, **overrides)
    window = model.config.sliding_window
    paged = PagedModel(model, page_size=SIZE, num_pages=150, backend="reference")
    paged.poison(range(150))
    paged.allocator._on_drop = paged.poison
    llm = LLM(paged, max_batch_tokens=6)
    prompt = [3 + 7 * i % 90 for i in range(61)]
    [output] = llm.generate([prompt], SamplingParams(max_tokens=10, ignore_eos=True))
    assert output.token_ids == one_by_one(model, [prompt], 10)[0]

    bytes_of_layer = 2 * 2 * 16 * 4  # of a token: K and V, two heads of 16 floats
    tokens = len(prompt) + 9
    in_sight = window - 1 + 6
    formula = bytes_of_layer * (whole * tokens + local * in_sight)
    one_page_each = bytes_of_layer * SIZE * (whole + local)
    assert abs(llm.stats.peak_pages * paged.bytes_per_page - formula) <= one_page_each
    assert llm.stats.peak_pages * paged.bytes_per_page < 0.6 * bytes_of_layer * tokens * (whole + local)


def test_five_layers_of_a_window_to_one_hold_a_quarter_of_what_all_would_at_8k():
    """With Gemma 3's window of 512 tokens, pages of 16 and steps of 256 tokens."""
    local = Visibility(511)
    engine = make_engine((ALL, *[local] * 5), num_pages=4000, max_batch_tokens=256, page_size=16)
    prompt = [i % 50 for i in range(8192 - 8)]
    engine.add_request(prompt, SamplingParams(max_tokens=8))
    while engine.has_unfinished:
        engine.step()
    held_by_all = 6 * 512
    assert engine.stats.peak_pages <= 0.25 * held_by_all
    assert engine.stats.peak_pages <= 512 + 5 * ((512 + 256) // 16 + 1)


def test_a_long_prompt_gives_pages_back_as_it_is_read():
    """So it fits a pool that all its tokens would not."""
    engine = make_engine((WINDOW,), num_pages=5)
    prompt = list(range(1, 41))
    request_id = engine.add_request(prompt, SamplingParams(max_tokens=5))
    held = []
    while engine.has_unfinished:
        deltas = engine.step()
        if request_id in engine.table:
            held.append(len(engine.table.pages(request_id)))
    assert deltas[-1].output.token_ids == engine.model.continuation(prompt, 5)
    assert max(held) <= pages_of(5) + 1
    assert engine.stats.peak_pages <= pages_of(5 + 8) + 1


@pytest.mark.parametrize("groups", [(WINDOW,), (ALL, WINDOW, WINDOW)], ids=str)
def test_a_step_takes_no_more_of_a_long_prompt_than_there_are_pages_for(groups):
    """Eleven pages of all tokens, three of each window: a step of 40 tokens would need ten of each."""
    engine = make_engine(groups, num_pages=3 * len(groups) + 8 * groups[0].sees_all, max_batch_tokens=64)
    prompt = list(range(1, 41))
    for _ in range(2):
        [output] = engine.generate([prompt], SamplingParams(max_tokens=3))
        assert output.token_ids == engine.model.continuation(prompt, 3)


def test_a_request_may_be_as_long_as_its_pages_in_sight_allow_and_no_longer():
    engine = make_engine((ALL, WINDOW), num_pages=13)  # ten of all tokens, three of the window
    with pytest.raises(ArgumentError, match="got a need of 14 pages of 4 tokens, the pool has 13"):
        engine.add_request([1] * 36, SamplingParams(max_tokens=6))
    for max_tokens in (5, None):
        [output] = engine.generate([[1] * 36], SamplingParams(max_tokens=max_tokens))
        assert output.token_ids == engine.model.continuation([1] * 36, 5)
        assert output.finish_reason == "length"


def test_samples_share_the_window_of_their_prompt():
    engine = make_engine((ALL, WINDOW), max_batch_tokens=64)
    engine.add_request(list(range(1, 30)), SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=3))
    engine.step()
    pages, _ = engine.table.occupancy()
    assert pages == 8 + 2, "the prompt once: eight pages of all tokens, and two that token 29 sees"
    engine.step()
    pages, _ = engine.table.occupancy()
    assert pages == 10 + 2 * 3, "of the last page of each group each has its own"


# --- what is found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups", [(WINDOW,), (ALL, WINDOW), (ALL, Visibility(chunk_size=8), WINDOW)], ids=str
)
def test_a_conversation_goes_on_from_its_pages(groups):
    engine = make_engine(groups)
    prompt = list(range(1, 30))
    [first] = engine.generate([prompt], SamplingParams(max_tokens=10))
    turn = [*prompt, *first.token_ids, 7, 7, 7]
    [second] = engine.generate([turn], SamplingParams(max_tokens=6))
    assert second.num_cached_tokens == 36, "38 tokens were computed"
    assert second.token_ids == engine.model.continuation(turn, 6)


@pytest.mark.parametrize("groups", [(WINDOW,), (ALL, WINDOW)], ids=str)
def test_a_prompt_that_begins_as_another_one_finds_what_was_given_back_in_its_middle(groups):
    engine = make_engine(groups)
    common = list(range(1, 22))
    engine.generate([[*common, *[9] * 30]], SamplingParams(max_tokens=2))
    [output] = engine.generate([[*common, 5, 6, 7]], SamplingParams(max_tokens=4))
    assert output.num_cached_tokens == 20
    assert output.token_ids == engine.model.continuation([*common, 5, 6, 7], 4)


def test_where_the_window_was_dropped_the_beginning_is_computed_again_and_explain_hit_says_so():
    engine = make_engine((ALL, WINDOW))
    prompt = list(range(1, 25))
    engine.generate([prompt], SamplingParams(max_tokens=1))
    cache = engine.model.prefix_cache
    pages = cache.match(prompt).pages(1)
    cache.allocator.unkeep(pages[:5])
    [output] = engine.generate([prompt], SamplingParams(max_tokens=4))
    assert output.num_cached_tokens == 0
    assert output.token_ids == engine.model.continuation(prompt, 4)
    assert engine.explain_hit(output) == (
        "0 of 24 prompt tokens were found in pages: "
        "the page of tokens 0 to 3 was dropped in layers that see a window of 6"
    )
    [output] = engine.generate([prompt], SamplingParams(max_tokens=4))
    assert output.num_cached_tokens == 23, "what was dropped has its place again"


def test_a_whole_prompt_is_found_only_where_its_last_token_sees_all_it_should():
    """Token 24 would see page 4, but token 23, which is computed again, sees page 3."""
    groups = (ALL, Visibility(8))
    for lost, found in ((2, 23), (3, 12)):
        engine = make_engine(groups)
        prompt = list(range(1, 25))
        engine.generate([prompt], SamplingParams(max_tokens=1))
        cache = engine.model.prefix_cache
        cache.allocator.unkeep([cache.match(prompt).pages(1)[lost]])
        [output] = engine.generate([prompt], SamplingParams(max_tokens=4))
        assert (lost, output.num_cached_tokens) == (lost, found)
        assert output.token_ids == engine.model.continuation(prompt, 4)


# --- what is checked -------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", ["0", "1"])
def test_a_page_of_a_window_that_belongs_to_another_group_is_noticed(monkeypatch, debug):
    monkeypatch.setenv("QUIRE_DEBUG", debug)
    engine = make_engine((ALL, WINDOW))
    request_id = engine.add_request(list(range(1, 17)), SamplingParams(max_tokens=8))
    for _ in range(2):
        engine.step()
    wrong = engine.table.page_at(request_id, 3, 0)
    engine.table._sequence(request_id).groups[1][3] = wrong
    with pytest.raises(
        PageStateError, match=f"page {wrong} must have"
    ):  # in the sample of one of these steps
        _ = [engine.step() for _ in range(4)]


def test_two_engines_share_windows_of_one_model():
    first = make_engine((ALL, WINDOW))
    second = Engine(first.model, max_batch_tokens=8)
    prompt = list(range(1, 30))
    [one] = first.generate([prompt], SamplingParams(max_tokens=6))
    [other] = second.generate([prompt], SamplingParams(max_tokens=6))
    assert one.token_ids == other.token_ids == first.model.continuation(prompt, 6)
    assert other.num_cached_tokens == 28
