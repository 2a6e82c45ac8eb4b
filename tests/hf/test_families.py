"""Every family gives on pages the logits it gives without them, in whatever steps its tokens come."""

from __future__ import annotations

import pytest

from quire.spec import Visibility

from .families import (
    FAMILIES,
    TOLERANCE,
    attention_with,
    on_pages,
    ordinary_logits,
    random_texts,
    seeing,
    tiny_model,
    worst_difference,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_pages_are_those_of_the_ordinary_model(family):
    model = tiny_model(family)
    assert worst_difference(model, on_pages(model)) <= TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama4"])  # one shape of layer: compiled once
def test_the_kernels_of_the_cpu_serve_a_model_as_the_reference_does(family):
    model = tiny_model(family)
    assert worst_difference(model, on_pages(model, backend="cpu")) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_models_depend_on_what_they_attend_to(family):
    """Without this, the test above would also pass with attention that attends to nothing."""
    model = tiny_model(family)
    text = random_texts()["a"]
    shuffled = text.clone()
    shuffled[-5:-1] = shuffled[-5:-1].flip(0)  # within every family's window
    logits = ordinary_logits(model, text)[-1]
    assert (ordinary_logits(model, shuffled)[-1] - logits).abs().max() > 1000 * TOLERANCE
    assert (ordinary_logits(model, text[-1:])[-1] - logits).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "phi3", "gemma3", "gemma4"])
@pytest.mark.parametrize("error", [-1, 1])
def test_a_window_off_by_one_would_be_noticed(family, error):
    model = tiny_model(family)

    def off_by_one(visibility):
        windowed = visibility.window_left >= 0
        return Visibility(window_left=visibility.window_left + error) if windowed else visibility

    paged = seeing(on_pages(model), off_by_one)
    assert not worst_difference(model, paged) <= 10 * TOLERANCE  # a page that was given back is NaN


def test_chunks_taken_for_full_attention_would_be_noticed():
    model = tiny_model("llama4")
    paged = seeing(on_pages(model), lambda _: Visibility())
    assert not worst_difference(model, paged) <= 10 * TOLERANCE


def test_a_chunk_of_another_size_would_be_noticed():
    model = tiny_model("llama4")
    paged = seeing(on_pages(model), lambda v: Visibility(chunk_size=2 * v.chunk_size))
    assert not worst_difference(model, paged) <= 10 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "dropped"),
    [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("granite", "scaling"), ("gemma2", "scaling")],
)
def test_an_argument_dropped_on_the_way_would_be_noticed(family, dropped):
    model = tiny_model(family)
    paged = on_pages(model)
    with attention_with(**{dropped: None}):
        assert worst_difference(model, paged) > 10 * TOLERANCE


def test_llama4_queries_scaled_by_their_place_in_the_packed_row_would_be_noticed():
    model = tiny_model("llama4")
    paged = on_pages(model)
    paged._forward._scales_by_index = False
    assert worst_difference(model, paged) > 10 * TOLERANCE


def test_layers_of_different_head_dim_share_page_ids_but_not_pools():
    paged = on_pages(tiny_model("gemma4"))
    assert sorted(pool.spec.head_dim for pool in paged._cache.pools) == [16, 32]
    assert {pool.num_pages for pool in paged._cache.pools} == {paged.num_pages}


def test_values_narrower_than_keys_come_back_at_their_own_width():
    model = tiny_model("deepseek_v3", v_head_dim=12)
    paged = on_pages(model)
    assert {(layer.spec.head_dim, layer.value_dim) for layer in paged._cache.layers.values()} == {(16, 12)}
    assert worst_difference(model, paged) <= TOLERANCE
