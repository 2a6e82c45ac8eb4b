"""The rehearsal admits what is right in every dtype, and refuses what is a little wrong, on pages of that dtype."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from quire.errors import UnsupportedError
from quire.hf import attention
from quire.hf.admit import guard
from quire.hf.attention import ATTENTION_NAME, attend_pages
from quire.kernels import reference
from quire.spec import Visibility

from ..families import FAMILIES, attention_with, on_pages, tiny_model

REFUSED = r"same logits on pages as without; got \w+: "
# The dtype of the model, and of its pages.
PAGES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")]
in_every_dtype = pytest.mark.parametrize(
    ("dtype", "kv_dtype"), PAGES, ids=lambda value: str(value).split(".")[-1]
)


def refused(model, because, **options):
    with pytest.raises(UnsupportedError, match=REFUSED + because):
        on_pages(model, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float16, "fp8_e4m3")],
    ids=["bfloat16", "int8", "fp8"],
)
def test_every_family_is_admitted_in_16_bits(family, dtype, kv_dtype):
    on_pages(tiny_model(family).to(dtype), kv_dtype=kv_dtype)


@in_every_dtype
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_a_softmax_scale_two_percent_off_is_refused(family, dtype, kv_dtype):
    def attend(module, query, key, value, mask, scaling=None, **options):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_pages(module, query, key, value, mask, scaling=1.02 * scale, **options)

    AttentionInterface.register(ATTENTION_NAME, attend)
    try:
        refused(tiny_model(family).to(dtype), "attention of layer", kv_dtype=kv_dtype)
    finally:
        AttentionInterface.register(ATTENTION_NAME, attend_pages)


@in_every_dtype
@pytest.mark.parametrize(("family", "dropped"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_an_argument_dropped_on_the_way_is_refused(family, dropped, dtype, kv_dtype):
    with attention_with(**{dropped: None}):
        refused(tiny_model(family).to(dtype), "attention of layer", kv_dtype=kv_dtype)


@pytest.fixture
def seen(monkeypatch):
    """Let layers be taken to see something else than their masks show."""
    read = guard._visibility
    return lambda change: monkeypatch.setattr(guard, "_visibility", lambda *args: change(read(*args)))


@in_every_dtype
@pytest.mark.parametrize(
    ("window", "error"), [(7, -1), (300, 1), (300, -1)]
)  # within the texts, and far beyond
def test_a_window_off_by_one_is_refused(window, error, dtype, kv_dtype, seen):
    seen(lambda visibility: Visibility(visibility.window_left + error))
    model = tiny_model("mistral", sliding_window=window, num_hidden_layers=1).to(dtype)
    refused(model, "attention of layer 0", kv_dtype=kv_dtype)


@in_every_dtype
def test_chunks_longer_than_the_texts_are_rehearsed(dtype, kv_dtype, seen):
    seen(lambda _: Visibility())
    model = tiny_model("llama4", attention_chunk_size=256).to(dtype)
    refused(model, "attention of layer", kv_dtype=kv_dtype)


@in_every_dtype
def test_positions_counted_along_the_packed_row_are_refused(dtype, kv_dtype):
    model = tiny_model("llama").to(dtype)
    plain = model.forward
    model.forward = lambda logits_to_keep=0, position_ids=None, **options: plain(
        logits_to_keep=logits_to_keep, **options
    )
    refused(model, "logits off by .* counts positions along the packed row", kv_dtype=kv_dtype)


@in_every_dtype
@pytest.mark.parametrize("page_size", [4, 64])
def test_keys_lost_after_the_second_page_are_refused(page_size, dtype, kv_dtype, monkeypatch):
    gather = reference.gather_pages

    def forgetful(pages, *args):
        gathered = gather(pages, *args).clone()
        gathered[:, 2 * pages.shape[2] : 2 * pages.shape[2] + 1] = 0
        return gathered

    monkeypatch.setattr(reference, "gather_pages", forgetful)
    refused(tiny_model("llama").to(dtype), "attention of layer", kv_dtype=kv_dtype, page_size=page_size)


@in_every_dtype
@pytest.mark.parametrize("factor", [1.02, torch.nan])
def test_values_written_otherwise_than_given_are_refused(factor, dtype, kv_dtype, monkeypatch):
    write = attention.write_kv
    monkeypatch.setattr(
        attention, "write_kv", lambda k, v, *args, **options: write(k, v * factor, *args, **options)
    )
    refused(tiny_model("llama").to(dtype), "keys and values of layer", kv_dtype=kv_dtype)


def test_kernels_that_are_asked_for_are_those_rehearsed(monkeypatch):
    """Nothing falls back to the reference: a fault of the reference alone does not touch the CPU's kernels."""
    monkeypatch.setattr(reference, "attend", lambda step, call: call.out.zero_())
    refused(tiny_model("llama"), "attention of layer", backend="reference")
    on_pages(tiny_model("llama"), backend="cpu")


@pytest.mark.parametrize("positions", [8, 20])
def test_a_model_of_few_positions_is_rehearsed_within_them(positions):
    on_pages(tiny_model("gpt2", n_positions=positions))


def test_the_rehearsal_costs_what_it_says():
    model, rows = tiny_model("llama"), []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].numel())
    )
    on_pages(model, page_size=256)
    assert len(rows) == 10
    assert max(rows) == 70
