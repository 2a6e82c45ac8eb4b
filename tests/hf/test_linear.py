"""Which linear layers run on Quire's kernel during a step, and that the model is its own again afterwards."""

from __future__ import annotations

import pytest
import torch

from quire.hf.linear import LinearSwitch
from quire.kernels.cpu import linear as kernels

from .families import TOLERANCE, on_pages, tiny_model, worst_difference


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def served(monkeypatch):
    """Shapes (tokens, rows) that reached the kernel."""
    seen = []
    kernel = kernels.linear

    def noting(x, weight, bias, out):
        seen.append((x.shape[0], weight.shape[0]))
        kernel(x, weight, bias, out)

    monkeypatch.setattr(kernels, "linear", noting)
    return seen


def layer(rows=32, width=48, dtype=torch.float32, **options):
    return torch.nn.Linear(width, rows, **options).to(dtype).eval()


def run(module, x):
    with torch.inference_mode(), LinearSwitch(module).using():
        return module(x)


@pytest.mark.parametrize("shape", [(1, 8, 48), (5, 48), (48,), (2, 3, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_are_served_in_whatever_shape_they_come(served, shape, bias):
    module = layer(bias=bias)
    x = torch.randn(shape)
    out = run(module, x)
    torch.testing.assert_close(out, module(x).detach(), atol=1e-5, rtol=1e-5)
    assert served == [(x[..., 0].numel(), 32)]


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
    switch = LinearSwitch(module)
    module.weight = torch.nn.Parameter(torch.zeros(32, 48))
    with torch.inference_mode(), switch.using():
        assert (module(torch.ones(3, 48)) == 0).all()
    assert len(served) == 1


def test_hooks_of_a_layer_still_run(served):
    module = layer()
    module.register_forward_hook(lambda module, inputs, output: output * 0)
    assert (run(module, torch.randn(3, 48)) == 0).all()
    assert len(served) == 1


def test_after_a_step_and_after_a_failed_one_the_layers_are_as_they_were():
    module = layer()
    switch = LinearSwitch(module)
    with switch.using():
        assert "forward" in vars(module)
    with pytest.raises(ZeroDivisionError), switch.using():
        1 / 0  # noqa: B018
    assert "forward" not in vars(module)


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
