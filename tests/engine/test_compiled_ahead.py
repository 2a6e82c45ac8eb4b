"""A batch-invariant model has compiled all that its steps run before the first of them."""

import pytest
import torch
from hf.families import VOCAB, tiny_model

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.hf import PagedModel
from quire.kernels import ahead
from quire.kernels.compile import signature_of
from quire.kernels.cpu import threads


@pytest.mark.parametrize(
    ("family", "dtype", "lies"),
    [
        ("llama", torch.float32, False),
        ("llama", torch.bfloat16, False),
        ("gpt2", torch.float32, True),
        ("gpt_oss", torch.float32, True),
    ],
    ids=str,
)
def test_the_first_requests_of_a_batch_invariant_model_compile_nothing(family, dtype, lies, monkeypatch):
    asked, launched, products, machine_code = set(), set(), set(), threads.machine_code
    compile_ahead = ahead.compile_ahead

    def listens(jobs):
        asked.update((job.function, signature_of(*job.arguments)) for job in jobs)
        compile_ahead(jobs)

    def launches(function, *arguments):
        launched.add((function.__name__, signature_of(*arguments)))
        if function.__name__.startswith("multiply"):
            products.add((function.__name__, arguments[0]))
        return machine_code(function, *arguments)

    monkeypatch.setattr(ahead, "compile_ahead", listens)
    monkeypatch.setattr(threads, "_entries", {})
    monkeypatch.setattr(threads, "machine_code", launches)
    model = tiny_model(family, eos_token_id=None).to(dtype)
    engine = Engine(PagedModel(model, page_size=4, num_pages=64, batch_invariant=True))
    launched.clear(), products.clear()
    monkeypatch.setattr(threads, "_entries", {})
    prompts = [torch.arange(3, 3 + length).remainder(VOCAB).tolist() for length in (40, 23, 5, 1)]
    engine.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.generate(prompts[3], SamplingParams(max_tokens=3, ignore_eos=True))
    assert {name for name, _ in products} == {"multiply", "multiply_panels"}
    assert any(name == "multiply_panels" and config.by_columns for name, config in products) == lies
    assert launched <= asked
