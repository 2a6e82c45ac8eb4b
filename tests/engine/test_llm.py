"""The whole engine over a real model, against the same model's own generate."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters

from quire.engine.llm import LLM
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError, DeviceError, ModelError
from quire.hf import PagedModel

from .conftest import NEW_TOKENS
from .fakes import byte_tokenizer, fork
from .texts import one_by_one

GREEDY = SamplingParams(max_tokens=NEW_TOKENS)


def make_llm(model, *, page_size=4, num_pages=200, backend="reference", compile=False, **options) -> LLM:
    paged = PagedModel(model, page_size=page_size, num_pages=num_pages, backend=backend, compile=compile)
    paged._cache.poison(range(num_pages))
    return LLM(paged, tokenizer=byte_tokenizer(), **options)


def all_pages_are_free(llm: LLM) -> bool:
    return llm.table.allocator.num_available == llm.model.num_pages


def test_the_test_model_attends_far_back(model, prompts, expected):
    changed = [*prompts[2]]
    changed[10] = (changed[10] + 1) % 256  # 30 tokens before the end
    tokens = model.generate(torch.tensor([changed]), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert tokens[0, len(changed) :].tolist() != expected[2]
    assert len({tuple(text) for text in expected}) == len(expected)


@pytest.mark.parametrize(
    ("page_size", "max_batch_tokens", "max_num_seqs"), [(1, 64, 8), (4, 11, 8), (16, 1024, 8), (4, 3, 2)]
)
def test_tokens_equal_one_by_one_generate(
    model, prompts, expected, page_size, max_batch_tokens, max_num_seqs
):
    llm = make_llm(
        model,
        page_size=page_size,
        num_pages=800 // page_size,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
    )
    outputs = llm.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert sum(output.preemptions for output in outputs) == 0
    assert all_pages_are_free(llm)


def test_tokens_equal_one_by_one_generate_also_when_pages_run_out(model, prompts, expected):
    llm = make_llm(model, page_size=4, num_pages=18, max_batch_tokens=24)
    outputs = llm.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert sum(output.preemptions for output in outputs) > 0, "this pool was meant to be too small"
    assert all_pages_are_free(llm)


def test_tokens_equal_one_by_one_generate_with_the_kernels_a_user_gets(model, prompts, expected):
    llm = make_llm(model, backend="auto", num_pages=40, max_batch_tokens=24)
    assert [output.token_ids for output in llm.generate(prompts, GREEDY)] == expected


@pytest.mark.exhaustive  # one step compiled gives the ordinary logits: tests/hf/test_compiled.py
@pytest.mark.xdist_group("torch-compile")
def test_tokens_equal_one_by_one_generate_also_compiled(model, prompts, expected):
    llm = make_llm(model, backend="auto", num_pages=18, max_batch_tokens=24, compile=True)
    compiled = counters["stats"]["unique_graphs"]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    assert sum(output.preemptions for output in outputs) > 0, "this pool was meant to be too small"
    assert llm.generate(prompts[1], GREEDY)[0].token_ids == expected[1]
    assert counters["stats"]["unique_graphs"] == compiled, "a step was compiled anew"


def test_draws_with_a_seed_are_the_same_alone_together_and_when_pages_run_out(model, prompts):
    params = [
        SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=i, max_tokens=12, ignore_eos=True)
        for i in range(len(prompts))
    ]
    roomy, tight = make_llm(model), make_llm(model, num_pages=14, max_batch_tokens=24)
    together = roomy.generate(prompts, params)
    alone = [roomy.generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    crowded = tight.generate(prompts, params)
    assert [o.token_ids for o in together] == [o.token_ids for o in alone] == [o.token_ids for o in crowded]
    assert sum(output.preemptions for output in crowded) > 0


def test_streamed_deltas_join_to_the_output_of_generate(model):
    llm = make_llm(model)
    texts = ["one", "a much longer prompt", "é€😀"]
    outputs = llm.generate(texts, GREEDY)
    deltas = list(llm.stream(texts, GREEDY))
    for index, output in enumerate(outputs):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == output.text
        assert [token for delta in own for token in delta.token_ids] == output.token_ids
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [output.finish_reason]
        assert own[-1].output.text == output.text
    assert all_pages_are_free(llm)


def test_closing_a_stream_frees_its_pages_and_no_others(model, prompts, expected):
    llm = make_llm(model)
    kept = llm.stream(prompts[0], GREEDY)
    first = next(kept)
    dropped = llm.stream(prompts[1:4], GREEDY)
    for _ in range(4):
        next(dropped)
    assert len(llm.requests) == 4
    dropped.close()
    assert list(llm.requests) == [first.request_id]
    assert first.token_ids + [token for delta in kept for token in delta.token_ids] == expected[0]
    assert all_pages_are_free(llm)


def test_streams_that_are_read_in_turns_lose_nothing_to_each_other(model, prompts, expected):
    llm = make_llm(model)
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts[:3]]
    tokens: list[list[int]] = [[], [], []]
    open_streams = list(enumerate(streams))
    while open_streams:
        for entry in list(open_streams):
            delta = next(entry[1], None)
            if delta is None:
                open_streams.remove(entry)
            else:
                tokens[entry[0]] += delta.token_ids
    assert tokens == expected[:3]


@pytest.mark.parametrize("num_pages", [100, 18])
def test_two_llms_on_one_paged_model_give_the_tokens_of_generate_in_turns_and_in_threads(
    model, prompts, expected, num_pages
):
    first = make_llm(model, num_pages=num_pages)
    second = LLM(first.model)
    streams = [llm.stream(prompt, GREEDY) for llm, prompt in zip([first, second] * 2, prompts, strict=False)]
    tokens: list[list[int]] = [[], [], [], []]
    for deltas in itertools.zip_longest(*streams):  # step by step in turns
        for own, delta in zip(tokens, deltas, strict=True):
            own += delta.token_ids if delta else []
    assert tokens == expected[:4]
    with ThreadPoolExecutor(2) as pool:
        halves = list(
            pool.map(
                lambda llm, some: llm.generate(some, GREEDY), (first, second), (prompts[:3], prompts[3:])
            )
        )
    assert [output.token_ids for half in halves for output in half] == expected
    assert all_pages_are_free(first)


def test_calls_and_streams_of_many_threads_give_the_tokens_of_generate(model, prompts, expected):
    llm = make_llm(model, num_pages=40, max_batch_tokens=24)

    def ask(i):
        if i % 2:
            return llm.generate(prompts[i % 7], GREEDY)[0].token_ids
        return [token for delta in llm.stream(prompts[i % 7], GREEDY) for token in delta.token_ids]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(14))) == expected * 2
    assert llm.stats.steps < 14 * NEW_TOKENS / 2, "the threads did not share steps"
    assert all_pages_are_free(llm)
    assert model.config._attn_implementation != "quire"


def test_a_stream_that_is_aborted_ends(model, prompts, expected):
    llm = make_llm(model)
    stream = llm.stream(prompts[0], GREEDY)
    first = next(stream)
    assert llm.abort(first.request_id)
    assert all_pages_are_free(llm)
    [last] = stream
    assert (last.finish_reason, last.output.token_ids) == ("abort", expected[0][:1])


def test_an_interrupted_generate_frees_all_pages_and_leaves_the_engine_usable(model, prompts, expected):
    llm = make_llm(model)
    steps, forward = [], llm.model.forward

    def interrupted(step):
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return forward(step)

    llm.model.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, GREEDY)
    assert all_pages_are_free(llm)
    assert not llm.has_unfinished
    assert llm.generate(prompts[0], GREEDY)[0].token_ids == expected[0]


def test_a_bad_prompt_among_good_ones_is_named_before_any_work(model):
    llm = make_llm(model)
    with pytest.raises(ArgumentError, match=re.escape("prompts[1]: prompt must not be empty")):
        llm.generate(["good", ""], GREEDY)
    with pytest.raises(ArgumentError, match=re.escape("prompts[2]: prompt of 5 tokens plus 30")):
        make_llm(model, num_pages=5).stream(
            [[1], [2], [3] * 5], [*[SamplingParams(max_tokens=2)] * 2, SamplingParams(max_tokens=30)]
        )
    assert llm.stats.steps == 0
    assert not llm.has_unfinished


def test_prompts_may_be_text_or_token_ids_one_or_many(model):
    llm = make_llm(model)
    params = SamplingParams(max_tokens=3)
    [text] = llm.generate("ab", params)
    [ids] = llm.generate(list(b"ab"), params)
    [many_texts, many_ids] = llm.generate(["ab", list(b"ab")], params)
    assert text.token_ids == ids.token_ids == many_texts.token_ids == many_ids.token_ids
    assert (text.prompt, ids.prompt) == ("ab", None)
    assert llm.generate([]) == []


def test_a_folder_is_loaded_with_its_tokenizer(model, tmp_path, prompts, expected):
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="must hold a tokenizer"):
        LLM(tmp_path, num_pages=50, backend="reference")
    byte_tokenizer().save_pretrained(tmp_path)
    llm = LLM(tmp_path, num_pages=50, page_size=8, backend="reference")
    assert (llm.model.num_pages, llm.model.page_size, llm.model.dtype) == (50, 8, torch.float32)
    [output] = llm.generate(prompts[0], GREEDY)
    assert output.token_ids == expected[0]
    assert output.text.startswith(byte_tokenizer().decode(expected[0]).rstrip("\ufffd"))


def test_a_transformers_model_is_put_on_pages(model, prompts, expected):
    llm = LLM(model, num_pages=50, backend="reference")
    assert llm.generate(prompts[0], GREEDY)[0].token_ids == expected[0]
    assert llm.generate(prompts[0], GREEDY)[0].text == ""
    with pytest.raises(ArgumentError, match="dtype must be left out"):
        LLM(model, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="num_pages must be left out, as a PagedModel has them already"):
        LLM(llm.model, num_pages=3)
    with pytest.raises(ArgumentError, match="model must be a model folder"):
        LLM(3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"memory_bytes": "1GB"}, "memory_bytes must be a number of bytes; got '1GB'"),
        ({"num_pages": "x"}, "num_pages must be an int of at least 1; got 'x'"),
        ({"page_size": 0}, "page_size must be an int of at least 1; got 0"),
    ],
)
def test_sizes_of_the_wrong_kind_are_refused_before_any_work(model, options, sentence, monkeypatch):
    monkeypatch.setattr("quire.hf.model.PackedForward", None)  # whoever calls it fails otherwise
    with pytest.raises(ArgumentError, match=sentence):
        LLM(model, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_there_is_one_sentence():
    with pytest.raises(DeviceError, match="device must be one that this torch and machine have; got 'cuda'"):
        LLM(device="cuda")


def test_without_transformers_the_rest_works_and_an_llm_is_one_sentence():
    code = """
import sys
sys.modules["transformers"] = None  # so Python says that there is none
import quire
quire.PageAllocator(4).allocate(2)
try:
    quire.LLM
except quire.UnsupportedError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "quire.LLM needs transformers, which is not installed. Fix: pip install '.[hf]' in Quire's folder\n"
    )


def test_an_llm_says_what_it_is_and_how_much_is_free(model):
    llm = make_llm(model, num_pages=20)
    llm.add_request([1, 2, 3, 4, 5], GREEDY)
    llm.step()
    assert repr(llm) == (
        "LLM(1 running, 0 waiting, PagedModel(LlamaForCausalLM, float32 on cpu, page_size=4, 0.0 MB of pages, "
        "PageAllocator(num_pages=20: 2 owned, 0 cached, 18 free)))"
    )


def test_no_folder_is_one_clear_sentence(tmp_path):
    with pytest.raises(ModelError, match="model must be a folder"):
        LLM(tmp_path / "nothing")


@pytest.mark.parametrize("prompts", ["\ud800", ["fine", "a\ud800"]])
def test_text_that_no_encoding_made_is_refused_in_one_sentence(prompts):
    with pytest.raises(ArgumentError, match="lone surrogate in prompt"):
        LLM().generate(prompts)


def test_a_forked_request_copies_its_page_and_both_sequences_give_the_tokens_of_generate(
    model, prompts, expected
):
    llm = make_llm(model)
    other = (expected[0][0] + 1) % 256
    [from_other] = one_by_one(model, [[*prompts[0], other]], NEW_TOKENS - 1)
    request_id = llm.add_request(prompts[0], GREEDY)
    llm.step()
    fork(llm, request_id, other)
    deltas = []
    while llm.has_unfinished:
        deltas += llm.step()
    assert [o.token_ids for o in deltas[-1].output.outputs] == [expected[0], [other, *from_other]]
    assert all_pages_are_free(llm)


def test_a_model_is_loaded_by_its_id_from_the_cache_with_its_tokenizer(model, tmp_path, monkeypatch, caplog):
    from hf.fake_hub import cached
    from huggingface_hub import constants

    (tmp_path / "model").mkdir()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cached(tmp_path, "someone/tiny", tmp_path / "model", ref="v1")
    with pytest.raises(ModelError, match="must be on this machine"):
        LLM("someone/tiny")
    with caplog.at_level("INFO", "quire"):
        llm = LLM("someone/tiny", revision="v1", num_pages=50, backend="reference")
    assert "someone/tiny: float32 (the checkpoint's own) on cpu (no GPU)" in caplog.messages
    here = make_llm(model)
    assert llm.generate("abc", GREEDY)[0].text == here.generate("abc", GREEDY)[0].text
    with pytest.raises(ArgumentError, match="revision must be left out, as a transformers model has them"):
        LLM(model, revision="v1")
