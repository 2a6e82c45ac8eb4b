"""Beam search: texts, order and scores are those of model.generate, whatever else is served beside it."""

from __future__ import annotations

import pytest
import torch
from hf.families import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from quire.engine.llm import LLM
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.hf import PagedModel

VOCAB = 24
NO_TEXT = -1e8  # transformers fills places without a text with a score below


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """So few tokens that texts end, die and meet often."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (9, 1, 16)]


def expected(model, prompt: list[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    """What transformers finds, the best first: tokens and score; greedy search has no scores."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # token 0 is also what pads
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        do_sample=False,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = []
    for row, tokens in enumerate(found.sequences[:, len(prompt) :].tolist()):
        end = next((i + 1 for i, token in enumerate(tokens) if token in eos), params.max_tokens)
        score = float(found.sequences_scores[row]) if params.beam_width > 1 else None
        if score is None or score > NO_TEXT:
            texts.append((tokens[:end], score))
    return texts


def check(output, texts: list[tuple[list[int], float]], params: BeamSearchParams) -> None:
    assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _ in texts]
    assert [completion.index for completion in output.outputs] == list(range(len(texts)))
    for completion, (tokens, score) in zip(output.outputs, texts, strict=True):
        if score is not None:
            assert completion.score == pytest.approx(score, abs=2e-5, rel=2e-5)
        assert completion.score == pytest.approx(
            completion.cumulative_logprob / len(tokens) ** params.length_penalty
        )


def make_llm(model, num_pages: int = 300, *, kv_dtype=None, **options) -> LLM:
    paged = PagedModel(model, page_size=4, num_pages=num_pages, backend="reference", kv_dtype=kv_dtype)
    return LLM(paged, **options)


MANY = [3, 7, 11, 12, 20]  # end-of-text tokens
CASES = [(-1.0, 4, 9), (0.0, 3, 12), (1.0, 4, 12), (2.0, 2, 9)]  # length_penalty, beam_width, max_tokens


@pytest.mark.parametrize(
    ("eos", "early_stopping"),
    # With five the three ways to stop find different texts, with none and one they rarely do.
    [([], False), ([3], False), (MANY, False), (MANY, True), (MANY, "never")],
)
def test_texts_order_and_scores_are_those_of_transformers(model, prompts, eos, early_stopping):
    model.generation_config.eos_token_id = eos or None
    llm = make_llm(model)
    lengths = set()
    for case in CASES:
        length_penalty, width, max_tokens = case
        params = BeamSearchParams(width, max_tokens, length_penalty, early_stopping)
        for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
            check(output, expected(model, prompt, params), params)
            lengths |= {len(completion.token_ids) for completion in output.outputs}
    assert (len(lengths) > 3) == bool(eos), "texts must end at different lengths"
    assert llm.model.allocator.num_available == llm.model.num_pages


@pytest.mark.exhaustive
@pytest.mark.parametrize("eos", [[], [3], [3, 7, 11, 12, 20]])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 0.5, 1.0, 2.0])
def test_more_texts_order_and_scores_are_those_of_transformers(model, eos, early_stopping, length_penalty):
    model.generation_config.eos_token_id = eos or None
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in range(1, 13)]
    llm = make_llm(model, num_pages=40, max_batch_tokens=9)
    for width, max_tokens in ((2, 20), (4, 14), (6, 7)):
        params = BeamSearchParams(width, max_tokens, length_penalty, early_stopping)
        for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
            check(output, expected(model, prompt, params), params)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_one_beam_is_greedy_search(model, prompts, early_stopping):
    model.generation_config.eos_token_id = [3, 7, 11]
    llm = make_llm(model)
    params = BeamSearchParams(1, 12, 1.0, early_stopping)
    outputs = llm.beam_search(prompts, params)
    for prompt, output, greedy in zip(
        prompts, outputs, llm.generate(prompts, SamplingParams(max_tokens=12)), strict=True
    ):
        check(output, expected(model, prompt, params), params)
        assert output.token_ids == greedy.token_ids
        assert output.finish_reason == greedy.finish_reason
    assert {output.finish_reason for output in outputs} == {"stop", "length"}


@pytest.mark.parametrize("eos", [[], [3, 9, 19]])
def test_one_token_ends_every_text(model, prompts, eos):
    model.generation_config.eos_token_id = eos or None
    params = BeamSearchParams(6, 1)
    for prompt, output in zip(prompts, make_llm(model).beam_search(prompts, params), strict=True):
        check(output, expected(model, prompt, params), params)
        for completion in output.outputs:
            assert completion.finish_reason == ("stop" if completion.token_ids[-1] in eos else "length")


def test_a_text_that_ends_with_its_first_token_counts(model, prompts):
    """The likeliest first tokens end the text: one of length 1 comes back, and the others go on."""
    params = BeamSearchParams(3, 8, 0.0)
    model.generation_config.eos_token_id = None
    first = [expected(model, prompt, BeamSearchParams(2, 1))[0][0][0] for prompt in prompts]
    for prompt, eos in zip(prompts, first, strict=True):
        model.generation_config.eos_token_id = [eos]
        [output] = make_llm(model).beam_search([prompt], params)
        check(output, expected(model, prompt, params), params)
        assert [eos] in [completion.token_ids for completion in output.outputs]


def test_more_beams_than_there_are_texts_return_each_text_once(model, prompts):
    model.generation_config.eos_token_id = None
    params = BeamSearchParams(VOCAB + 6, 1)
    for prompt in prompts:
        [output] = make_llm(model).beam_search([prompt], params)
        assert len(output.outputs) == VOCAB
        check(output, expected(model, prompt, params), params)


def test_more_beams_than_tokens_are_all_used_once_texts_are_long_enough(model, prompts):
    model.generation_config.eos_token_id = None
    params = BeamSearchParams(VOCAB + 6, 3)
    for prompt in prompts:
        [output] = make_llm(model).beam_search([prompt], params)
        check(output, expected(model, prompt, params), params)
        assert len(output.outputs) == VOCAB + 6


@pytest.mark.parametrize("family", ["mistral", "llama4", "gpt_oss"])
def test_layers_with_windows_and_chunks_find_the_texts_of_transformers(family):
    model = tiny_model(family)
    prompts = [[5 + i % 60 for i in range(0, 7 * n, 7)] for n in (3, 13)]
    params = BeamSearchParams(3, 8)
    llm = make_llm(model, 30, max_batch_tokens=5)
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        check(output, expected(model, prompt, params), params)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("caching", [True, False])
def test_pages_that_are_few_and_poisoned_change_no_text(model, prompts, kv_dtype, caching):
    """Searches that give their pages up and compute them again, beside one another and beside other requests."""
    model.generation_config.eos_token_id = [3, 7]
    params = BeamSearchParams(4, 10, 1.0, "never")
    alone = [make_llm(model, kv_dtype=kv_dtype).beam_search([prompt], params)[0] for prompt in prompts]
    paged = PagedModel(model, page_size=4, num_pages=16, backend="reference", kv_dtype=kv_dtype)
    paged.poison(range(16))
    paged.allocator._on_drop = paged.poison  # as with QUIRE_DEBUG=1: what is dropped shows if it is read
    llm = LLM(paged, max_batch_tokens=7, enable_prefix_caching=caching)
    ids = [llm.add_request(prompt, params) for prompt in prompts]
    beside = llm.add_request(prompts[0], SamplingParams(max_tokens=9))
    outputs = {}
    while llm.has_unfinished:
        outputs |= {delta.request_id: delta.output for delta in llm.step() if delta.output}
    assert sum(output.preemptions for output in outputs.values()) > 0
    for request_id, own in zip(ids, alone, strict=True):
        assert [c.token_ids for c in outputs[request_id].outputs] == [c.token_ids for c in own.outputs]
        assert [c.score for c in outputs[request_id].outputs] == pytest.approx([c.score for c in own.outputs])
    [expected_beside] = make_llm(model, kv_dtype=kv_dtype).generate(prompts[0], SamplingParams(max_tokens=9))
    assert outputs[beside].token_ids == expected_beside.token_ids
    assert llm.model.allocator.num_available == 16
