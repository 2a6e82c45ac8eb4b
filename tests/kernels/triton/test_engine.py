"""The engine on Triton's kernels, in the interpreter: the tokens of the model's own generate."""

import pytest
import torch
from engine.texts import one_by_one
from hf.families import VOCAB, tiny_model

from quire.engine import LLM, SamplingParams

pytestmark = pytest.mark.interpreted


def test_an_engine_on_triton_gives_the_tokens_of_generate_also_in_pieces_and_when_pages_run_out():
    model = tiny_model("llama", num_hidden_layers=1, eos_token_id=None)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (9, 3)]
    llm = LLM(model, backend="triton", page_size=4, num_pages=5, max_batch_tokens=8)
    llm.model.poison(range(5))
    outputs = llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [output.token_ids for output in outputs] == one_by_one(model, prompts, 5)
    assert sum(output.preemptions for output in outputs) > 0, "this pool was meant to be too small"
