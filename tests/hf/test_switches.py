"""What Quire changes in a model is changed back after every call, however it ends and whoever else calls."""

from __future__ import annotations

import dis
import gc
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaForCausalLM

from quire.errors import UnsupportedError
from quire.hf import switches
from quire.hf.compiled import CompiledDecoder
from quire.hf.switches import Switches

from .families import VOCAB, on_pages, random_texts, tiny_model
from .test_model import prefill

TEXTS = list(random_texts().values())


def small_model(**options):
    return tiny_model("llama", num_hidden_layers=2, **options)


@pytest.fixture(scope="module")
def model():
    return small_model()


def state_of(model):
    """All that a step changes: attributes of modules and configs, by identity."""
    modules = list(model.modules())
    attributes = [*map(vars, modules), *(vars(m.config) for m in modules if hasattr(m, "config"))]
    return [{name: id(value) for name, value in each.items()} for each in attributes]


@pytest.fixture(autouse=True)
def ordinary_afterwards(model):
    before, text = state_of(model), TEXTS[0][None, :7]
    generated = model.generate(text, max_new_tokens=3, do_sample=False)
    before = state_of(model)
    yield
    assert state_of(model) == before
    assert torch.equal(model.generate(text, max_new_tokens=3, do_sample=False), generated)


def steps_of(text, pages):
    """A prefill, a chunk and decodes of one text, on its own pages."""
    cuts = [0, 5, 11, *range(12, len(text) + 1)]
    return [
        prefill(text[:end], pages, [end - begin - 1], first=begin) for begin, end in itertools.pairwise(cuts)
    ]


def test_two_threads_on_two_paged_models_of_one_model_get_the_logits_of_one_thread(model):
    """The kernels of the CPU and the reference, so that each forward that is left over would be another's."""
    paged = [on_pages(model, backend=backend) for backend in ("cpu", "reference")]
    assert paged[0].lock is paged[1].lock
    texts = [torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    steps = [steps_of(text, list(range(15)))[:50] for text in texts]
    assert [len(each) for each in steps] == [50, 50]
    alone = [[p.forward(step) for step in each] for p, each in zip(paged, steps, strict=True)]
    start = threading.Barrier(2)

    def run(p, each):
        start.wait()
        return [p.forward(step) for step in each]

    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(run, paged, steps))
    for mine, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_threads_on_one_paged_model_take_turns(model):
    paged = on_pages(model, backend="cpu")
    steps = [steps_of(TEXTS[i], list(range(10 * i, 10 * i + 10)))[:10] for i in range(3)]
    alone = [[paged.forward(step) for step in each] for each in steps]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda each: [paged.forward(step) for step in each], steps))
    for mine, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_one_is_made_while_another_runs(model):
    """A model is looked at by the guard, and compiled from its own forward, between the steps of others."""
    paged, step = on_pages(model, backend="cpu"), steps_of(TEXTS[0], list(range(10)))[0]
    expected = paged.forward(step)
    ended = threading.Event()

    def keep_running():
        while not ended.is_set():
            assert torch.equal(paged.forward(step), expected)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(keep_running)
        try:
            for _ in range(3):
                made = Switches(model, compile=True)._compiled
                assert made._own_forward is None
                assert torch.equal(on_pages(model, backend="cpu").forward(step), expected)
        finally:
            ended.set()
        running.result()


class TwoPartModel(torch.nn.Module):
    """A second model around the decoder of another."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def get_decoder(self):
        return self.decoder


def test_models_that_share_what_is_changed_share_the_lock(model):
    first = Switches(model)
    assert Switches(model).lock is first.lock
    assert Switches(TwoPartModel(model.model)).lock is first.lock
    assert Switches(LlamaForCausalLM(model.config)).lock is first.lock  # two models of one config object
    assert Switches(small_model()).lock is not first.lock


def test_a_model_that_shares_parts_with_two_others_is_refused_unless_it_comes_first():
    first, second = small_model(), small_model()
    both = torch.nn.ModuleList([first, second])
    both.get_decoder = lambda: None
    one, other = Switches(first), Switches(second)
    with pytest.raises(UnsupportedError, match=r"got 2 that do not\. Fix: make the PagedModel of this model"):
        Switches(both)
    assert one.lock is not other.lock
    del one, other
    gc.collect()
    kept = Switches(both)
    assert Switches(first).lock is Switches(second).lock is kept.lock


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_model_ordinary(model, failure):
    def fail(*_):
        raise failure

    paged, step = on_pages(model, backend="cpu"), steps_of(TEXTS[0], list(range(10)))[0]
    expected = paged.forward(step)
    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(failure):
        paged.forward(step)
    hook.remove()
    assert torch.equal(paged.forward(step), expected)


def test_an_interrupt_at_any_moment_leaves_the_model_ordinary(model):
    """Python looks for signals after calls, at the begin of functions and when it jumps back: at each in turn."""
    paged, before = Switches(model, compile=True), state_of(model)
    paged._model = lambda: model.model.forward(input_ids=torch.tensor([[3]]))
    paged._compiled._compiled = lambda **_: "what it computes is not the matter"
    moments = 0
    while interrupted_at(moments, lambda: paged.run("quire", {}, kernels=True, compiled=True)):
        assert state_of(model) == before, f"after an interrupt at moment {moments}"
        assert not paged.lock._is_owned()
        moments += 1
    assert moments > 20


def interrupted_at(moment, call):
    """Raise KeyboardInterrupt in `call` where Python looks for signals in switches.py the moment-th time."""
    seen, last, line = -1, "", 0

    def trace(frame, event, _):
        nonlocal seen, last, line
        if frame.f_code.co_filename != switches.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            # What is raised after a call belongs to the call: a next instruction of another line will not do.
            looked = last in LOOKS and (frame.f_lineno == line or not last.startswith("CALL"))
            last, line = dis.opname[frame.f_code.co_code[frame.f_lasti]], frame.f_lineno
            seen += looked
            if looked and seen == moment:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys._getframe().f_trace_opcodes = (
        True  # Python 3.12 reports opcodes only where a frame asked before settrace
    )
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


LOOKS = {name for name in dis.opmap if name.startswith(("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "RESUME"))}


def test_a_step_within_a_step_leaves_the_model_to_the_outer_one(model):
    outer, inner = on_pages(model, backend="cpu"), on_pages(model, backend="reference")
    step = steps_of(TEXTS[0], list(range(10)))[0]
    expected, alone, nested = outer.forward(step), inner.forward(step), []

    def run_inner(*_):
        hook.remove()
        nested.append(inner.forward(step))

    hook = model.model.layers[0].register_forward_hook(run_inner)
    assert torch.equal(outer.forward(step), expected)
    torch.testing.assert_close(nested, [alone], atol=1e-4, rtol=1e-4)


def test_a_forward_that_a_layer_was_given_later_is_used_and_kept(model):
    paged, step = on_pages(model, backend="cpu"), steps_of(TEXTS[0], list(range(10)))[0]
    layer = model.model.layers[1].mlp.down_proj
    plain = paged.forward(step)

    def doubled(x):
        return 2 * torch.nn.functional.linear(x, layer.weight)

    layer.forward = doubled
    try:
        expected = model(step.input_ids[None]).logits[0, step.logits_indices]
        torch.testing.assert_close(paged.forward(step), expected, atol=1e-4, rtol=1e-4)
        assert vars(layer)["forward"] is doubled
    finally:
        del layer.forward
    assert torch.equal(paged.forward(step), plain)


def test_a_compiled_decoder_whose_forward_was_replaced_is_refused(model):
    paged = Switches(model, compile=True)
    model.model.forward = lambda **_: 1 / 0
    try:
        with pytest.raises(UnsupportedError, match=r"must keep its forward.* Fix: make a new PagedModel"):
            paged.run("eager", {}, compiled=True)
        with pytest.raises(ZeroDivisionError):
            paged.run("eager", {"input_ids": torch.tensor([[3]])})
    finally:
        del model.model.forward


def test_a_compiled_decoder_is_in_place_during_a_call_alone(model):
    paged = Switches(model, compile=True)
    seen = []
    paged._compiled._compiled = lambda **_: seen.append(vars(model.model)["forward"]) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        paged.run("eager", {"input_ids": torch.tensor([[3]])}, compiled=True)
    assert [type(forward.__self__) for forward in seen] == [CompiledDecoder]
    assert "forward" not in vars(model.model)
