"""Pages that wait in host memory: hits and preempted requests find them there, and everyone gets their own tokens."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress

import pytest
from hf.families import tiny_model

from quire.engine.core import Engine
from quire.engine.llm import LLM
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.errors import ArgumentError, PageStateError
from quire.hf import PagedModel
from quire.hf.cache import make_swap
from quire.pages import HostPool, swap
from quire.spec import Visibility

from .fakes import FakeModel, ask, drain
from .interrupting import interrupted
from .texts import one_by_one

PAGE = 4
PARAMS = SamplingParams(max_tokens=6)


def make_engine(**options) -> Engine:
    return Engine(FakeModel(**{"num_pages": 8, "page_size": PAGE, "num_host_pages": 64} | options))


# Hits


def test_a_prompt_finds_pages_that_were_dropped_and_stats_tell_them_apart():
    engine = make_engine(num_pages=8)
    ask(engine, range(20))
    ask(engine, range(20, 40))  # needs 7 of the 8 pages
    assert engine.stats.returned_tokens == 0
    output, steps = ask(engine, range(20))
    assert output.num_cached_tokens == 19
    assert steps == [1] * 6
    assert (engine.stats.cached_tokens, engine.stats.returned_tokens) == (19, 16)
    assert engine.stats.swapped_pages == engine.model.swap.num_swapped > 0


def test_what_is_on_the_device_and_what_comes_back_make_one_prefix():
    engine = make_engine(num_pages=8)
    ask(engine, range(24))
    ask(engine, [49 - n for n in range(10)])  # drops the end of it
    output, steps = ask(engine, [*range(24), 30, 31])
    assert output.num_cached_tokens == 24
    assert 0 < engine.stats.returned_tokens < 24
    assert steps[0] == 2


def test_without_host_memory_they_are_computed_again():
    engine = make_engine(num_pages=8, num_host_pages=0)
    ask(engine, range(20))
    ask(engine, range(20, 40))
    assert ask(engine, range(20))[1][0] > 1
    assert (engine.stats.returned_tokens, engine.stats.swapped_pages) == (0, 0)
    assert engine.model.swap is None


def test_another_tenant_finds_nothing_on_the_host_and_likelihoods_of_a_prompt_are_computed():
    engine = make_engine(num_pages=8)
    ask(engine, range(20), SamplingParams(max_tokens=6, cache_salt="a"))
    ask(engine, range(20, 40))
    assert ask(engine, range(20), SamplingParams(max_tokens=6, cache_salt="b"))[0].num_cached_tokens == 0
    params = SamplingParams(max_tokens=6, cache_salt="a", prompt_logprobs=1)
    assert ask(engine, range(20), params)[0].num_cached_tokens == 0
    assert engine.stats.returned_tokens == 0


def test_two_engines_on_one_model_find_what_the_other_one_left_on_the_host():
    model = FakeModel(num_pages=8, page_size=PAGE, num_host_pages=64)
    first, second, blind = Engine(model), Engine(model), Engine(model, enable_prefix_caching=False)
    ask(first, range(20))
    ask(second, range(20, 40))
    assert ask(blind, range(20))[0].num_cached_tokens == 0
    assert ask(second, range(20))[0].num_cached_tokens == 19
    assert second.stats.returned_tokens > 0
    assert blind.stats.returned_tokens == first.stats.returned_tokens == 0


def test_a_reset_forgets_the_host_too():
    engine = make_engine(num_pages=8)
    ask(engine, range(20))
    ask(engine, range(20, 40))
    engine.reset_prefix_cache()
    assert engine.model.swap.num_swapped == 0
    assert ask(engine, range(20))[0].num_cached_tokens == 0
    assert engine.stats.returned_tokens == 0


# Preemption


def preempted(num_host_pages: int, **options) -> tuple[Engine, list[int], dict]:
    """Two requests that the pool has not room for at once, so that the second gives its pages up for good."""
    engine = make_engine(num_pages=10, num_host_pages=num_host_pages, **options)
    params = SamplingParams(max_tokens=20)
    prompts = [list(range(15)), list(range(20, 38))]
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    outputs = drain(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert outputs[request_id].token_ids == engine.model.continuation(prompt, 20)
    return engine, ids, outputs


def test_of_a_preempted_request_at_most_the_last_partly_filled_page_is_computed_again():
    engine, (_, second), outputs = preempted(64)
    without, _, _ = preempted(0)
    preemptions = outputs[second].preemptions
    assert preemptions > 0
    once = 15 + 18 + 2 * 19
    assert once <= engine.stats.computed_tokens < once + preemptions * PAGE
    assert without.stats.computed_tokens > once + preemptions * PAGE
    assert engine.stats.returned_tokens > 0


def test_a_preempted_request_is_computed_again_where_that_is_cheaper():
    engine = make_engine(num_pages=10)
    engine.model.swap.costs.bytes_per_second = 1e-6
    params = SamplingParams(max_tokens=20)
    ids = [engine.add_request(prompt, params) for prompt in (list(range(15)), list(range(20, 37)))]
    outputs = drain(engine)
    assert outputs[ids[1]].preemptions > 0
    assert engine.stats.returned_tokens == 0
    assert outputs[ids[1]].token_ids == engine.model.continuation(range(20, 37), 20)


def test_the_engine_measures_what_a_token_costs():
    engine = make_engine()
    assert engine.model.swap.costs.seconds_per_token == math.inf
    ask(engine, range(20))
    assert 0 < engine.model.swap.costs.seconds_per_token < 60


@pytest.mark.parametrize(
    "groups", [(Visibility(),), (Visibility(), Visibility(3)), (Visibility(5),)], ids=str
)
def test_samples_and_beams_that_gave_their_pages_up_find_them_again(groups):
    engine = make_engine(num_pages=16 if len(groups) == 1 else 24, groups=groups)
    sampled = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=12)
    searched = BeamSearchParams(3, 12)
    prompts = [list(range(i, i + 13)) for i in (0, 20, 30)]
    ids = [
        engine.add_request(prompt, params)
        for prompt, params in zip(prompts, (sampled, sampled, searched), strict=True)
    ]
    outputs = {}
    while engine.has_unfinished:
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output}
        if engine.stats.steps % 5 == 4:
            engine._scheduler.preempt_all()
            engine.model.prefix_cache.evict(100)
    texts = [[completion.token_ids for completion in outputs[i].outputs] for i in ids]
    assert texts[:2] == [engine.model.samples(prompt, sampled) for prompt in prompts[:2]]
    assert texts[2] == [text for text, _ in engine.model.beams(prompts[2], searched)]
    assert engine.stats.returned_tokens > 0
    assert engine.model.allocator.num_available == engine.model.num_pages


# Failures


INTERRUPTED = {"bring_back", "_load", "_save", "_copy"}


def test_an_interruption_before_any_line_of_a_copy_loses_no_page_and_no_token():
    reached = set()
    params = SamplingParams(max_tokens=2)
    for at in itertools.count(1, 3):
        engine = make_engine(num_pages=5, num_host_pages=4)
        model = engine.model
        with interrupted(INTERRUPTED, at, swap) as lines:
            for start in (0, 20, 0):
                prompt = list(range(start, start + 15))
                request_id = engine.add_request(prompt, params)
                for _ in range(2):
                    with suppress(KeyboardInterrupt):
                        outputs = drain(engine)
                assert not engine.has_unfinished
        del request_id, outputs
        reached |= set(lines)
        assert model.allocator.num_owned == 0
        assert ask(engine, range(20, 35), params)
        assert model.allocator.num_owned == model.swap.allocator.num_owned == 0
        model.swap.audit()
        if len(lines) < at:
            assert engine.stats.returned_tokens > 0, "without an interruption"
            break
    assert reached == INTERRUPTED


def test_a_host_page_that_was_given_to_another_breaks_the_step_and_the_request_is_computed():
    engine = make_engine(num_pages=8)
    ask(engine, range(20))
    ask(engine, range(20, 40))
    engine.model.swap.allocator.unkeep(range(64))
    request_id = engine.add_request(list(range(20)), PARAMS)
    with pytest.raises(PageStateError, match=r"host page \d+ must hold page \d+ of a text"):
        engine.step()
    assert drain(engine)[request_id].token_ids == engine.model.continuation(range(20), 6)


# Models


@pytest.mark.parametrize(
    ("family", "kv_dtype", "num_pages"),
    [("llama", "int8", 10), ("gemma3", None, 16), ("deepseek_v3", "fp8_e4m3", 10)],
)
def test_tokens_of_a_model_are_the_same_whether_its_pages_were_swapped_or_not(
    family, kv_dtype, num_pages, monkeypatch
):
    """With freed pages NaN, and copies checked for every byte."""
    monkeypatch.setenv("QUIRE_DEBUG", "1")
    model = tiny_model(family, eos_token_id=None, num_hidden_layers=2, **_LAYERS.get(family, {}))
    prompts = [[3 + (7 * i + 11 * j) % 90 for i in range(21)] for j in range(3)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    options = {"page_size": PAGE, "kv_dtype": kv_dtype, "backend": "reference", "swap_bytes": 1e6}
    llm = LLM(model, num_pages=num_pages, **options)
    alone = LLM(llm.model, enable_prefix_caching=False)
    expected = [alone.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert isinstance(llm.model.swap.store, HostPool)
    llm.model.swap.costs.bytes_per_second = math.inf
    for _ in range(2):
        assert [o.token_ids for o in llm.generate(prompts, params)] == expected
    assert llm.stats.returned_tokens > 0


_LAYERS = {
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {"first_k_dense_replace": 1},
}


def test_an_ordinary_model_generates_the_tokens_of_generate_with_its_pages_swapped(model, prompts, expected):
    llm = LLM(model, page_size=PAGE, num_pages=24, swap_bytes=1 << 20)
    llm.model.swap.costs.bytes_per_second = math.inf
    params = SamplingParams(max_tokens=20)
    for _ in range(2):
        assert [o.token_ids for o in llm.generate(prompts, params)] == expected
    assert llm.stats.returned_tokens > 0
    assert one_by_one(model, [prompts[1]], 2)[0] == expected[1][:2]


def test_host_memory_is_as_many_whole_pages_as_fit_and_an_llm_says_so():
    model = tiny_model("llama", num_hidden_layers=2)
    page_bytes = 2 * 2 * PAGE * 2 * 16 * 4  # K and V of 2 layers, 2 heads of 16 floats
    llm = LLM(model, page_size=PAGE, num_pages=4, swap_bytes=3 * page_bytes + 1)
    assert llm.model.swap.store.bytes_per_page == page_bytes
    assert llm.model.swap.store.num_pages == 3
    assert 0 < llm.model.swap.costs.bytes_per_second < math.inf
    llm.generate([[n] * 9 for n in range(3, 8)], SamplingParams(max_tokens=2))
    assert repr(llm).endswith("Swap(3 of 3 pages on the host)))")
    assert llm.stats.swapped_pages == 3
    with pytest.raises(
        ArgumentError, match=f"hold at least one page of {page_bytes} bytes; got {page_bytes - 1}"
    ):
        make_swap(llm.model.prefix_cache, llm.model._cache.pools, page_bytes - 1)


@pytest.mark.parametrize("swap_bytes", [-1, "1 GB", True, math.inf])
def test_swap_bytes_that_are_no_size_are_refused_before_any_work(model, swap_bytes, monkeypatch):
    monkeypatch.setattr("quire.hf.model.PackedForward", None)  # whoever calls it fails otherwise
    with pytest.raises(ArgumentError, match=r"swap_bytes must be .*; got .*Fix: swap_bytes="):
        LLM(model, swap_bytes=swap_bytes)


def test_host_memory_belongs_to_the_model_on_pages_and_to_prefix_caching():
    paged = PagedModel(tiny_model("llama", num_hidden_layers=1), page_size=PAGE, num_pages=4)
    assert LLM(paged, swap_bytes=0).model.swap is None
    assert "Swap" not in repr(paged)
    with pytest.raises(ArgumentError, match="swap_bytes must be left out"):
        LLM(paged, swap_bytes=1 << 20)
    with pytest.raises(ArgumentError, match="swap_bytes must be 0 without prefix caching"):
        LLM(swap_bytes=1 << 20, enable_prefix_caching=False)
