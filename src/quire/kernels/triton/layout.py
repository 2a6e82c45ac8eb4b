"""How a tile lies in registers: scores [rows, keys] and acc [rows, dims], or both transposed.

The matrix units take tiles of 16 by 8. In a TRANSPOSED tile keys lie along the 16 and query rows along the 8, so that
the few rows of a decode tile waste half as much. Decode over quantised pages is always TRANSPOSED, because stored bytes
then become numbers in the registers in which they are multiplied. Their values are multiplied APART: acc is two tiles,
of the even dims and of the odd ones (``formats.widen_apart``). ``tune`` decides which tiles are transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def by_row(x, TRANSPOSED: tl.constexpr):
    """One number per row, to meet scores."""
    if TRANSPOSED:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def by_key(x, TRANSPOSED: tl.constexpr):
    """One number per key, to meet scores."""
    return by_row(x, not TRANSPOSED)


@triton.jit
def per_row(x, TRANSPOSED: tl.constexpr):
    """``by_row``, or the one number for all rows."""
    if x.type.is_block():
        return by_row(x, TRANSPOSED)
    else:
        return x


@triton.jit
def no_values(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TRANSPOSED: tl.constexpr, APART: tl.constexpr):
    """``acc`` before any key: [rows, dims], transposed, or even and odd dims of it."""
    if APART:
        half = tl.zeros([BLOCK_D // 2, BLOCK_M], tl.float32)
        return half, half
    elif TRANSPOSED:
        return tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    else:
        return tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def add_values(
    acc, correction, weights, values, TRANSPOSED: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr
):
    """acc · correction + weights · values, as scores lie."""
    if APART:
        even = tl.dot(values[0], weights, acc[0] * correction)
        return even, tl.dot(values[1], weights, acc[1] * correction)
    elif TRANSPOSED:
        return tl.dot(values, weights, acc * correction, input_precision=PRECISION)
    else:
        return tl.dot(weights, values, acc * correction, input_precision=PRECISION)


@triton.jit
def in_rows(acc, TRANSPOSED: tl.constexpr, APART: tl.constexpr):
    """``acc`` as [rows, dims]."""
    if APART:
        even, odd = acc
        return tl.join(tl.trans(even), tl.trans(odd)).reshape(even.shape[1], 2 * even.shape[0])
    elif TRANSPOSED:
        return tl.trans(acc)
    else:
        return acc
