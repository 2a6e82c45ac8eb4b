"""What an engine refuses, with a sentence, where it would hang or fail in the middle otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError, UnsupportedError

from .fakes import FakeModel

PARAMS = SamplingParams(max_tokens=3)
CALLS = {
    "step": lambda engine: engine.step(),
    "generate": lambda engine: engine.generate([1], PARAMS),
    "stream": lambda engine: next(engine.stream([1], PARAMS)),
    "abort": lambda engine: engine.abort(0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_thread_that_holds_the_lock_of_the_model_is_refused(call):
    engine = Engine(FakeModel())
    request_id = engine.add_request([1, 2], PARAMS)
    with engine.model.lock, pytest.raises(UnsupportedError, match="without the model's lock"):
        CALLS[call](engine)
    while engine.has_unfinished:
        deltas = engine.step()
    assert deltas[-1].request_id == request_id
    assert deltas[-1].output.token_ids == engine.model.continuation([1, 2], 3)


@pytest.mark.parametrize("call", ["step", "generate", "stream"])
def test_a_call_from_within_a_step_of_an_engine_on_the_same_model_is_refused(call):
    model = FakeModel()
    outer, inner = Engine(model), Engine(model)
    forward, refused = model.forward, []

    def calling(step):
        with pytest.raises(UnsupportedError, match="inside a step"):
            CALLS[call](inner)
        refused.append(call)
        return forward(step)

    model.forward = calling
    assert outer.generate([1], PARAMS)[0].token_ids == model.continuation([1], 3)
    assert len(refused) == 3
    assert not inner.has_unfinished


def test_an_engine_wants_a_paged_model_and_abort_an_id():
    with pytest.raises(ArgumentError, match="model must be a PagedModel; got object"):
        Engine(object())
    with pytest.raises(
        ArgumentError, match=r"request_id must be an int that add_request returned; got \[1\]"
    ):
        Engine(FakeModel()).abort([1])


WITHOUT_HF = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "tokenizers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import quire
try:
    quire.LLM
except quire.UnsupportedError as error:
    print(error)
"""


def test_without_transformers_llm_says_how_to_install_it():
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_HF], capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("quire.LLM needs t")
    assert said.endswith("Fix: pip install '.[hf]' in Quire's folder\n")
