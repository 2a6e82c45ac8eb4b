"""Tiny random models whose greedy texts vary: a model that repeats one token would agree with any attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 2
VOCAB = SIZES["vocab_size"]


def configs() -> dict[str, Any]:
    """By family: the config, whether the embeddings are tied to the output."""
    import transformers as hf

    gemma = {**SIZES, "head_dim": 32, "sliding_window": 40, "query_pre_attn_scalar": 32, "layer_types": MIXED}
    return {
        "llama": hf.LlamaConfig(**SIZES, tie_word_embeddings=False),
        "mistral": hf.MistralConfig(**SIZES, head_dim=32, sliding_window=48, tie_word_embeddings=False),
        "gemma2": hf.Gemma2Config(**gemma, attn_logit_softcapping=5.0, final_logit_softcapping=30.0),
        "gemma3": hf.Gemma3TextConfig(**gemma),
        "bloom": hf.BloomConfig(
            vocab_size=VOCAB, hidden_size=256, n_layer=4, n_head=8, bos_token_id=1, eos_token_id=2
        ),
        "narrow": hf.LlamaConfig(**SIZES, head_dim=40, tie_word_embeddings=False),
    }


def save(family: str, folder: Path) -> None:
    """A model of the family with random weights of float32.

    Where the output is tied to small embeddings, a large last norm keeps a token's own embedding from deciding what
    follows it.
    """
    import transformers as hf

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(configs()[family]).float().eval()
    model.generation_config.eos_token_id = None
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                deviation = 1.5 * weights.shape[-1] ** -0.5
                if "embed" in name and "norm" not in name:
                    deviation = 0.01 if tied else 1.0
                weights.normal_(0, deviation)
        if tied and hasattr(model.model if hasattr(model, "model") else model, "norm"):
            model.model.norm.weight.fill_(15.0)
    model.save_pretrained(folder)
