"""What the demo measures is what the caches hold: counted again here from lengths and tensors."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quire import LLM, SamplingParams
from quire.cli.measure import Run, divergences, serve_on_pages, serve_padded

PROMPTS = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5, 6]]
MAX_TOKENS = 5
PAGE_SIZE = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from ties
    return model


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, page_size=PAGE_SIZE, num_pages=32, backend="reference")


@pytest.fixture(scope="module")
def on_pages(llm):
    return serve_on_pages(llm, PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))[0]


@pytest.fixture(scope="module")
def padded(model):
    return serve_padded(model, PROMPTS, MAX_TOKENS, [])


def test_pages_and_slots_at_peak_follow_from_the_lengths(llm, on_pages):
    # The last token is never computed: 3, 11 and 6 prompt tokens become 7, 15 and 10 slots.
    held = [len(prompt) + MAX_TOKENS - 1 for prompt in PROMPTS]
    pages = sum(-(-n // PAGE_SIZE) for n in held)
    assert on_pages.pages == pages == 9
    assert on_pages.allocated_slots == pages * PAGE_SIZE
    assert on_pages.kv_bytes == pages * llm.model.bytes_per_page
    # Peak pages are reached when the last page of the last request is begun, not when it is full.
    assert held_at_peak(PROMPTS, pages) == on_pages.filled_slots
    assert on_pages.wasted == 1 - on_pages.filled_slots / on_pages.allocated_slots


def held_at_peak(prompts, peak_pages):
    for step in range(MAX_TOKENS):
        held = [len(prompt) + step for prompt in prompts]
        if sum(-(-n // PAGE_SIZE) for n in held) == peak_pages:
            return sum(held)
    return None


def test_a_page_s_bytes_hold_keys_and_values_of_all_layers(llm):
    assert llm.model.bytes_per_page == 3 * 2 * 2 * PAGE_SIZE * 16 * 4


def test_the_padded_cache_is_as_long_as_its_longest_row(padded):
    length = max(map(len, PROMPTS)) + MAX_TOKENS - 1
    assert padded.allocated_slots == len(PROMPTS) * length
    assert padded.filled_slots == sum(len(prompt) + MAX_TOKENS - 1 for prompt in PROMPTS)
    assert padded.kv_bytes == padded.allocated_slots * 3 * 2 * 2 * 16 * 4
    assert padded.pages is None


def test_both_ways_give_the_greedy_tokens_of_each_prompt_alone(model, on_pages, padded):
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
        )
        expected = alone[0, len(prompt) :].tolist()
        assert on_pages.token_ids[i] == expected
        assert padded.token_ids[i] == expected


def test_times_lie_within_the_run(on_pages, padded):
    for run in (on_pages, padded):
        assert all(0 < first <= run.seconds for first in run.first_token)
        assert run.tokens_per_second == len(PROMPTS) * MAX_TOKENS / run.seconds


def test_a_text_that_ends_early_counts_until_its_end_and_wastes_the_rest(model, padded):
    eos = padded.token_ids[0][1]
    ended = serve_padded(model, PROMPTS, MAX_TOKENS, [eos])
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in padded.token_ids]
    assert ended.token_ids == cut
    assert ended.filled_slots == sum(len(p) + len(t) - 1 for p, t in zip(PROMPTS, cut, strict=True))


def test_every_step_is_shown_with_all_requests(llm):
    seen = []
    run, outputs = serve_on_pages(
        llm, PROMPTS, SamplingParams(max_tokens=3), lambda step, requests: seen.append((step, len(requests)))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [output.token_ids for output in outputs] == run.token_ids


def test_pages_given_back_are_counted(model):
    # Three prompts of a full page leave two pages, for the first two; when the first needs its third, the last gives.
    small = LLM(model, page_size=PAGE_SIZE, num_pages=5, backend="reference")
    run, _ = serve_on_pages(small, [[n] * PAGE_SIZE for n in (7, 8, 9)], SamplingParams(max_tokens=6))
    assert run.preemptions == 1
    assert run.pages == 5


def test_equal_texts_do_not_differ(model, on_pages, padded):
    assert divergences(model, PROMPTS, on_pages, padded) == []


def test_a_difference_is_found_where_it_is_with_the_gap_of_the_plain_model(model, on_pages):
    texts = [list(text) for text in on_pages.token_ids]
    right, wrong = texts[1][2], (texts[1][2] + 1) % 40
    texts[1][2] = wrong
    [found] = divergences(model, PROMPTS, on_pages, other(on_pages, texts))
    assert (found.prompt, found.position, found.on_pages, found.padded) == (1, 2, right, wrong)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[1] + texts[1][:2]])).logits[0, -1]
    assert found.gap == pytest.approx(float(logits[right] - logits[wrong]), rel=1e-4)
    assert found.gap > 0


@pytest.mark.parametrize("shorter", ["on_pages", "padded"])
def test_a_text_that_ended_earlier_differs_there(model, on_pages, shorter):
    texts = [list(text) for text in on_pages.token_ids]
    last = texts[0].pop()
    cut = other(on_pages, texts)
    pair = (cut, on_pages) if shorter == "on_pages" else (on_pages, cut)
    [found] = divergences(model, PROMPTS, *pair)
    assert (found.prompt, found.position, found.gap) == (0, MAX_TOKENS - 1, None)
    assert {found.on_pages, found.padded} == {last, None}
    assert getattr(found, shorter) is None


def other(run: Run, token_ids):
    return dataclasses.replace(run, token_ids=token_ids)
