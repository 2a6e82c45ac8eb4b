"""A real model under many threads: everyone gets the tokens of a call alone, and the model itself is left as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from quire.engine.llm import LLM
from quire.engine.params import SamplingParams

PROMPTS = ["def read(path):\n", "import os\n", "class Stack:\n    ", "for i in range(", "x = [", "return "]
HANGS = 120


def in_threads(*calls) -> list:
    """What calls return, each in a thread of its own."""
    results, failures = [None] * len(calls), []

    def work(i):
        try:
            results[i] = calls[i]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]
    return results


@pytest.mark.parametrize("drawn", [False, True])
def test_six_threads_on_the_demo_model_get_the_tokens_of_one_call_at_a_time(drawn):
    llm = LLM(backend="reference")

    def ask(i):
        draw = {"temperature": 0.8, "seed": i} if drawn else {}
        [output] = llm.generate(PROMPTS[i], SamplingParams(max_tokens=5 + i, ignore_eos=True, **draw))
        return output.token_ids

    alone = [ask(i) for i in range(6)]
    assert in_threads(*[lambda i=i: ask(i) for i in range(6)]) == alone
    assert llm.model.allocator.num_owned == 0


def test_two_llms_of_one_transformers_model_in_two_threads_leave_its_own_generate_as_it_was(
    model, prompts, expected
):
    llms = [LLM(model, num_pages=16, backend="reference") for _ in range(2)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    def ask(llm, some):
        return [output.token_ids for output in llm.generate(some, params)]

    got = in_threads(lambda: ask(llms[0], prompts[:3]), lambda: ask(llms[1], prompts[3:6]))
    assert got[0] + got[1] == [tokens[:8] for tokens in expected[:6]]
    ids = torch.tensor([prompts[0]])
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert alone[0, len(prompts[0]) :].tolist() == expected[0][:8]
