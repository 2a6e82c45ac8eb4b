"""A linear layer: the model's own weight, read by Quire's kernel where that is faster than torch.

It is for a few tokens: a decode step has a token per sequence and is bound by reading the weights; see
`kernels/cpu/linear.py`. Of a dtype that the CPU has no products for, it is for any number of tokens.
Weights that are no plain parameters (quantised, sharded) are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from quire.kernels.ahead import Job
from quire.kernels.cpu import linear as kernels
from quire.ops.torch_op import register


def compile_jobs(model: torch.nn.Module) -> list[Job]:
    """Whatever the kernel runs for this model's linear layers."""
    weights = [
        layer.weight
        for layer in model.modules()
        if type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter
    ]
    served = [w for w in weights if w.dtype in kernels.FEW_TOKENS and w.shape[0] >= kernels.LEAST_ROWS]
    dtypes = {w.dtype for w in served}
    return [
        job
        for dtype in dtypes
        for job in kernels.compile_jobs(dtype, {w.shape[1] for w in served if w.dtype == dtype})
    ]


def compile_jobs_of_any(model: torch.nn.Module) -> list[Job]:
    """Whatever the products of this model run when it is batch-invariant, for any number of tokens.

    Weights that are no linear layer's, as experts and GPT-2's, may be multiplied as they lie or transposed.
    """
    of_linear = {
        id(layer.weight): layer.weight for layer in model.modules() if type(layer) is torch.nn.Linear
    }
    looked_up = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)}
    shapes: dict[torch.dtype, set[tuple[int, int]]] = {}
    lying: set[torch.dtype] = set()
    for weight in model.parameters():
        if weight.dtype not in kernels.FEW_TOKENS or weight.dim() < 2:
            continue
        rows, width = weight.shape[-2:]
        if id(weight) in of_linear:
            shapes.setdefault(weight.dtype, set()).add((rows, width))
        elif id(weight) not in looked_up:
            shapes.setdefault(weight.dtype, set()).update({(rows, width), (width, rows)})
            lying.add(weight.dtype)
    return [
        job
        for dtype, found in shapes.items()
        for job in kernels.compile_jobs_of_any(dtype, found, by_columns=dtype in lying)
    ]


def own_forward(layer: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A `forward` for this layer, which chooses between the kernel and torch at each call."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight, layer.bias
        # While a graph is compiled the number of tokens is open: the operator then chooses at each run.
        compiling = torch.compiler.is_compiling()
        if type(weight) is not torch.nn.Parameter or not (compiling or _is_faster(x, weight, bias)):
            return linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        if compiling:
            torch.ops.quire.linear(rows, weight, bias, out)
        else:
            _run_kernel(rows, weight, bias, out)
        return out.view(*x.shape[:-1], weight.shape[0])

    return forward


def _is_faster(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernel takes these tensors, and is faster than torch at it.

    The kernel reads memory: elements of a row must be neighbours, and no sign may be left to apply (`is_neg`).
    """
    return (
        0 < x.shape[:-1].numel() <= kernels.most_tokens(x.dtype)
        and x.stride(-1) == 1
        and weight.dtype == x.dtype
        and weight.stride(1) == 1
        and weight.shape[0] >= kernels.LEAST_ROWS
        and (bias is None or (bias.dtype == x.dtype and bias.stride(0) == 1))
        and not x.is_neg()
    )


def _run_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    few = x.shape[0] <= kernels.STREAMED_TOKENS
    (kernels.linear if few else kernels.linear_of_any)(x, weight, bias, out)


def _linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if out.stride(1) == 1 and _is_faster(x, weight, bias):
        _run_kernel(x, weight, bias, out)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


register("linear", "Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out", _linear_op)
