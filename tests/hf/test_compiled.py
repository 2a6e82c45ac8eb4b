"""Compiled layers: the same logits, one graph for every step, and a sentence where there can be none."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from quire.errors import UnsupportedError
from quire.hf.compiled import CompiledDecoder

from .families import TOLERANCE, on_pages, random_texts, tiny_model, worst_difference
from .test_model import prefill

own_worker = pytest.mark.xdist_group("torch-compile")  # one compiler at a time is enough for two cores


@pytest.fixture
def graphs():
    """How many graphs torch has compiled since the test began, after a look that none was broken."""
    torch._dynamo.reset()
    counters.clear()

    def count() -> int:
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    return count


@own_worker
def test_one_graph_serves_every_step_a_single_token_too_with_the_logits_of_the_ordinary_model(graphs):
    model = tiny_model("gemma2", num_hidden_layers=2)  # windows, caps, and norms around everything
    plain, paged = on_pages(model, backend="auto"), on_pages(model, backend="auto", compile=True)
    assert graphs() == 1
    assert worst_difference(model, paged) <= TOLERANCE

    text = random_texts()["a"][:11]
    for cache in (plain._cache, paged._cache):
        cache.poison(range(plain.num_pages))
    pages = [[5, 0, 3], [6, 2, 4]]  # the layer with a window has a page table of its own
    for step in (prefill(text[:10], pages, [9]), prefill(text, pages, [0], first=10)):
        expected, logits = plain.forward(step), paged.forward(step)
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() <= TOLERANCE
    for mine, other in zip(paged._cache.pools, plain._cache.pools, strict=True):
        assert torch.equal(mine.k.isnan(), other.k.isnan()), "the single token's companion left a trace"
    assert graphs() == 1, "a step was compiled anew"
    assert "forward" not in vars(model.get_decoder())


@own_worker
def test_a_model_that_is_no_single_graph_is_refused(graphs):
    model = tiny_model("llama", num_hidden_layers=2)
    model.model.norm.register_forward_hook(lambda module, inputs, output: torch._dynamo.graph_break())
    with pytest.raises(
        UnsupportedError, match=r"must be one graph for torch\.compile; got .* Fix: compile=False"
    ):
        on_pages(model, backend="auto", compile=True)


@own_worker
def test_without_a_compiler_the_request_is_refused_and_not_dropped(graphs):
    # Torch's own patches: its settings do not survive being deleted, which is how pytest would undo them.
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    no_caches = torch.compiler.config.patch(force_disable_caches=True)
    refused = pytest.raises(
        UnsupportedError, match=r"needs a C\+\+ compiler.* Fix: install g\+\+, or compile=False"
    )
    with no_compiler, no_caches, refused:
        on_pages(tiny_model("llama", num_hidden_layers=1), backend="auto", compile=True)


def test_a_model_without_a_decoder_of_its_own_is_refused():
    model = tiny_model("llama")
    model.get_decoder = lambda: model
    with pytest.raises(UnsupportedError, match="must have a decoder apart from its head"):
        CompiledDecoder(model)
