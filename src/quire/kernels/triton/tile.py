"""One tile's arithmetic: packed query rows against a range of keys, block by block, the softmax kept online.

For each block of keys t, with query rows r:

    s[r, t] = log2(e) · (softcap(scale · q_r · k_t) − slope · |position_r − t|)     −inf where hidden
    m' = max(m, max_t s),  p = 2^(s − m'),  l = l·2^(m − m') + Σ_t p
    acc = acc·2^(m − m') + p V

Addresses never leave what the sequence owns: tokens past the range are read at its last token, so that no load
needs a mask and a hidden key's weight of 0 meets a finite value.

Sources: PagedAttention, arXiv:2309.06180 §4.1; online softmax, arXiv:1805.02867; FlashAttention, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.formats import unit_exponent, widen

LOG2_E = tl.constexpr(1.4426950408889634)
NO_SCORE = tl.constexpr(float("-inf"))


@triton.jit
def tanh(y):
    """(1 − e) / (1 + e) with e = 2^(−2·log2(e)·|y|); near 0, where that cancels, the odd series."""
    e = tl.exp2(-2.0 * LOG2_E * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    square = y * y
    near = y * (
        1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    )
    return tl.where(tl.abs(y) < 0.25, near, tl.where(y < 0, -far, far))


@triton.jit
def visible_keys(
    key, position, end, window_left, mask_row, first_new, mask_columns,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """[rows, keys] which keys each row may see; see the contract in ``work`` and ``attention``."""
    seen = (key < end)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    if WINDOW:
        seen = seen & (key[None, :] >= position[:, None] - window_left)
    if TREE:
        column = key - first_new
        asked = seen & ((column >= 0) & (column < mask_columns))[None, :]
        allowed = tl.load(mask_row[:, None] + column[None, :], mask=asked, other=1)
        seen = seen & (allowed != 0)
    return seen


@triton.jit
def attend_keys(
    m, l, acc, queries, position, slopes, mask_row, first_new, mask_columns,
    begin, stop, end, table, k, v, k_scale, v_scale,
    k_page, k_slot, v_page, v_slot, scale_page, scale_slot, softmax_scale, softcap, window_left,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FORMAT: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Fold keys ``begin:stop`` into (m, l, acc); ``end`` is the tile's last key plus one.

    ``MASKED`` is False where the caller knows that every row sees every key of these blocks.
    """
    dtype: tl.constexpr = queries.dtype
    UNIT: tl.constexpr = unit_exponent(FORMAT, dtype)
    slot = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    last = end - 1
    token = tl.minimum(begin + slot, last)
    # Page ids are fetched a block ahead, by hand: a load that waited for its own page id would
    # cost the compiler's pipeline half its depth.
    page = tl.load(table + token // PAGE_SIZE, mask=(token >= 0) & (begin < stop), other=0)
    for first in tl.range(begin, stop, BLOCK_N, num_stages=NUM_STAGES):
        token = tl.minimum(first + slot, last)
        offset = token % PAGE_SIZE
        at = page.to(tl.int64)
        page = tl.load(table + tl.minimum(first + BLOCK_N + slot, last) // PAGE_SIZE)

        k_at = k + (at * k_page + offset * k_slot)[:, None] + dim[None, :]
        if HEAD_DIM == BLOCK_D:
            keys = tl.load(k_at)
        else:
            keys = tl.load(k_at, mask=(dim < HEAD_DIM)[None, :], other=0)
        keys = widen(keys, FORMAT, dtype)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if FORMAT != "same":
            if UNIT > 0:
                s = s * (2.0**UNIT)
            s = s * tl.load(k_scale + at * scale_page + offset * scale_slot)[None, :]
        if SOFTCAP:
            s = (softcap * LOG2_E) * tanh(s * (softmax_scale / softcap))
        else:
            s = s * (softmax_scale * LOG2_E)
        key = first + slot
        if slopes is not None:
            s -= (slopes * LOG2_E)[:, None] * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
        if MASKED:
            seen = visible_keys(
                key, position, end, window_left, mask_row, first_new, mask_columns,
                CAUSAL, WINDOW, mask_row is not None,
            )  # fmt: skip
            s = tl.where(seen, s, NO_SCORE)

        highest = tl.maximum(m, tl.max(s, 1))
        shift = highest
        if MASKED:  # a row that has seen nothing yet: −inf − −inf is no number
            shift = tl.where(highest == NO_SCORE, 0.0, highest)
        p = tl.exp2(s - shift[:, None])
        correction = tl.exp2(m - shift)
        l = l * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        m = highest

        v_at = v + (at * v_page + offset * v_slot)[:, None] + dim[None, :]
        if HEAD_DIM == BLOCK_D:
            values = tl.load(v_at)
        else:
            values = tl.load(v_at, mask=(dim < HEAD_DIM)[None, :], other=0)
        values = widen(values, FORMAT, dtype)
        if FORMAT != "same":
            scale = tl.load(v_scale + at * scale_page + offset * scale_slot)
            if dtype == tl.float16:
                # A weight times a scale may fall below what float16 holds; a value times its scale does not.
                values = (values.to(tl.float32) * (scale * 2.0**UNIT)[:, None]).to(dtype)
            else:
                # Half of the unit here, half at the end (value_unit): all of it could overflow.
                p = p * (scale * 2.0 ** (UNIT // 2))[None, :]
        acc = tl.dot(p.to(dtype), values, acc, input_precision=PRECISION)
    return m, l, acc


@triton.constexpr_function
def value_unit(FORMAT, dtype):
    """What ``acc`` is still to be multiplied with."""
    unit = unit_exponent(FORMAT, dtype)
    return 1.0 if dtype == tl.float16 else 2.0 ** (unit - unit // 2)
