"""PagedModel: sizes, steps, copies, and a model left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from quire.hf import PagedModel, Step
from quire.kernels import ahead
from quire.kernels.cpu import threads

from .families import (
    PAGE_SIZE,
    TOLERANCE,
    VOCAB,
    on_pages,
    ordinary_logits,
    random_texts,
    tiny_model,
    worst_difference,
)


def prefill(text, pages, rows, first=0):
    """A step that runs one text from token `first` on, on the given pages, or on those of each group of layers."""
    positions = torch.arange(first, len(text))
    table = torch.tensor(pages, dtype=torch.int32).unsqueeze(-2)
    return Step(
        input_ids=text[first:],
        position_ids=positions,
        page_table=table,
        seq_lens=torch.tensor([len(text)], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, len(positions)], dtype=torch.int32),
        slot_mapping=table[..., 0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE,
        logits_indices=torch.tensor(rows, dtype=torch.int64),
    )


@pytest.fixture
def text():
    return random_texts()["a"][:11]


def test_the_pool_holds_the_pages_asked_for_or_as_many_as_fit():
    model = tiny_model("llama")
    paged = on_pages(model, num_pages=7)
    # K and V, 4 layers, 2 heads, 4 tokens of 16 floats: no padding at 64 bytes.
    assert paged.bytes_per_page == 2 * 4 * 2 * 4 * 16 * 4
    assert paged.num_pages == 7
    fitted = on_pages(model, num_pages=None, memory_bytes=10 * paged.bytes_per_page + 1)
    assert fitted.num_pages == 10


def test_all_that_steps_run_is_compiled_before_the_first(monkeypatch, text):
    asked = []
    monkeypatch.setattr(ahead, "compile_ahead", asked.append)
    monkeypatch.setattr(threads, "_entries", {})  # by function and config
    paged = on_pages(tiny_model("llama"), num_pages=4, backend="cpu")
    [jobs] = asked
    paged.forward(prefill(text, range(3), rows=[10]))
    ready = {(job.function, job.arguments[0]) for job in jobs if isinstance(job.arguments[0], tuple)}
    ran = {(function.__name__, config) for function, config in threads._entries}
    assert {name for name, _ in ran} >= {"prefill", "decode", "write", "multiply"}
    assert ran <= ready


def test_bytes_per_page_counts_every_pool_of_a_mixed_model():
    paged = on_pages(tiny_model("gemma4"), num_pages=3)
    assert 3 * paged.bytes_per_page == sum(pool.nbytes for pool in paged._cache.pools)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 1, "memory_bytes": 1 << 20}, "only one of num_pages and memory_bytes"),
        ({"num_pages": None, "memory_bytes": 10}, "memory_bytes must hold at least one page .* got 10"),
        ({"num_pages": None, "memory_bytes": 0}, "memory_bytes must hold at least one page .* got 0"),
        ({"num_pages": 0}, "num_pages must be an int of at least 1; got 0"),
        ({"page_size": 0}, "page_size must be an int of at least 1; got 0"),
        ({"backend": "cuda"}, "backend must be"),
        ({"kv_dtype": "int4"}, "kv_dtype must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        on_pages(tiny_model("llama"), **options)


def test_a_dtype_without_kernels_is_refused():
    with pytest.raises(DtypeError, match="dtype must be"):
        on_pages(tiny_model("llama").double())


def test_a_chunk_must_begin_with_a_page():
    with pytest.raises(UnsupportedError, match=r"attention_chunk_size, 8, .* got 3\. Fix: page_size=2"):
        on_pages(tiny_model("llama4"), page_size=3)


def test_it_knows_what_the_engine_asks():
    paged = on_pages(tiny_model("llama", eos_token_id=[2, 5]))
    assert (paged.vocab_size, paged.max_seq_len, paged.page_size) == (VOCAB, 256, PAGE_SIZE)
    assert paged.eos_token_ids == (2, 5)
    assert paged.config.model_type == "llama"


def test_logits_come_in_the_order_of_the_rows_asked_for(text):
    model = tiny_model("llama")
    expected = ordinary_logits(model, text)
    rows = [7, 2, 10]
    logits = on_pages(model).forward(prefill(text, [5, 0, 3], rows))
    assert logits.dtype == torch.float32
    assert (logits - expected[rows]).abs().max() <= TOLERANCE


def test_the_head_runs_on_the_wanted_rows_only(text):
    model = tiny_model("llama")
    paged = on_pages(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    paged.forward(prefill(text, [5, 0, 3], [10]))
    assert seen == [(1, 1, VOCAB)]


def test_a_chunk_of_a_prompt_needs_no_logits(text):
    paged = on_pages(tiny_model("llama"))
    assert paged.forward(prefill(text, [5, 0, 3], [])).shape == (0, VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: {"input_ids": step.input_ids + VOCAB}, "input_ids must be from 0 to 96"),
        (lambda step: {"position_ids": step.position_ids + 246}, "position_ids must be from 0 to 255"),
    ],
)
def test_a_refused_step_writes_nothing(text, change, message):
    paged = on_pages(tiny_model("llama"))
    paged._cache.poison(range(paged.num_pages))
    step = prefill(text, [5, 0, 3], [10])
    with pytest.raises(ArgumentError, match=message):
        paged.forward(replace(step, **change(step)))
    assert all(pool.k.isnan().all() for pool in paged._cache.pools)


def test_longrope_ends_where_its_frequencies_change():
    paged = on_pages(tiny_model("phi3_longrope"))
    assert paged.max_seq_len == 64
    step = prefill(torch.arange(3, 68), list(range(17)), [64])
    with pytest.raises(ArgumentError, match="position_ids must be from 0 to 63; got 64"):
        paged.forward(step)


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_copied_pages_continue_a_text_in_every_layer(family, text):
    model = tiny_model(family)
    paged = on_pages(model)
    paged._cache.poison(range(paged.num_pages))
    paged.forward(prefill(text[:10], [5, 0, 3], [9]))
    paged.copy_pages([(3, 8), (0, 9)])
    logits = paged.forward(prefill(text, [5, 9, 8], [0], first=10))
    assert (logits[0] - ordinary_logits(model, text)[-1]).abs().max() <= TOLERANCE


def test_outside_forward_the_model_is_the_ordinary_one(text):
    model = tiny_model("mistral")
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        before = model(text[None]).logits
        paged = on_pages(model)
        paged.forward(prefill(text, [5, 0, 3], [10]))
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(text[None]).logits, before)


def test_a_failed_step_leaves_the_model_ordinary(text):
    model = tiny_model("llama")
    paged = on_pages(model)
    attention = model.config._attn_implementation
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        paged.forward(prefill(text, [5, 0, 3], [10]))
    assert model.config._attn_implementation == attention


def test_a_model_set_to_quire_by_hand_says_how_it_is_run(text):
    model = tiny_model("llama")
    model.set_attn_implementation("quire")
    with pytest.raises(UnsupportedError, match=r"must be run by PagedModel\.forward"):
        model(text[None])


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("int8", 0.1), ("fp8_e4m3", 0.7), (None, TOLERANCE)])
def test_quantised_pages_stay_near_the_ordinary_model(kv_dtype, tolerance):
    model = tiny_model("llama", initializer_range=0.1)
    paged = on_pages(model, kv_dtype=kv_dtype)
    assert isinstance(paged, PagedModel)
    assert worst_difference(model, paged) <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_near_the_ordinary_model(dtype):
    model = tiny_model("llama").to(dtype)
    assert worst_difference(model, on_pages(model)) <= 64 * torch.finfo(dtype).eps


def test_a_step_of_another_number_of_page_tables_is_refused(text):
    paged = on_pages(tiny_model("gemma3"))
    assert len(paged.groups) == 2
    with pytest.raises(ShapeError, match=r"page_table must hold 2 page tables.* got \[1, 3\]\. Fix: "):
        paged.forward(prefill(text, [0, 1, 2], [10]))


def test_memory_goes_to_whichever_layers_need_it():
    """A page is the memory of half the layers of Gemma 3, so the same bytes hold more of a text with a window."""
    paged, llama = on_pages(tiny_model("gemma3")), on_pages(tiny_model("llama"))
    assert 2 * paged.bytes_per_page == llama.bytes_per_page
    assert (
        on_pages(tiny_model("gemma3"), num_pages=None, memory_bytes=10 * llama.bytes_per_page).num_pages == 20
    )
