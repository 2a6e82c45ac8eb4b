# ruff: noqa: C408 (configs are written as the keyword arguments they become)
"""Which decoder-only models of the installed transformers run on pages, and why the others do not.

Builds a tiny random model of every type in transformers' causal language model mapping, hands it to
PagedModel and, where the guard lets it pass, compares every logit of three texts served in mixed steps with
the ordinary model's.

    python scripts/survey_models.py --write docs/models.md     # half a minute on one core
    python scripts/survey_models.py llama gemma2               # these only, printed
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hf.families import SCHEDULE, VOCAB, Server, on_pages, random_texts

from quire.errors import UnsupportedError
from quire.hf import PagedModel

NO_FIX = ". Fix: use model.generate"
TOLERANCE = 1e-4  # of the largest logit
INTRODUCTION = """# Which models run on pages

Measured, not claimed: `scripts/survey_models.py` builds a tiny random float32 model of each of the {count}
types in transformers' causal language model mapping (transformers {version}, torch {torch}) and hands it to
`PagedModel` on the reference backend. Where the guard lets it pass, three texts are served in mixed prefill,
chunk and decode steps on pages whose unowned slots are NaN, and every logit is compared with the ordinary
model's: the error below is the largest difference as a share of the largest logit. Windows and chunks are cut
to 6 and 8 tokens, so that the texts (up to {longest} tokens) outgrow them.

    python scripts/survey_models.py --write docs/models.md     # half a minute on one core

The same guard runs on the real model when `PagedModel` is made: a checkpoint whose config turns on something
its family does not have here is judged by its own layers, not by this table.

Limits that hold for supported models too:

- Rotary embeddings of type "longrope" (Phi-3 128k) and "dynamic" change all frequencies once any sequence of
  the batch passes a threshold; `max_seq_len` ends there (Phi-3: at `original_max_position_embeddings`).
- Chunked attention (Llama-4) needs a page_size that divides `attention_chunk_size`.
- Layers that share keys and values (Gemma-3n, Gemma-4) each keep their own copy in pages.
- Keys and values of different width (latent attention, DeepSeek-V3) are kept at the wider of the two.
- Models that see pictures or hear are served for text alone.
"""
UNTRIED = """A config this small, or the survey's way of making one, does not suit these; the guard judges the
real model.
"""
MAX_PARAMETERS = 100_000_000

# Whichever of these a config has is made small; the rest stays as the family's own default.
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, sliding_window=6,
    attention_chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    rope_dim=8, rotary_dim=8, num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_topk=2, moe_k=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, n_group=1, topk_group=1, intermediate_size_mlp=48,
    n_shared_experts=1, expert_ffn_hidden_size=16, ffn_hidden_size=48, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, qk_head_dim=16, global_head_dim=32,
    num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
    word_embed_proj_dim=64, embedding_size=64, n_inner=48, ffn_dim=48, decoder_layers=4,
    decoder_attention_heads=4, decoder_ffn_dim=48, d_model=64, d_ff=48, n_positions=256,
    max_seq_len=256, n_ctx=256, kv_channels=16, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=32,
    mamba_d_ssm=128, mamba_expand=2, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=8,
    state_size=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, index_n_heads=2, index_head_dim=16, index_topk=4, image_size=32,
    patch_size=8, depth=2, num_heads=4, embed_dim=64, encoder_layers=4, encoder_attention_heads=4,
    encoder_ffn_dim=48, mlp_dim=48, altup_num_inputs=2, laurel_rank=8,
)  # fmt: skip

ONLY_IF_SET = ("sliding_window", "num_kv_shared_layers")

# What a family needs besides to be this small, or to show its other face.
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXTRAS: dict[str, dict[str, Any]] = {
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0), ffn_config=dict(ffn_hidden_size=48)
    ),
    "gemma3_text": dict(layer_types=ALTERNATING),
    "gemma3n_text": dict(layer_types=ALTERNATING),
    "gemma4_text": dict(layer_types=ALTERNATING),
    "gemma4_unified_text": dict(layer_types=ALTERNATING),
    "gemma4": dict(text_config=dict(layer_types=ALTERNATING)),
    "gemma4_unified": dict(text_config=dict(layer_types=ALTERNATING)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "laguna": dict(layer_types=ALTERNATING, sliding_window=6),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8, head_dim=16),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"] * 2),
    "mixtral": dict(sliding_window=6),
    "modernbert-decoder": dict(local_attention=12),
    "nemotron_h": dict(layers_block_type=["mamba", "attention"] * 2),
    "phi3": dict(sliding_window=6),
    "phimoe": dict(sliding_window=6),
    "qwen2": dict(sliding_window=6, use_sliding_window=True, max_window_layers=2),
    "qwen3": dict(sliding_window=6, use_sliding_window=True, max_window_layers=2),
    "reformer": dict(is_decoder=True),
    "starcoder2": dict(sliding_window=6),
    "xmod": dict(default_language="en_XX"),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}


def tiny_config(config_class: type, **extras: Any) -> PretrainedConfig:
    """A family's default config with every known size made small, in its parts too."""
    names = {field.name for field in dataclasses.fields(config_class)}
    renamed = getattr(config_class, "attribute_map", {})
    options = {}
    for name, value in SMALL.items():
        name = renamed.get(name, name)
        if name in names and not (name in ONLY_IF_SET and getattr(config_class, name, None) is None):
            options[name] = value
    if "qk_rope_head_dim" in names and "head_dim" in names:
        options["head_dim"] = SMALL["qk_rope_head_dim"]
    if "kv_lora_rank" in names:  # multi-head latent attention has no groups
        options["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name, part in config_class.sub_configs.items():
        part_class = getattr(part, "config_class", part)
        if isinstance(part_class, type) and dataclasses.is_dataclass(part_class) and part_class.model_type:
            values = tiny_config(part_class, **extras.pop(name, {})).to_dict()
            options[name] = {key: value for key, value in values.items() if value is not None}
    return config_class(**{**options, **extras})


@torch.no_grad()
def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model with weights wide enough for its attention to be peaked."""
    config = tiny_config(CONFIG_MAPPING[model_type], **EXTRAS.get(model_type, {}))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise MemoryError(f"{size / 1e6:.0f} M parameters at its smallest")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 0.2)
        elif "q_norm" in name or "k_norm" in name:
            parameter.fill_(1.7)
    return model


@torch.inference_mode()
def largest_error(model: PreTrainedModel, paged: PagedModel) -> float:
    """max |Δlogit| of pages against the ordinary model, as a share of the largest |logit|."""
    texts = random_texts()
    expected = {name: model(input_ids=text[None], use_cache=False).logits[0] for name, text in texts.items()}
    server = Server(paged, texts)
    errors = [
        (row - expected[name][position]).abs().max()
        for counts in SCHEDULE
        for name, position, row in server.step(counts)
    ]
    return float(torch.stack(errors).max() / max(x.abs().max() for x in expected.values()))


def survey(model_type: str) -> tuple[str, str]:
    """(verdict, detail) for one family: supported, refused, not tried or WRONG."""
    try:
        model = tiny_model(model_type)
        model.config._attn_implementation = "eager"
        with torch.inference_mode():
            logits = model(input_ids=random_texts()["a"][None], use_cache=False).logits
        if not logits.isfinite().all():
            return "not tried", "a random model of this size gives no finite logits"
    except Exception as error:  # whatever a family dislikes about a config this small
        reason = " ".join(str(error).split()).removeprefix("Class validation error for validator ")
        return "not tried", f"{type(error).__name__}: {reason[:150]}"
    try:
        paged = on_pages(model)
    except UnsupportedError as refusal:
        return "refused", str(refusal).removeprefix("to run on pages, a model must ").removesuffix(NO_FIX)
    error = largest_error(model, paged)
    sees = ", ".join(sorted({str(layer.visibility) for layer in paged._cache.layers.values()}))
    if not error <= TOLERANCE:
        return "WRONG", f"{sees} | {error:.0e}"
    return "supported", f"{sees} | {error:.0e}"


def as_markdown(results: dict[str, tuple[str, str]]) -> str:
    """The page docs/models.md."""

    def rows(verdict: str) -> list[tuple[str, str]]:
        return [(name, detail) for name, (found, detail) in results.items() if found == verdict]

    supported, refused, untried = rows("supported"), rows("refused"), rows("not tried")
    reasons: dict[str, list[str]] = {}
    for name, detail in refused:
        must, _ = detail.split("; got ", 1)
        reasons.setdefault(must, []).append(name)
    lines = [
        INTRODUCTION.format(
            count=len(results),
            version=transformers.__version__,
            torch=torch.__version__.split("+")[0],
            longest=max(map(len, random_texts().values())),
        ),
        f"## Supported: {len(supported)}\n",
        "| model type | its layers see | largest error |\n| --- | --- | --- |",
        *(f"| {name} | {detail} |" for name, detail in supported),
        f"\n## Refused: {len(refused)}\n",
        "| to run on pages, a model must | but these do not |\n| --- | --- |",
        *(f"| {reason} | {', '.join(names)} |" for reason, names in reasons.items()),
        f"\n## Not tried: {len(untried)}\n",
        UNTRIED,
        "| model type | what stopped the survey |\n| --- | --- |",
        *(f"| {name} | {detail.replace('|', '/')} |" for name, detail in untried),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--write", type=Path, help="write the table as Markdown")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    results = {}
    for model_type in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results[model_type] = survey(model_type)
        print(model_type, *results[model_type], sep="\t", flush=True)
    if arguments.write:
        arguments.write.write_text(as_markdown(results))
    return int(any(verdict == "WRONG" for verdict, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
