"""Which linear layers run on Quire's kernel during a step, and that the model is its own again afterwards."""

from __future__ import annotations

import sys

import pytest
import torch

from quire.hf.switches import Switches
from quire.kernels.cpu import linear as kernels

from .families import TOLERANCE, on_pages, tiny_model, worst_difference


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def served(monkeypatch):
    """Shapes (tokens, rows) that reached a kernel, on a CPU that has products of every dtype."""
    monkeypatch.setattr(kernels, "most_tokens", lambda dtype: kernels.FEW_TOKENS.get(dtype, 0))
    seen = []

    def noting(kernel):
        def call(x, weight, bias, out):
            seen.append((x.shape[0], weight.shape[0]))
            kernel(x, weight, bias, out)

        return call

    for name in ("linear", "linear_of_any"):
        monkeypatch.setattr(kernels, name, noting(getattr(kernels, name)))
    return seen


def layer(rows=32, width=48, dtype=torch.float32, **options):
    return torch.nn.Linear(width, rows, **options).to(dtype).eval()


class Model(torch.nn.Sequential):
    """As much of a transformers model as Switches need."""

    def get_decoder(self):
        return self


def run(module, x):
    with torch.inference_mode():
        return Switches(Model(module)).run("eager", {"input": x}, kernels=True)


@pytest.mark.parametrize("shape", [(1, 8, 48), (5, 48), (48,), (2, 3, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_are_served_in_whatever_shape_they_come(served, shape, bias):
    module = layer(bias=bias)
    x = torch.randn(shape)
    out = run(module, x)
    torch.testing.assert_close(out, module(x).detach(), atol=1e-5, rtol=1e-5)
    assert served == [(x[..., 0].numel(), 32)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [9, kernels.STREAMED_TOKENS, kernels.STREAMED_TOKENS + 1, 300])
def test_a_dtype_without_products_is_served_for_any_number_of_tokens(served, dtype, tokens, monkeypatch):
    monkeypatch.setattr(kernels, "most_tokens", lambda dtype: sys.maxsize)
    module = layer(dtype=dtype)
    x = torch.randn(tokens, 48).to(dtype)
    out = run(module, x)
    assert served == [(tokens, 32)]
    exact = torch.nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (layer(), torch.randn(1, kernels.FEW_TOKENS[torch.float32] + 1, 48)),
        (layer(dtype=torch.bfloat16), torch.randn(9, 48).bfloat16()),
        (layer(), torch.randn(0, 48)),
        (layer(rows=15), torch.randn(3, 48)),
        (layer(dtype=torch.float64), torch.randn(3, 48).double()),
        (Doubled(48, 32), torch.randn(3, 48)),
        (torch.nn.Conv1d(4, 4, 3), torch.randn(1, 4, 9)),
    ],
    ids=["many tokens", "more bfloat16 tokens", "no tokens", "few rows", "another dtype", "subclass", "conv"],
)
def test_what_the_kernel_is_not_for_is_left_to_torch(served, module, x):
    assert torch.equal(run(module, x), module(x).detach())
    assert served == []


def test_a_forward_that_someone_else_has_set_is_kept(served):
    module = torch.nn.Sequential(layer())
    module[0].forward = lambda x: x + 1
    x = torch.randn(3, 48)
    assert torch.equal(run(module, x), x + 1)
    assert torch.equal(module(x), x + 1)


def test_a_weight_replaced_between_steps_is_the_one_used(served):
    module = layer(bias=False)
    switches = Switches(Model(module))
    module.weight = torch.nn.Parameter(torch.zeros(32, 48))
    with torch.inference_mode():
        assert (switches.run("eager", {"input": torch.ones(3, 48)}, kernels=True) == 0).all()
    assert len(served) == 1


def with_parameters(**parameters):
    module = layer()
    for name, value in parameters.items():
        setattr(module, name, torch.nn.Parameter(value))
    return module


# The kernel reads rows of neighbouring elements. (module, x, whether the kernel serves it)
STRIDED = {
    "x transposed": (layer(), torch.randn(48, 3).T, False),
    "x with a step": (layer(), torch.randn(3, 96)[:, ::2], False),
    "x a vector with a step": (layer(), torch.randn(96)[::2], False),
    "x one column": (layer(), torch.randn(3, 1).expand(3, 48), False),
    "x of 3 dimensions transposed": (layer(), torch.randn(2, 48, 3).transpose(1, 2), False),
    "x with a sign to apply": (layer(), torch.ops.aten._neg_view(torch.randn(3, 48)), False),
    "x one row": (layer(), torch.randn(1, 48).expand(3, 48), True),
    "x part of wider rows": (layer(), torch.randn(2, 3, 96)[:, 1:, 48:], True),
    "weight transposed": (with_parameters(weight=torch.randn(48, 32).T), torch.randn(3, 48), False),
    "weight one column": (
        with_parameters(weight=torch.randn(32, 1).expand(32, 48)),
        torch.randn(3, 48),
        False,
    ),
    "weight one row": (with_parameters(weight=torch.randn(1, 48).expand(32, 48)), torch.randn(3, 48), True),
    "weight part of wider rows": (
        with_parameters(weight=torch.randn(32, 96)[:, 48:]),
        torch.randn(3, 48),
        True,
    ),
    "bias with a step": (with_parameters(bias=torch.randn(64)[::2]), torch.randn(3, 48), False),
    "bias one number": (with_parameters(bias=torch.randn(1).expand(32)), torch.randn(3, 48), False),
}


@pytest.mark.parametrize("case", STRIDED)
def test_strided_tensors_give_what_torch_gives(served, case):
    module, x, by_kernel = STRIDED[case]
    torch.testing.assert_close(run(module, x), module(x).detach(), atol=1e-5, rtol=1e-5)
    assert len(served) == by_kernel


# What torch calls an operator with is a matrix, and has its sign applied.
@pytest.mark.parametrize("case", [n for n, (_, x, _) in STRIDED.items() if x.dim() == 2 and not x.is_neg()])
def test_strided_tensors_give_in_the_operator_what_torch_gives(served, case):
    module, x, by_kernel = STRIDED[case]
    out = torch.full((3, 32), torch.nan)
    torch.ops.quire.linear(x, module.weight.detach(), module.bias.detach(), out)
    torch.testing.assert_close(out, module(x).detach(), atol=1e-5, rtol=1e-5)
    assert len(served) == by_kernel


@pytest.mark.parametrize(
    ("out", "by_kernel"),
    [
        (torch.zeros(32, 3).T, False),
        (torch.zeros(3, 64)[:, ::2], False),
        (torch.zeros(3, 64)[:, 32:], True),
    ],
    ids=["transposed", "with a step", "part of wider rows"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_writes_a_strided_result_and_nothing_beside_it(served, out, by_kernel, bias):
    module, x = layer(bias=bias), torch.randn(3, 48)
    memory = out._base.fill_(7)
    torch.ops.quire.linear(x, module.weight.detach(), module.bias.detach() if bias else None, out)
    torch.testing.assert_close(out, module(x).detach(), atol=1e-5, rtol=1e-5)
    assert (memory == 7).sum() == memory.numel() - out.numel()
    assert len(served) == by_kernel


def test_hooks_of_a_layer_still_run(served):
    module = layer()
    module.register_forward_hook(lambda module, inputs, output: output * 0)
    assert (run(module, torch.randn(3, 48)) == 0).all()
    assert len(served) == 1


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss"])
def test_a_model_on_cpu_kernels_agrees_with_the_ordinary_one(served, family):
    model = tiny_model(family)
    assert worst_difference(model, on_pages(model, backend="cpu")) <= TOLERANCE
    assert served
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_reference_backend_stays_free_of_kernels(served):
    model = tiny_model("llama")
    worst_difference(model, on_pages(model, backend="reference"))
    assert served == []
