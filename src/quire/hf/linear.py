"""The model's linear layers while few tokens are under way: its own weights, read by Quire's kernel.

A decode step has a token per sequence and is bound by reading the weights; see `kernels/cpu/linear.py`.
Nothing of the model is copied or replaced but, for the length of a step, the `forward` of its plain nn.Linear
layers. A subclass, a layer someone has given a forward of its own, and weights that are no plain tensors
(quantised, sharded) are left to whoever made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

from quire.kernels.cpu import linear as kernels
from quire.ops.torch_op import register


class LinearSwitch:
    """Lets a model's linear layers run through Quire's kernel for a while, where that is faster.

    Args:
        model: its layers are looked up once, here.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        plain = [m for m in model.modules() if type(m) is torch.nn.Linear and "forward" not in vars(m)]
        self._forwards = [(vars(m), _few_token_forward(m)) for m in plain if m.weight.device.type == "cpu"]

    @contextmanager
    def using(self) -> Iterator[None]:
        """Within the block the layers take the kernel for as few tokens as it is faster for."""
        for attributes, forward in self._forwards:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in self._forwards:
                del attributes["forward"]


def _few_token_forward(layer: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight, layer.bias
        compiling = (
            torch.compiler.is_compiling()
        )  # then the number of tokens is open, and the operator decides
        if type(weight) is not torch.nn.Parameter or not (compiling or _is_faster(x, weight, bias)):
            return linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        if compiling:
            torch.ops.quire.linear(rows, weight, bias, out)
        else:
            kernels.linear(rows, weight, bias, out)
        return out.view(*x.shape[:-1], weight.shape[0])

    return forward


def _is_faster(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernel takes these tensors, and is faster than torch at it."""
    return (
        0 < x.shape[:-1].numel() <= kernels.FEW_TOKENS.get(x.dtype, 0)
        and weight.dtype == x.dtype
        and weight.stride(1) == 1
        and weight.shape[0] >= kernels.LEAST_ROWS
        and (bias is None or bias.dtype == x.dtype)
    )


def _linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if _is_faster(x, weight, bias):
        kernels.linear(x, weight, bias, out)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


register("linear", "Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out", _linear_op)
