"""The demo model itself, and the folder it is stored in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from demo_model.corpus import VOCAB_SIZE
from demo_model.turns import CHAT_TEMPLATE, END_OF_TEXT

CONTEXT = 1024


def causal_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of whole windows, for which no mask is made; query [batch, heads, tokens, head_dim]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("whole_windows", causal_attention)


def build_model(attention: str = "whole_windows") -> LlamaForCausalLM:
    """A Llama of 5.6 M parameters: 11.3 MB in bf16, a group of 4 query heads on every KV head.

    attention: "whole_windows" for training, "sdpa" for generating, which needs masks.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    return model


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; windows [batch, context + 1]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def export(weights: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder: configs, tokenizer with its chat template, bf16 weights."""
    model = build_model("sdpa")
    model.load_state_dict({name: weight.float().cpu() for name, weight in weights.items()}, strict=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    _compute_in_float32(folder / "config.json")
    (folder / "model.safetensors").chmod(0o644)
    fast = FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder, save_jinja_files=False)


def _compute_in_float32(config: Path) -> None:
    """Let the config name the dtype to compute in, which is not the one that the weights are stored in."""
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
