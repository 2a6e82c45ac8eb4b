"""What callers of vLLM and of model.generate ask for, over a real model, against model.generate."""

from __future__ import annotations

import itertools

import pytest
import torch

from quire.engine.llm import LLM
from quire.engine.params import SamplingParams
from quire.engine.request import RequestOutput
from quire.engine.sampler import _probabilities
from quire.hf import PagedModel

from .conftest import NEW_TOKENS, VOCAB
from .fakes import EOS, byte_tokenizer
from .texts import one_by_one


@pytest.fixture(scope="module")
def paged(model) -> PagedModel:
    paged = PagedModel(model, page_size=4, num_pages=18, backend="reference")
    paged._cache.poison(range(18))
    return paged


def in_chunks_and_with_too_few_pages(paged, prompts, params, *, plain=None) -> list[RequestOutput]:
    """Outputs of all prompts together; with `plain`, every second prompt is asked with that instead."""
    llm = LLM(paged, tokenizer=byte_tokenizer(), max_batch_tokens=24)
    outputs = llm.generate(prompts, [plain if plain and i % 2 else params for i in range(len(prompts))])
    assert sum(output.preemptions for output in outputs) > 0, "this pool was meant to be too small"
    assert paged.allocator.num_available == paged.num_pages
    return outputs


def tokens_of(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def test_repetition_penalty_gives_the_tokens_of_generate(model, paged, prompts, expected):
    wanted = one_by_one(model, prompts, NEW_TOKENS, repetition_penalty=1.4)
    assert wanted != expected
    params = SamplingParams(max_tokens=NEW_TOKENS, repetition_penalty=1.4)
    assert tokens_of(in_chunks_and_with_too_few_pages(paged, prompts, params)) == wanted


def test_prompts_that_ask_for_nothing_keep_their_tokens_beside_those_that_ask(paged, prompts, expected):
    plain = SamplingParams(max_tokens=NEW_TOKENS)
    params = SamplingParams(max_tokens=NEW_TOKENS, repetition_penalty=1.4, logit_bias={5: 3.0}, logprobs=2)
    tokens = tokens_of(in_chunks_and_with_too_few_pages(paged, prompts, params, plain=plain))
    assert tokens[1::2] == expected[1::2]
    assert tokens[::2] != expected[::2]


def test_min_tokens_gives_the_tokens_of_min_new_tokens(model, paged, prompts, expected):
    end = expected[0][2]
    wanted = one_by_one(model, prompts, NEW_TOKENS, eos_token_id=[end, EOS], min_new_tokens=8)
    assert len(one_by_one(model, prompts[:1], NEW_TOKENS, eos_token_id=[end, EOS])[0]) == 3
    assert {len(tokens) for tokens in wanted} != {NEW_TOKENS}, "none of them ended"
    params = SamplingParams(max_tokens=NEW_TOKENS, stop_token_ids=[end], min_tokens=8)
    assert tokens_of(in_chunks_and_with_too_few_pages(paged, prompts, params)) == wanted


def test_bad_words_give_the_tokens_of_bad_words_ids(model, paged, prompts, expected):
    def is_word(tokens):
        return max(tokens) < 128 and not chr(tokens[0]).isspace()

    pairs = [pair for text in expected for pair in itertools.pairwise(text) if is_word(pair)]
    word, pair = bytes([next(t for t in expected[1] if is_word([t])), 32]), bytes(pairs[0])
    assert pair[0] not in {prompt[-1] for prompt in prompts}, "generate counts the prompt, vLLM does not"
    spellings = [list(form) for text in (word[:1], pair) for form in (text, b" " + text)]
    wanted = one_by_one(model, prompts, NEW_TOKENS, bad_words_ids=spellings)
    assert wanted != expected
    params = SamplingParams(max_tokens=NEW_TOKENS, bad_words=[word[:1].decode(), pair.decode()])
    assert tokens_of(in_chunks_and_with_too_few_pages(paged, prompts, params)) == wanted


@pytest.mark.parametrize(
    "options",
    [{"min_p": 0.02}, {"min_p": 0.3}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.6}, {}],
)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_what_is_drawn_from_is_what_generate_draws_from(model, prompts, options, temperature):
    for prompt in prompts[:3]:
        result = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=1,
            do_sample=True,
            **{"top_k": 0, "temperature": temperature} | options,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        params = SamplingParams(temperature=temperature, **options)
        ours = _probabilities(result.logits[0], [params.with_defaults()])
        theirs = result.scores[0].softmax(-1)
        assert torch.equal(ours > 0, theirs > 0)
        assert 1 <= int((ours > 0).sum()) <= VOCAB
        torch.testing.assert_close(ours / ours.sum(), theirs)


def test_logprobs_of_prompts_in_chunks_and_of_tokens_are_those_of_the_model(model, paged, prompts):
    params = SamplingParams(temperature=1.0, top_p=0.8, seed=1, max_tokens=16, logprobs=3, prompt_logprobs=2)
    outputs = in_chunks_and_with_too_few_pages(paged, prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [*prompt, *output.token_ids]
        with torch.inference_mode():
            exact = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        reported = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        assert len(reported) == len(tokens)
        for position, found in enumerate(reported[1:], 1):
            row, token = exact[position - 1], tokens[position]
            num = 2 if position < len(prompt) else 3
            assert list(found) == list(dict.fromkeys([token, *row.topk(num).indices.tolist()]))
            for token_id, each in found.items():
                assert each.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
                assert each.rank == int((row > row[token_id]).sum()) + 1
        own = exact[len(prompt) - 1 : -1].gather(1, torch.tensor(output.token_ids)[:, None]).sum()
        assert output.outputs[0].cumulative_logprob == pytest.approx(float(own), abs=1e-3)
