"""Matrix products and sums of rows on a GPU whose bits for a row depend on that row alone.

    linear      out[t, n] = Σ_k x[t, k] · w[n, k] + b[n]
    row_sums    out[t] = Σ_k x[t, k]

One tile serves every number of rows and k is never split, so that a row meets the same instructions in the same order
alone and among any others. A library chooses tile and split by the number of rows, and with them the order of its sums.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

# Of every product. A tile of 64 rows is what Hopper's matrix unit multiplies at a time; fewer rows would be padded.
BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 64
BLOCK_W = 1024  # columns of a row that are summed lane by lane


# One code for any number of rows: Triton would compile another for 1, and for multiples of 16.
@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    x, w, b, out, num_rows, num_columns, width, x_row, w_column, w_k, out_row,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of out: M rows of x, N columns, all of k from first to last."""
    blocks = tl.cdiv(num_rows, M)
    rows = (tl.program_id(0) % blocks).to(tl.int64) * M + tl.arange(0, M)
    columns = (tl.program_id(0) // blocks).to(tl.int64) * N + tl.arange(0, N)
    is_row, is_column = rows < num_rows, columns < num_columns
    sums = tl.zeros([M, N], tl.float32)
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        is_k = k < width
        a = tl.load(x + rows[:, None] * x_row + k[None, :], is_row[:, None] & is_k[None, :], 0.0)
        at = columns[None, :] * w_column + k[:, None].to(tl.int64) * w_k
        c = tl.load(w + at, is_k[:, None] & is_column[None, :], 0.0)
        sums = tl.dot(a, c, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(b + columns, is_column, 0.0).to(tl.float32)[None, :]
    at = out + rows[:, None] * out_row + columns[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), is_row[:, None] & is_column[None, :])


@triton.jit
def sum_row(x, out, width, x_row, W: tl.constexpr):
    """One row: W lanes, each of which sums every W-th number, then their sum."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros([W], tl.float32)
    for first in range(0, width, W):
        k = first + tl.arange(0, W)
        lanes += tl.load(x + row * x_row + k, k < width, 0.0).to(tl.float32)
    tl.store(out + row, tl.sum(lanes, 0).to(out.dtype.element_ty))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x · weightᵀ + bias, accumulated in float32; float32 is multiplied as it is, not as tf32.

    Args:
        x: [tokens, width], float32, float16 or bfloat16, like all others.
        weight: [rows, width], any strides.
        bias: [rows], or None.
        out: [tokens, rows], last dimension contiguous; written.
    Cost: one launch. Few tokens cost as much arithmetic as BLOCK_M.
    """
    tokens, width = x.shape
    rows = weight.shape[0]
    if 0 in (tokens, rows):
        return
    x, weight = _plain(x), weight.resolve_neg()
    grid = triton.cdiv(tokens, BLOCK_M) * triton.cdiv(rows, BLOCK_N)
    with _on(x):
        multiply[(grid,)](
            x, weight, None if bias is None else _plain(bias), out, tokens, rows, width,
            x.stride(0), *weight.stride(), out.stride(0), bias is not None, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """The sums over the last dimension, summed in float32, in the dtype of x."""
    rows = _plain(x.reshape(-1, x.shape[-1]))
    out = rows.new_empty(rows.shape[0])
    if len(out):
        with _on(x):
            sum_row[(len(out),)](rows, out, rows.shape[1], rows.stride(0), BLOCK_W)
    return out.view(x.shape[:-1])


def _plain(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, next to each other in the last dimension, with no sign left to apply."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(x: torch.Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
