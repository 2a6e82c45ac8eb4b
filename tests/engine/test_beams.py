"""Beam search: the texts, their order and their scores are those of model.generate, whatever else is served beside it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quire.engine.llm import LLM
from quire.engine.params import BeamSearchParams
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
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (9, 1, 16, 4, 23)]


def expected(model, prompt: list[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    """What transformers finds, the best first: tokens and score; greedy search has no scores."""
    eos = model.generation_config.eos_token_id or []
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


def make_llm(model, num_pages: int = 200, **options) -> LLM:
    return LLM(PagedModel(model, page_size=4, num_pages=num_pages, backend="reference"), **options)


@pytest.mark.parametrize("eos", [[], [3], [3, 7, 11, 12, 20]], ids=["none", "one", "five"])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_texts_order_and_scores_are_those_of_transformers(model, prompts, eos, early_stopping):
    model.generation_config.eos_token_id = eos or None
    llm = make_llm(model)
    lengths = set()
    for length_penalty in (-1.0, 0.0, 1.0, 2.0):
        for width, max_tokens in ((4, 12), (3, 5)):
            params = BeamSearchParams(width, max_tokens, length_penalty, early_stopping)
            outputs = llm.beam_search(prompts, params)
            for prompt, output in zip(prompts, outputs, strict=True):
                check(output, expected(model, prompt, params), params)
                lengths |= {len(completion.token_ids) for completion in output.outputs}
    assert (len(lengths) > 4) == bool(eos), "texts must end at different lengths"
    assert llm.model.allocator.num_available == llm.model.num_pages
