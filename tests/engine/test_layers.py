"""The engine over layers with windows and chunks, and on quantised pages; prompts come in pieces, pages run out."""

from __future__ import annotations

import pytest
import torch
from hf.families import VOCAB, tiny_model

from quire.engine.llm import LLM
from quire.engine.params import SamplingParams
from quire.hf import PagedModel

from .texts import one_by_one

NEW_TOKENS = 10
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
LENGTHS = (19, 3, 11, 26)  # a window is 7 tokens, a chunk 8, a page 4


def random_prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def poisoned(model, num_pages: int, **options) -> PagedModel:
    paged = PagedModel(model, page_size=4, num_pages=num_pages, backend="reference", **options)
    paged.poison(range(num_pages))
    return paged


@pytest.mark.parametrize(("family", "num_pages"), [("mistral", 8), ("llama4", 24)])
def test_windows_and_chunks_of_layers_hold_when_prompts_come_in_pieces_and_pages_are_taken(family, num_pages):
    """These layers give back pages before any run out, so the youngest request's are taken every few steps."""
    model = tiny_model(family, eos_token_id=None)
    prompts = random_prompts(0)
    expected = one_by_one(model, prompts, NEW_TOKENS)
    llm = LLM(poisoned(model, num_pages), max_batch_tokens=10)
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    outputs = {}
    while llm.has_unfinished:
        outputs |= {delta.request_id: delta.output for delta in llm.step() if delta.output is not None}
        if llm.stats.steps % 7 == 0 and llm._scheduler.running:
            llm._scheduler.preempt_last()
    assert [outputs[i].token_ids for i in ids] == expected
    assert sum(output.preemptions for output in outputs.values()) > 0
    assert llm.model.allocator.num_available == num_pages


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3"])
def test_quantised_pages_give_the_tokens_of_one_prompt_at_a_time_on_such_pages(kv_dtype):
    model = tiny_model("llama", eos_token_id=None)
    prompts = random_prompts(1)
    roomy = LLM(poisoned(model, num_pages=13, kv_dtype=kv_dtype))
    alone = [roomy.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    crowded = LLM(poisoned(model, num_pages=13, kv_dtype=kv_dtype), max_batch_tokens=10)
    outputs = crowded.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == alone
    assert sum(output.preemptions for output in outputs) > 0, "this pool was meant to be too small"
    assert alone != one_by_one(model, prompts, NEW_TOKENS), "rounded pages were meant to show"
