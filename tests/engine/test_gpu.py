"""LLM on a GPU: right tokens in every dtype, on quantised pages, with windows, under pressure and from host memory.

Skipped where there is none. Nothing here leans on the interpreter's arithmetic: texts are judged by float64's logits of
the same weights, computed on the CPU.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from hf.families import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quire.engine.core import Engine
from quire.engine.llm import LLM
from quire.engine.params import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VOCAB = 512
LENGTHS = (1, 2, 7, 16, 17, 33, 64, 130, 200, 255)
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_model(dtype: torch.dtype = torch.float32, head_dim: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=1024,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().to("cuda", dtype)


def make_prompts(vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def assert_greedy(model: PreTrainedModel, prompts, outputs, slack: float = 4.0) -> None:
    """No token lies further below the likeliest, by float64's logits, than plain PyTorch's own error allows."""
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    distinct = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        text = output.token_ids
        distinct |= set(text)
        ids = torch.tensor([prompt + text[:-1]])
        with torch.inference_mode():
            wanted = exact(ids, use_cache=False).logits[0, len(prompt) - 1 :]
            plain = model(ids.to("cuda"), use_cache=False).logits[0, len(prompt) - 1 :].cpu().double()
        regret = wanted.amax(-1) - wanted.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert regret.max() <= slack * (plain - wanted).abs().max() + 1e-5
    assert len(distinct) > 20, "texts that repeat one token prove nothing"


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_of_all_lengths_are_greedy(dtype, cuda_graphs):
    model, prompts = make_model(DTYPES[dtype]), make_prompts()
    llm = LLM(model, num_pages=400, cuda_graphs=cuda_graphs)
    assert_greedy(model, prompts, llm.generate(prompts, GREEDY, progress=False))
    assert llm.model.allocator.num_owned == 0


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_quantised_pages_answer_nearly_as_plain_ones(kv_dtype):
    model, prompts = make_model(torch.bfloat16), make_prompts()
    params = SamplingParams(max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    plain, quantised = (
        LLM(model, num_pages=400, kv_dtype=dtype).generate(prompts, params, progress=False)
        for dtype in (None, kv_dtype)
    )
    apart = [
        abs(next(iter(a.values())).logprob - next(iter(b.values())).logprob)
        for one, other in zip(plain, quantised, strict=True)
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
    ]
    assert 0 < sum(apart) / len(apart) < (0.4 if kv_dtype == "fp8_e5m2" else 0.15)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "mistral"])
def test_windows_and_sinks(family):
    model = tiny_model(family, eos_token_id=None).to("cuda")
    prompts = [[3 + (7 * i + n) % 90 for i in range(n)] for n in (61, 5, 33, 90)]
    llm = LLM(model, page_size=4, num_pages=300, max_batch_tokens=20)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True), progress=False)
    exact = copy.deepcopy(model).to("cpu")  # experts of gpt_oss have no float64
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt + output.token_ids[:-1]])
        with torch.inference_mode():
            wanted = exact(ids, use_cache=False).logits[0, len(prompt) - 1 :]
        regret = wanted.amax(-1) - wanted.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert regret.max() < 1e-4


@pytest.mark.parametrize("swap_bytes", [0, 1 << 26])
def test_a_pool_that_is_too_small_changes_no_text(swap_bytes):
    model, prompts = make_model(), make_prompts()
    llm = LLM(model, num_pages=24, swap_bytes=swap_bytes)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=100, ignore_eos=True), progress=False)
    assert_greedy(model, prompts, outputs)
    assert sum(output.preemptions for output in outputs) > 0
    assert llm.model.allocator.num_owned == 0
    if swap_bytes:
        assert llm.stats.swapped_pages > 0


def test_pages_come_back_from_host_memory_with_their_bits():
    """What was swapped out and in equals what was never away, bit for bit, under batch invariance."""
    model, prompts = make_model(torch.bfloat16), make_prompts()
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)

    def logprobs(output):
        return [next(iter(each.values())).logprob for each in output.outputs[0].logprobs]

    alone = LLM(model, num_pages=400, batch_invariant=True).generate(prompts, params, progress=False)
    llm = LLM(model, num_pages=24, batch_invariant=True, swap_bytes=1 << 26)
    llm.model.swap.costs.bytes_per_second = float("inf")  # always copied, never computed again
    for _ in range(3):
        again = [llm.generate([prompt], params, progress=False)[0] for prompt in prompts]
        assert [o.token_ids for o in again] == [o.token_ids for o in alone]
        assert [logprobs(o) for o in again] == [logprobs(o) for o in alone]
    assert llm.stats.swapped_pages > 0
    print("returned", llm.stats.returned_tokens, "of", llm.stats.cached_tokens, llm.model.swap)


def test_one_answer_in_any_company():
    model, prompts = make_model(torch.bfloat16), make_prompts()
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)
    llm = LLM(model, num_pages=400, batch_invariant=True)
    alone = [
        Engine(llm.model, enable_prefix_caching=False).generate([p], params, progress=False)[0]
        for p in prompts
    ]
    together = Engine(llm.model, max_batch_tokens=37).generate(prompts, params, progress=False)
    assert [a.outputs[0].logprobs for a in alone] == [b.outputs[0].logprobs for b in together]


def test_samples_beams_and_draws_with_a_seed():
    model, prompts = make_model(), make_prompts()[3:6]
    llm = LLM(model, num_pages=400)
    params = SamplingParams(n=3, temperature=0.8, top_p=0.9, top_k=40, seed=7, max_tokens=10)
    one, two = (llm.generate(prompts, params, progress=False) for _ in range(2))
    assert [[o.token_ids for o in r.outputs] for r in one] == [[o.token_ids for o in r.outputs] for r in two]
    assert len({tuple(o.token_ids) for o in one[0].outputs}) == 3
    from quire import BeamSearchParams

    [beams] = llm.beam_search([prompts[0]], BeamSearchParams(beam_width=4, max_tokens=8))
    wanted = model.generate(
        torch.tensor([prompts[0]], device="cuda"),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=8,
        do_sample=False,
    )[:, len(prompts[0]) :].tolist()
    assert [o.token_ids for o in beams.outputs] == wanted


def test_threads_join_one_batch():
    model, prompts = make_model(), make_prompts()
    llm = LLM(model, num_pages=400)
    outputs: dict[int, object] = {}

    def ask(i: int) -> None:
        [outputs[i]] = llm.generate([prompts[i]], GREEDY, progress=False)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_greedy(model, prompts, [outputs[i] for i in range(len(prompts))])
    assert llm.model.allocator.num_owned == 0


def test_graphs_are_there_by_default_and_say_what_they_hold():
    llm = LLM(make_model(torch.bfloat16), num_pages=400)
    llm.generate(make_prompts(), GREEDY, progress=False)
    assert repr(llm.model.graphs).startswith("DecodeGraphs(of 1, 16 sequences, ")
    assert llm.model.graphs.num_bytes > 0


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "llama4", "mistral", "deepseek_v3", "gemma2"])
def test_graphs_change_no_text(family):
    """Of windows, sinks, chunks and experts; a model that cannot be recorded says so and runs without."""
    prompts = [[3 + (7 * i + n) % 90 for i in range(n)] for n in (61, 5, 33, 90)]
    texts = []
    for cuda_graphs in (None, False):
        model = tiny_model(family, eos_token_id=None).to("cuda")
        llm = LLM(model, page_size=4, num_pages=300, max_batch_tokens=20, cuda_graphs=cuda_graphs)
        texts.append(llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True), progress=False))
        print(family, llm.model.graphs)
    assert [o.token_ids for o in texts[0]] == [o.token_ids for o in texts[1]]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.7, top_k=20, min_p=0.01, seed=3),
        SamplingParams(
            max_tokens=24, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.1, bad_words=None
        ),
        SamplingParams(max_tokens=24, ignore_eos=True, logit_bias={3: 1.0}, min_tokens=3, stop_token_ids=[7]),
    ],
)
def test_a_decode_step_waits_for_nothing_but_its_tokens(params):
    llm = LLM(make_model(torch.bfloat16), num_pages=400)
    for prompt in make_prompts():
        llm.add_request(prompt, params)
    for _ in range(4):
        llm.step()  # prompts, and the graph of this batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            llm.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_engines_and_threads_share_the_graphs_of_a_model():
    model, prompts = make_model(), make_prompts()
    first = LLM(model, num_pages=800)
    second = Engine(first.model)
    outputs: dict[int, object] = {}

    def ask(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            [outputs[i]] = (first, second)[i % 2].generate([prompts[i]], GREEDY, progress=False)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_greedy(model, prompts, [outputs[i] for i in range(len(prompts))])
