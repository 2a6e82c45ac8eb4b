"""The model's linear layers while few tokens are under way: its own weights, read by Quire's kernel.

A decode step has a token per sequence and is bound by reading the weights; see `kernels/cpu/linear.py`.
Nothing of the model is copied or replaced but, for the length of a step, the `forward` of its plain nn.Linear
layers. A subclass, a layer someone has given a forward of its own, and weights that are no plain tensors
(quantised, sharded) are left to whoever made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch.nn.functional import linear


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
    from quire.kernels.cpu import linear as kernels  # loads Numba

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight, layer.bias
        tokens = x.shape[:-1].numel()
        if not 0 < tokens <= kernels.FEW_TOKENS.get(x.dtype, 0) or not _is_served(kernels, x, weight, bias):
            return linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        kernels.linear(x.reshape(tokens, -1), weight, bias, out.view(tokens, -1))
        return out

    return forward


def _is_served(kernels: ModuleType, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        type(weight) is torch.nn.Parameter  # no subclass
        and weight.dtype == x.dtype
        and weight.stride(1) == 1
        and weight.shape[0] >= kernels.LEAST_ROWS
        and (bias is None or bias.dtype == x.dtype)
    )
