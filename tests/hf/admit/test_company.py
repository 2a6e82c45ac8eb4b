"""A model that is to be batch-invariant is made so where it can be, and refused with the reason where it cannot."""

from __future__ import annotations

import pytest
import torch

from quire.errors import ArgumentError, UnsupportedError
from quire.hf.admit import company

from ..families import on_pages as served
from ..families import ordinary_logits, random_texts, tiny_model


def on_pages(model, **options):
    return served(model, **({"backend": "cpu", "batch_invariant": True} | options))


def replaced(paged):
    """Types of the modules that have another forward during a step."""
    return {type(module).__name__ for module, *_ in paged._forward.switches._invariant}


def small(family="llama", **options):
    return tiny_model(family, num_hidden_layers=2, **options)


def test_only_modules_that_call_operators_which_mix_rows_are_changed():
    assert replaced(on_pages(small())) == {"Linear", "SiLUActivation"}
    assert replaced(on_pages(small("gpt_oss"))) == {"Linear", "GptOssTopKRouter", "GptOssExperts"}
    assert replaced(on_pages(tiny_model("gpt2"))) == {"Linear", "Conv1D"}


class WithModule(torch.nn.Module):
    """A feed-forward network with something behind it."""

    def __init__(self, network, behind):
        super().__init__()
        self.network, self.behind = network, behind

    def forward(self, x):
        return self.behind(self.network(x))


def with_behind(behind):
    model = small()
    layer = model.model.layers[0]
    layer.mlp = WithModule(layer.mlp, behind)
    return model.eval()


class Scaled(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale(x) * x


def test_an_operator_of_which_nobody_has_shown_it_is_refused_by_name_and_place():
    with pytest.raises(
        UnsupportedError, match=r"got aten\.var\.correction in Scaled\. Fix: batch_invariant=False"
    ):
        on_pages(with_behind(Scaled(lambda x: x.var(-1, keepdim=True))))


def test_rows_that_mix_in_operators_which_do_not_are_found_by_their_bits():
    """Each operator is exact; together they let all tokens of a step scale one another."""
    model = with_behind(Scaled(lambda x: 1 + 1e-4 * x.abs().amax()))
    with pytest.raises(
        UnsupportedError, match=r"same bits in any step; got llama: logits of token \d+ that differ by"
    ):
        on_pages(model)


def test_operators_outside_of_modules_that_have_one_job_are_replaced_too():
    """A gate in a module of its own, a product with a bare parameter, and one within a subclass of Linear."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return torch.sigmoid(super().forward(x)) @ self.weight.t()

    model = with_behind(Doubled(64, 64, bias=False))
    paged = on_pages(model)
    assert replaced(paged) == {"Linear", "SiLUActivation", "Doubled"}


def test_without_the_replacements_the_rehearsal_finds_the_difference(monkeypatch):
    monkeypatch.setattr(company, "_forward_for", lambda module, *_: module.forward)
    with pytest.raises(UnsupportedError, match="same bits in any step"):
        on_pages(small(intermediate_size=75))


def test_a_model_keeps_its_own_forwards_between_steps_and_its_numbers():
    model, text = small(), random_texts()["a"]
    before = ordinary_logits(model, text)
    on_pages(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(ordinary_logits(model, text), before)


def test_a_forward_that_is_set_later_is_refused_not_overruled():
    model = small()
    paged = on_pages(model)
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)
    with pytest.raises(UnsupportedError, match="must keep its forwards; got another one of a Linear"):
        paged._forward.packed(torch.ones(2).long(), torch.arange(2), torch.arange(2), "eager", kernels=True)
    again = on_pages(model)  # one that was there before is part of the model
    assert replaced(again) == {"Linear", "SiLUActivation"}


def test_a_weight_that_is_no_plain_parameter_is_refused():
    class Sharded(torch.nn.Parameter):
        pass

    model = small()
    paged = on_pages(model)
    layer = model.model.layers[0].mlp.up_proj
    layer._parameters["weight"] = Sharded(layer.weight.data)
    with pytest.raises(UnsupportedError, match="got a weight of type Sharded"):
        paged._forward.packed(torch.ones(2).long(), torch.arange(2), torch.arange(2), "eager", kernels=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compile": True}, UnsupportedError, "got compile=True. Fix: compile=False"),
        ({"batch_invariant": 1}, ArgumentError, "batch_invariant must be a bool; got 1"),
        ({"backend": "reference"}, UnsupportedError, 'backend "reference" cannot be batch-invariant'),
    ],
)
def test_what_cannot_go_with_it_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        on_pages(small(), **options)
