# ruff: noqa: C408 (configs are written as the keyword arguments they become)
"""What would be silently wrong on pages is refused before the first step, with a sentence that says why."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from quire.errors import UnsupportedError

from ..families import VOCAB, on_pages, tiny_model

SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MAMBA = dict(mamba_d_state=4, mamba_expand=2, num_key_value_heads=2)
REFUSED = {
    "diffllama": (hf.DiffLlamaForCausalLM, hf.DiffLlamaConfig, dict(num_key_value_heads=2),
                  "; got diffllama: "),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, {},
              "attend through AttentionInterface; got bloom: no layer that does"),
    "mpt": (hf.MptForCausalLM, hf.MptConfig, dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
            "attend through AttentionInterface; got mpt: no layer that does"),
    "jamba": (hf.JambaForCausalLM, hf.JambaConfig, dict(MAMBA, num_experts=2),
              "got jamba: layer 0 of type "),
    "qwen3_next": (hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig, dict(num_key_value_heads=2, num_experts=2),
                   "got qwen3_next: layer 0 of type 'linear_attention'"),
    "falcon_h1": (hf.FalconH1ForCausalLM, hf.FalconH1Config, dict(MAMBA, mamba_d_ssm=64, mamba_n_heads=4),
                  "got falcon_h1: layer 0 of type 'hybrid'"),
    "bert": (hf.BertLMHeadModel, hf.BertConfig, {},
             "see all earlier tokens, a window or a chunk; got bert: layer 0 with another mask"),
    "bart": (hf.BartForCausalLM, hf.BartConfig,
             dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
             "give the same logits on pages as without; got bart: logits off by"),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, dict(d_model=32, num_layers=2, num_heads=4, d_kv=8),
           "be a decoder alone; got t5: an encoder-decoder"),
    "doge": (hf.DogeForCausalLM, hf.DogeConfig, dict(num_key_value_heads=2),
             "keep the causal masks that transformers builds; got doge: layer 0 with a mask of its own"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_pages_cannot_serve_is_refused_by_name_and_reason(model_type):
    model_class, config_class, options, sentence = REFUSED[model_type]
    model = model_class(config_class(**{**SMALL, **options})).eval()
    with pytest.raises(UnsupportedError) as refusal:
        on_pages(model)
    assert sentence in str(refusal.value)
    assert str(refusal.value).endswith("Fix: use model.generate")


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(
        UnsupportedError, match=r"in eval mode; got llama: training mode.*Fix: model\.eval\(\)"
    ):
        on_pages(tiny_model("llama").train())


def test_an_encoder_made_a_decoder_is_served():
    config = hf.BertConfig(**SMALL, is_decoder=True)
    on_pages(hf.BertLMHeadModel(config).eval())


def test_a_window_that_mask_and_layer_disagree_on_is_refused():
    model = tiny_model("gpt_oss")
    model.model.layers[2].self_attn.sliding_window = 6
    with pytest.raises(
        UnsupportedError, match="6 tokens; got gpt_oss: layer 2 whose mask shows a window of 5"
    ):
        on_pages(model)


def with_attention_of_layer_1(attend):
    """A llama whose second layer calls attend(plain, hidden_states, **options) in place of plain."""
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    plain = attention.forward
    attention.forward = lambda hidden_states, **options: attend(plain, hidden_states, **options)
    return model


def test_a_layer_that_attends_twice_is_refused():
    def twice(plain, hidden_states, **options):
        once, _ = plain(hidden_states, **options)
        return plain(once, **options)

    with pytest.raises(UnsupportedError, match="got llama: layer 1 attending 2 times"):
        on_pages(with_attention_of_layer_1(twice))


def test_a_layer_that_never_attends_is_refused():
    def never(plain, hidden_states, **options):
        return hidden_states, None

    with pytest.raises(UnsupportedError, match="got llama: layer 1 attending never"):
        on_pages(with_attention_of_layer_1(never))


def test_an_argument_without_a_rule_is_refused():
    def biased(plain, hidden_states, **options):
        return plain(hidden_states, **options, position_bias=torch.zeros(1))

    with pytest.raises(UnsupportedError, match="got llama: layer 1 passing position_bias"):
        on_pages(with_attention_of_layer_1(biased))


def test_a_model_that_returns_the_last_rows_instead_of_those_asked_for_is_refused():
    model = tiny_model("llama")
    plain = model.forward

    def last_rows(logits_to_keep=0, **options):
        count = len(logits_to_keep) if isinstance(logits_to_keep, torch.Tensor) else logits_to_keep
        return plain(logits_to_keep=count, **options)

    model.forward = last_rows
    with pytest.raises(UnsupportedError, match="same logits on pages as without"):
        on_pages(model)


def with_embedding(model, embed):
    """The model with an embedding that gives embed(weight, input_ids)."""
    embedding = model.model.embed_tokens
    embedding.forward = lambda input_ids: embed(embedding.weight, input_ids)
    return model


def test_state_kept_outside_attention_is_refused():
    def remember(weight, input_ids):
        return weight[input_ids].cumsum(1)

    with pytest.raises(UnsupportedError, match="same logits on pages as without; got llama: logits off by"):
        on_pages(with_embedding(tiny_model("llama"), remember))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 1), ("llama", 2), ("gpt_oss", 2), ("llama4", 2), ("deepseek_v3", 2)]
)
def test_a_token_shift_in_the_last_layer_is_refused(family, layers, dtype):
    """Only the first row of each step is wrong: 7 of 70."""
    model = tiny_model(family, num_hidden_layers=layers, layer_types=None).to(dtype)
    model.model.layers[-1].post_attention_layernorm.register_forward_hook(
        lambda _, inputs, x: x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    )
    with pytest.raises(UnsupportedError, match=r"logits off by .* keeps something between tokens"):
        on_pages(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "wrong"), [("llama", 0.0), ("llama", torch.nan), ("gpt_oss", torch.nan)])
def test_a_single_wrong_row_per_step_is_refused(family, wrong, dtype):
    model = tiny_model(family).to(dtype)
    plain = model.forward

    def one_wrong_row(logits_to_keep=0, **options):
        out = plain(logits_to_keep=logits_to_keep, **options)
        if isinstance(logits_to_keep, torch.Tensor) and len(logits_to_keep) > 2:
            out.logits[:, 1] = wrong
        return out

    model.forward = one_wrong_row
    with pytest.raises(UnsupportedError, match="logits off by "):
        on_pages(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "embed",
    [
        lambda weight, ids: weight[ids],
        lambda weight, ids: torch.nn.functional.one_hot(ids, len(weight)).to(weight.dtype) @ weight,
        lambda weight, ids: weight.index_select(0, ids.flatten()).view(*ids.shape, -1),
    ],
    ids=["index", "matmul", "index_select"],
)
def test_embeddings_of_any_operator_are_admitted(embed, dtype):
    on_pages(with_embedding(tiny_model("llama").to(dtype), embed))
