"""A tiny random model, prompts, and what its own generate makes of them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .fakes import EOS
from .texts import one_by_one

VOCAB = 257
NEW_TOKENS = 20


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,  # wide, so that what is attended to decides the logits
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in (17, 1, 40, 5, 16, 2, 33)]


@pytest.fixture(scope="session")
def expected(model, prompts) -> list[list[int]]:
    """Each prompt's greedy tokens, one prompt at a time, without pages."""
    return one_by_one(model, prompts, NEW_TOKENS)
