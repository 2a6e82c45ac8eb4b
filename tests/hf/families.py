# ruff: noqa: C408 (configs are written as the keyword arguments they become)
"""Tiny random models of each family, and a small server that runs them on poisoned pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel

from quire.hf import PagedModel, Step
from quire.hf.attention import ATTENTION_NAME, attend_pages
from quire.pages import PageAllocator, PageTable
from quire.spec import Visibility

VOCAB = 97
PAGE_SIZE = 4
TOLERANCE = 1e-4

_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT2 = dict(
    vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=256, initializer_range=0.2, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
_PHI3_ROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0 + i / 8 for i in range(8)],
    long_factor=[4.0] * 8,
)

# name: (transformers prefix, what differs from _SMALL). Windows and chunks are shorter than the test's texts.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", dict(sliding_window=7)),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", dict(sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
                              query_pre_attn_scalar=9)),
    "gpt_oss": ("GptOss", dict(sliding_window=5, num_local_experts=4, num_experts_per_tok=2)),
    "phi3": ("Phi3", dict(sliding_window=11)),
    "phi3_longrope": ("Phi3", dict(original_max_position_embeddings=64, rope_parameters=_PHI3_ROPE)),
    "llama4": ("Llama4", dict(attention_chunk_size=8, intermediate_size_mlp=48, num_local_experts=2,
                              floor_scale=4, attn_scale=0.5)),
    "gpt2": ("GPT2", _GPT2),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", dict(attention_multiplier=0.31, embedding_multiplier=3.0, logits_scaling=2.0)),
    "gemma3": ("Gemma3", dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)),
    "gemma4": ("Gemma4", dict(sliding_window=6, global_head_dim=32, num_kv_shared_layers=2,
                              layer_types=["sliding_attention", "full_attention"] * 2,
                              hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)),
    "deepseek_v3": ("DeepseekV3", dict(num_key_value_heads=4, head_dim=8, qk_nope_head_dim=8,
                                       qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=16, kv_lora_rank=16,
                                       n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
                                       moe_intermediate_size=16)),
}  # fmt: skip
_TEXT_CONFIG = {"Llama4": "Llama4TextConfig", "Gemma3": "Gemma3TextConfig", "Gemma4": "Gemma4TextConfig"}
_CLASS = {"GPT2": "GPT2LMHeadModel"}


def tiny_model(family: str, **overrides: object) -> PreTrainedModel:
    """A random model whose attention is peaked: what it attends to decides its logits."""
    prefix, differences = FAMILIES[family]
    options = {**({} if prefix == "GPT2" else _SMALL), **differences, **overrides}
    config = getattr(transformers, _TEXT_CONFIG.get(prefix, f"{prefix}Config"))(**options)
    torch.manual_seed(0)
    model = getattr(transformers, _CLASS.get(prefix, f"{prefix}ForCausalLM"))(config).eval()
    sharpen(model)
    return model


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> None:
    """Give normalised queries and keys, and sinks, weights that matter; the rest is drawn wide enough."""
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.fill_(1.7)
        if name.endswith("sinks"):
            parameter.copy_(torch.linspace(-1.0, 3.0, len(parameter)))


class Server:
    """Texts that grow on pages: the little of an engine that the tests need. Every unowned slot is NaN.

    Pages that fall out of sight are given back after each step, and are NaN from then on.
    """

    def __init__(self, paged: PagedModel, texts: dict[str, torch.Tensor]) -> None:
        self.paged, self.texts = paged, texts
        allocator = PageAllocator(paged.num_pages, on_drop=paged.poison)
        self.table = PageTable(allocator, paged.page_size, paged.groups)
        for name in texts:
            self.table.add(name)
        paged._cache.poison(range(paged.num_pages))

    def step(self, counts: dict[str, int]) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Run the next counts[name] tokens of each text; yield (name, position, logits) of every token."""
        positions, slots = [], []
        for name, count in counts.items():
            start = self.table.length(name)
            appended = self.table.append(name, count)
            slots.append(torch.from_numpy(appended.slot_mapping))
            positions.append(torch.arange(start, start + count))
        names = list(counts)
        owners = [name for name, count in counts.items() for _ in range(count)]
        tokens = len(owners)
        step = Step(
            input_ids=torch.cat([self.texts[n][p] for n, p in zip(names, positions, strict=True)]),
            position_ids=torch.cat(positions),
            page_table=self.table.dense(names),
            seq_lens=self.table.seq_lens(names),
            cu_seqlens_q=torch.tensor([0, *counts.values()], dtype=torch.int32).cumsum(0).to(torch.int32),
            slot_mapping=torch.cat(slots, dim=-1),
            logits_indices=torch.arange(tokens),
        )
        logits = self.paged.forward(step)
        for name in names:
            self.table.release_unseen(name)
        assert logits.shape == (tokens, self.paged.vocab_size)
        yield from zip(owners, step.position_ids.tolist(), logits, strict=True)


# Prefills, a chunked prefill beside decodes, a piece that crosses windows and chunks.
SCHEDULE = (
    dict(a=15, b=5),
    dict(a=1, b=1, c=10),
    dict(c=5, a=1, b=1),
    dict(b=12, c=1, a=1),
    dict(c=1, b=1, a=1),
    dict(a=9),
    dict(b=1, a=1, c=1),
)


def random_texts(seed: int = 0) -> dict[str, torch.Tensor]:
    """As many tokens per text as SCHEDULE runs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {name: sum(counts.get(name, 0) for counts in SCHEDULE) for name in "abc"}
    return {name: torch.randint(3, VOCAB, (length,), generator=generator) for name, length in lengths.items()}


@torch.inference_mode()
def ordinary_logits(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    """[tokens, vocab] of the unmodified model, eager attention, one whole sequence."""
    model.set_attn_implementation("eager")
    return model(input_ids=text[None], use_cache=False).logits[0].float()


def worst_difference(model: PreTrainedModel, paged: PagedModel) -> float:
    """max |Δlogit| over all tokens of all texts, pages against the ordinary model."""
    texts = random_texts()
    expected = {name: ordinary_logits(model, text) for name, text in texts.items()}
    server = Server(paged, texts)
    differences = [
        (row - expected[name][position]).abs().max()
        for counts in SCHEDULE
        for name, position, row in server.step(counts)
    ]
    return float(torch.stack(differences).max())  # NaN, if any, wins the max


def on_pages(model: PreTrainedModel, **options: object) -> PagedModel:
    """Small pages, few of them, on the float64 reference."""
    return PagedModel(model, **{"page_size": PAGE_SIZE, "num_pages": 80, "backend": "reference", **options})


@contextmanager
def attention_with(**changed: object) -> Iterator[None]:
    """Attention on pages that is given other arguments than the model passes: a fault to be noticed."""

    def faulty(*args: object, **options: object) -> tuple[torch.Tensor, None]:
        return attend_pages(*args, **{**options, **changed})

    AttentionInterface.register(ATTENTION_NAME, faulty)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION_NAME, attend_pages)


def seeing(paged: PagedModel, change: Callable[[Visibility], Visibility]) -> PagedModel:
    """The same model with layers that see other keys than they should: a fault to be noticed."""
    layers = paged._cache.layers
    for index, layer in layers.items():
        layers[index] = replace(layer, visibility=change(layer.visibility))
    return paged
