"""QUIRE_DEBUG=1 through the whole engine: what nobody owns is NaN, and no result notices."""

from __future__ import annotations

import torch

import quire
from quire.engine import LLM, SamplingParams


def test_freed_pages_are_poisoned_cached_ones_are_not_and_tokens_stay_the_same(monkeypatch):
    prompts = ["def read(path):\n", "import os\n", "class Stack:\n    "]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = [output.token_ids for output in LLM().generate(prompts, params)]

    monkeypatch.setenv("QUIRE_DEBUG", "1")
    llm = quire.LLM(num_pages=4)  # so few that requests take turns on the same pages
    outputs = llm.generate(prompts, params)

    assert [output.token_ids for output in outputs] == expected
    [pages, *_] = {
        id(layer.k): layer.k for layer in llm.model._cache.layers.values()
    }.values()  # [heads, pages, ...]
    cached = [page for page in range(4) if llm.model.prefix_cache.name_of(page)]
    assert 0 < len(cached) == llm.model.allocator.num_cached < 4
    assert not torch.isnan(pages[:, cached]).any(), "cached pages keep what they hold"
    llm.reset_prefix_cache()
    assert torch.isnan(pages).all(), "nobody owns a page and no content is known, so every page was poisoned"
