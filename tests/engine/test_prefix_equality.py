"""A real model says the same whether its prompts are found in pages or not, with windows, chunks and rounded pages."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hf.families import VOCAB, tiny_model

from quire.engine.llm import LLM
from quire.engine.params import SamplingParams
from quire.hf import PagedModel

from .texts import one_by_one

NEW_TOKENS = 10
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def related_prompts(seed: int, number: int = 9) -> list[list[int]]:
    """Prompts of which many begin with one that came before, or with a part of it; a page is 4 tokens."""
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(number):
        shared = draw.choice(prompts)[: draw.randint(0, 24)] if prompts else []
        prompts.append(
            shared + [draw.randrange(3, VOCAB) for _ in range(draw.randint(0 if shared else 1, 9))]
        )
    return prompts


def make_llm(model, num_pages: int, caching: bool, **options) -> LLM:
    paged = PagedModel(model, page_size=4, num_pages=num_pages, backend="reference", **options)
    paged.poison(range(num_pages))
    paged.allocator._on_drop = paged.poison  # as with QUIRE_DEBUG=1: what is dropped shows if it is read
    return LLM(paged, max_batch_tokens=12, max_num_seqs=5, enable_prefix_caching=caching)


def serve(llm: LLM, prompts: list[list[int]], aborted: dict[int, int]) -> list[list[int] | None]:
    """Every prompt's tokens, all served together; aborted: request → the step after which it is dropped."""
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    tokens: dict[int, list[int]] = {}
    for step in range(10_000):
        if not llm.has_unfinished:
            break
        tokens |= {d.request_id: d.output.token_ids for d in llm.step() if d.output is not None}
        for index in (index for index, at in aborted.items() if at == step):
            llm.abort(ids[index])
    assert llm.model.allocator.num_available == llm.model.num_pages
    return [tokens.get(request_id) for request_id in ids]


# Small pools: those of Llama, Gemma and GPT-OSS so small that requests have to give up pages.
@pytest.mark.parametrize(
    ("family", "num_pages"), [("llama", 9), ("mistral", 8), ("llama4", 34), ("gemma3", 20), ("gpt_oss", 20)]
)
def test_cached_or_not_prompts_that_begin_alike_get_the_tokens_of_one_by_one(family, num_pages):
    model = tiny_model(family, eos_token_id=None)
    prompts = related_prompts(seed=10)
    expected = one_by_one(model, prompts, NEW_TOKENS)
    aborted, preempted = {1: 3, 4: 9}, 0
    for caching in (True, False):
        llm = make_llm(model, num_pages, caching)
        for _ in range(2):  # again, when much of it is cached, and some was dropped
            got = serve(llm, prompts, aborted)
            assert all(tokens in (None, own) for tokens, own in zip(got, expected, strict=True))
            assert {i for i, tokens in enumerate(got) if tokens is None} <= set(aborted)
        assert (llm.stats.cached_tokens > 0) == caching
        preempted += llm.stats.admitted_tokens > 2 * sum(map(len, prompts))
    assert preempted or family in ("mistral", "llama4"), "nobody was preempted in so small a pool"


@pytest.mark.parametrize(
    ("family", "kv_dtype", "num_pages"),
    [("llama", "int8", 14), ("llama", "fp8_e4m3", 14), ("gemma3", "int8", 20)],
)
def test_rounded_pages_that_are_found_give_the_tokens_of_those_computed(family, kv_dtype, num_pages):
    model = tiny_model(family, eos_token_id=None)
    prompts = related_prompts(seed=3)
    alone = make_llm(model, 40, False, kv_dtype=kv_dtype)
    expected = [alone.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    llm = make_llm(model, num_pages, True, kv_dtype=kv_dtype)
    assert serve(llm, prompts, {}) == expected
    assert serve(llm, prompts, {}) == expected
    assert llm.stats.cached_tokens > 0


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_prompt_that_is_cached_as_a_whole_gives_the_same_logits(family):
    """Its last token attends to the pages of others and to a copy, scales included."""
    for kv_dtype in (None, "int8"):
        llm = make_llm(tiny_model(family, eos_token_id=None), 20, True, kv_dtype=kv_dtype)
        forward, logits = llm.model.forward, []
        llm.model.forward = lambda step, forward=forward, logits=logits: (
            logits.append(forward(step)) or logits[-1]
        )
        prompt = list(range(3, 11))
        for cached in (0, 7):
            [output] = llm.generate(prompt, SamplingParams(max_tokens=1))
            assert output.num_cached_tokens == cached
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kv_dtype", "few"),
    [
        ("llama", None, 26),
        ("llama", "int8", 26),
        ("mistral", None, 13),
        ("llama4", None, 48),
        ("gpt_oss", None, 36),
    ],
)
def test_samples_of_a_real_model_are_those_of_requests_that_share_nothing(family, kv_dtype, few):
    model = tiny_model(family, eos_token_id=None)
    params = SamplingParams(n=3, temperature=0.8, max_tokens=NEW_TOKENS, ignore_eos=True, seed=5)
    prompts = related_prompts(seed=4, number=4)
    alone = make_llm(model, 100, False, kv_dtype=kv_dtype)
    expected = [
        [alone.generate(prompt, replace(params, n=1, seed=5 + i))[0].token_ids for i in range(3)]
        for prompt in prompts
    ]
    for num_pages, caching in ((200, True), (few, True), (few, False)):
        llm = make_llm(model, num_pages, caching, kv_dtype=kv_dtype)
        outputs = llm.generate(prompts, params)
        assert [[completion.token_ids for completion in output.outputs] for output in outputs] == expected
        assert any(output.preemptions for output in outputs) or num_pages == 200
        assert llm.model.allocator.num_available == num_pages
