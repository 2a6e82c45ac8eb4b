"""Every list of the scoring arguments follows the fields of Scoring: the next argument is added to all of them."""

from __future__ import annotations

import inspect

import pytest
import torch
from support import Shape, make_batch, plan_for

import quire
from quire.kernels.call import AttentionCall, Scoring
from quire.kernels.cpu.attend import rows

TENSORS = Scoring._fields[2:]


@pytest.mark.parametrize("door", [quire.paged_attention, quire.AttentionPlan.run])
def test_public_doors_take_the_fields_as_keywords(door):
    keywords = inspect.signature(door).parameters
    assert [name for name in keywords if name in Scoring._fields] == list(Scoring._fields)
    for name, default in Scoring._field_defaults.items():
        assert keywords[name].default == default
        assert keywords[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("operator", ["paged_attention", "run_plan"])
def test_operators_end_with_the_fields(operator):
    schema = getattr(torch.ops.quire, operator).default._schema
    assert tuple(argument.name for argument in schema.arguments[-len(Scoring._fields) :]) == Scoring._fields


def test_native_calls_have_the_tensors_in_the_order_of_the_fields():
    names = "q", "k", "v", "out", "lse", *TENSORS
    assert rows.Call._fields[: len(names)] == names


def test_a_bound_call_is_given_the_tensors_in_the_order_of_the_fields():
    batch = make_batch(Shape(torch.float32, 8), [3])
    plan = plan_for(batch, backend="reference")
    given = dict(zip(TENSORS, torch.zeros(len(TENSORS), 1).unbind(), strict=True))
    calls, got = [], []

    def bind(layout, call, layer_checked):
        calls.append(call)
        return lambda *tensors: got.extend(tensors)

    plan._bind = bind
    plan.run(*batch.pages, softmax_scale=0.5, softcap=3.0, **given)

    (call,) = calls
    assert call.scoring.numbers == (0.5, 3.0)
    assert [id(tensor) for tensor in got] == [id(tensor) for tensor in call.tensors]
    assert all(getattr(call.scoring, name) is tensor for name, tensor in given.items())
    again = AttentionCall.of(got, call.scoring.numbers)
    assert [id(value) for value in again[:5]] == [id(value) for value in call[:5]]
    assert [id(value) for value in again.scoring] == [id(value) for value in call.scoring]
