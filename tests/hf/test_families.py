"""Every family gives on pages the logits it gives without them, in whatever steps its tokens come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.hf import PagedModel

from .families import (
    FAMILIES,
    PAGE_SIZE,
    TOLERANCE,
    attention_without,
    ordinary_logits,
    random_texts,
    tiny_model,
    with_visibility,
    worst_difference,
)


def on_pages(model, **options):
    options = {"page_size": PAGE_SIZE, "num_pages": 40, "backend": "reference", **options}
    return PagedModel(model, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_pages_are_those_of_the_ordinary_model(family):
    model = tiny_model(family)
    assert worst_difference(model, on_pages(model)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_models_depend_on_their_context(family):
    """Without this, the test above would also pass with attention that attends to nothing."""
    model = tiny_model(family)
    text = random_texts()["a"]
    logits = ordinary_logits(model, text)[-1]
    near = text.clone()
    near[-4:-1] = near[-4:-1].flip(0)
    assert (ordinary_logits(model, near)[-1] - logits).abs().max() > 1000 * TOLERANCE
    assert (ordinary_logits(model, text[-1:])[-1] - logits).abs().max() > 1000 * TOLERANCE
