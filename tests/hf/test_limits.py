"""A sequence may grow as long as the model computes the same for its neighbours."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig, Phi3Config

from quire.errors import ArgumentError
from quire.hf.limits import max_seq_len

from .families import FAMILIES, tiny_model

LONGROPE = FAMILIES["phi3_longrope"][1]["rope_parameters"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=55), 55),
        (MambaConfig(), None),
        (LlamaConfig(max_position_embeddings=77, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                                                  "rope_theta": 1e4}), 77),
        (Phi3Config(max_position_embeddings=256, original_max_position_embeddings=64,
                    hidden_size=64, num_attention_heads=4, rope_parameters=LONGROPE), 64),
    ],
)  # fmt: skip
def test_the_limit_is_where_positions_end_or_frequencies_change(config, expected):
    assert max_seq_len(config) == expected


@torch.inference_mode()
def test_past_the_limit_of_longrope_one_sequence_does_change_another():
    """The reason for the limit: the day transformers decides per sequence, it can go."""
    rotary = tiny_model("phi3_longrope").model.rotary_emb

    def cosines_of_position_3(beside):
        return rotary(torch.zeros(1), torch.tensor([[beside, 3]]))[0][0, 1].clone()

    assert torch.equal(cosines_of_position_3(beside=10), cosines_of_position_3(beside=63))
    assert not torch.equal(cosines_of_position_3(beside=63), cosines_of_position_3(beside=64))


def test_the_user_may_set_a_smaller_limit_and_no_larger_one():
    config = LlamaConfig(max_position_embeddings=77)
    assert max_seq_len(config, at_most=77) == 77
    assert max_seq_len(config, at_most=5) == 5
    assert max_seq_len(MambaConfig(), at_most=5) == 5
    with pytest.raises(ArgumentError, match="max_model_len must be at most the model's 77 tokens; got 78"):
        max_seq_len(config, at_most=78)
    with pytest.raises(ArgumentError, match="max_model_len must be an int of at least 1; got 0"):
        max_seq_len(config, at_most=0)
