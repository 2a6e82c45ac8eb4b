"""One tile's arithmetic: packed query rows against a range of keys, block by block, the softmax kept online.

For each block of keys t, with query rows r:

    s[r, t] = log2(e) · (softcap(scale · q_r · k_t) − slope · |position_r − t|)     −inf where hidden
    m' = max(m, max_t s),  p = 2^(s − m'),  l = l·2^(m − m') + Σ_t p
    acc = acc·2^(m − m') + p V

Blocks lie on the grid of BLOCK_N tokens, counted from the sequence's first. Addresses never leave what the tile may
see, ``begin`` to ``last``, and no hidden value is read: its weight of 0 would not silence a NaN.

Sources: PagedAttention, arXiv:2309.06180 §4.1; online softmax, arXiv:1805.02867; FlashAttention, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.formats import unit_exponent, widen, widen_words

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
    key, position, begin, end, window_left, mask_row, first_new, mask_columns,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """[rows, keys] which keys each row may see; see the contract in ``work`` and ``attention``."""
    seen = (key < end)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    if WINDOW:
        # The first block reaches back to the grid, into keys out of sight or another part's.
        seen = seen & (key >= begin)[None, :] & (key[None, :] >= position[:, None] - window_left)
    if TREE:
        column = key - first_new
        asked = seen & ((column >= 0) & (column < mask_columns))[None, :]
        allowed = tl.load(mask_row[:, None] + column[None, :], mask=asked, other=1)
        seen = seen & (allowed != 0)
    return seen


@triton.jit
def load_rows(
    pages, row, inside, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """Rows of pages [len(row), BLOCK_D] as ``dtype`` numbers (see ``formats``), 0 where not ``inside``.

    PACKED rows are counted in int32s.
    """
    if PACKED:
        word = tl.arange(0, BLOCK_D // 4)
        stored = load_tile(
            pages.to(tl.pointer_type(tl.int32)), row, word, HEAD_DIM // 4, BLOCK_D // 4, inside
        )
        return widen_words(stored, FORMAT, dtype, NVIDIA)
    else:
        dim = tl.arange(0, BLOCK_D)
        return widen(load_tile(pages, row, dim, HEAD_DIM, BLOCK_D, inside), FORMAT, dtype)


@triton.jit
def load_tile(base, row, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, inside):
    """[rows, columns] elements, with a mask only where one is needed."""
    at = base + row[:, None] + column[None, :]
    if inside is None:
        if COLUMNS == BLOCK:
            return tl.load(at)
        else:
            return tl.load(at, mask=(column < COLUMNS)[None, :], other=0)
    else:
        return tl.load(at, mask=inside[:, None] & (column < COLUMNS)[None, :], other=0)


@triton.jit
def page_ids(
    table, first, begin, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pages of the block of tokens at ``first``: one id, or one per token.

    ALIGNED: pages divide blocks or blocks divide pages, and the tile begins on the grid.
    """
    slot = tl.arange(0, BLOCK_N)
    if ALIGNED and PAGE_SIZE >= BLOCK_N:
        index = tl.minimum(first, last) // PAGE_SIZE
    elif ALIGNED:
        index = tl.minimum(first // PAGE_SIZE + slot // PAGE_SIZE, last // PAGE_SIZE)
    else:
        index = tl.maximum(tl.minimum(first + slot, last), begin) // PAGE_SIZE
    return tl.load(table + index, mask=last >= begin, other=0)


@triton.jit
def slots_in_page(first, begin, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Where in its page each token of the block at ``first`` lies."""
    slot = tl.arange(0, BLOCK_N)
    if ALIGNED and PAGE_SIZE >= BLOCK_N:
        return first % PAGE_SIZE + slot
    elif ALIGNED:
        return slot % PAGE_SIZE
    else:
        return tl.maximum(tl.minimum(first + slot, last), begin) % PAGE_SIZE


@triton.jit
def attend_keys(
    m, l, acc, page, queries, position, slopes, mask_row, first_new, mask_columns,
    start, stop, begin, end, table, k, v, k_scale, v_scale,
    k_page, k_slot, v_page, v_slot, scale_page, scale_slot, softmax_scale, softcap, window_left,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, NVIDIA: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Fold blocks ``start`` to ``stop`` of a tile that may see keys ``begin:end`` into (m, l, acc).

    ``page`` holds the first block's page ids; those of the block after the last are returned with the state.
    MASKED is False where every row sees every key of these blocks. PLAIN scores are scale · q · k with a positive
    scale and nothing else: their maximum is kept unscaled, and each weight costs one fused multiply-add,
    p = 2^(c·s − c·m) with c = log2(e) · scale.
    """
    dtype: tl.constexpr = queries.dtype
    UNIT: tl.constexpr = unit_exponent(FORMAT, dtype)
    last = end - 1
    scale = softmax_scale
    if FORMAT != "same":
        scale = softmax_scale * 2.0 ** (UNIT - UNIT // 2)
    for first in tl.range(start, stop, BLOCK_N, num_stages=NUM_STAGES):
        slot = slots_in_page(first, begin, last, PAGE_SIZE, BLOCK_N, ALIGNED)
        at = page.to(tl.int64)
        # Page ids are fetched a block ahead, by hand: a load that waited for its own page id would
        # cost the compiler's pipeline half its depth.
        page = page_ids(table, first + BLOCK_N, begin, last, PAGE_SIZE, BLOCK_N, ALIGNED)
        key = first + tl.arange(0, BLOCK_N)

        keys = load_rows(
            k, at * k_page + slot * k_slot, None, dtype, HEAD_DIM, BLOCK_D, FORMAT, PACKED, NVIDIA
        )
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if FORMAT != "same":
            # Half of the unit with the key's scale, half with the softmax's: all of it at once could overflow.
            key_scale = tl.load(k_scale + at * scale_page + slot * scale_slot)
            s = s * (key_scale * 2.0 ** (UNIT // 2))[None, :]
        if SOFTCAP:
            s = (softcap * LOG2_E) * tanh(s * (scale / softcap))
        elif not PLAIN:
            s = s * (scale * LOG2_E)
        if slopes is not None:
            s -= (slopes * LOG2_E)[:, None] * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
        if MASKED:
            seen = visible_keys(
                key, position, begin, end, window_left, mask_row, first_new, mask_columns,
                CAUSAL, WINDOW, mask_row is not None,
            )  # fmt: skip
            s = tl.where(seen, s, NO_SCORE)

        highest = tl.maximum(m, tl.max(s, 1))
        shift = highest
        if MASKED:  # a row that has seen nothing yet: −inf − −inf is no number
            shift = tl.where(highest == NO_SCORE, 0.0, highest)
        if PLAIN:
            factor = scale * LOG2_E
            shift = shift * factor
            p = tl.exp2(s * factor - shift[:, None])
            correction = tl.exp2(m * factor - shift)
        else:
            p = tl.exp2(s - shift[:, None])
            correction = tl.exp2(m - shift)
        l = l * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        m = highest

        inside = None
        if MASKED and ALIGNED:
            inside = key < end
        values = load_rows(
            v, at * v_page + slot * v_slot, inside, dtype, HEAD_DIM, BLOCK_D, FORMAT, PACKED, NVIDIA
        )
        if FORMAT != "same":
            value_scale = tl.load(v_scale + at * scale_page + slot * scale_slot)
            if MASKED and ALIGNED:
                value_scale = tl.where(inside, value_scale, 0.0)
            if dtype == tl.float16:
                # A weight times a scale may fall below what float16 holds; a value times its scale does not.
                values = (values.to(tl.float32) * (value_scale * 2.0**UNIT)[:, None]).to(dtype)
            else:
                p = p * (value_scale * 2.0 ** (UNIT // 2))[None, :]
        acc = tl.dot(p.to(dtype), values, acc, input_precision=PRECISION)
    return m, l, acc, page


@triton.jit
def scores_in_base_2(m, softmax_scale, dtype: tl.constexpr, PLAIN: tl.constexpr, FORMAT: tl.constexpr):
    """The maxima as they stand in 2^(s − m)."""
    UNIT: tl.constexpr = unit_exponent(FORMAT, dtype)
    if PLAIN:
        scale = softmax_scale
        if FORMAT != "same":
            scale = softmax_scale * 2.0 ** (UNIT - UNIT // 2)
        return m * (scale * LOG2_E)
    else:
        return m


@triton.constexpr_function
def value_unit(FORMAT, dtype):
    """What ``acc`` is still to be multiplied with."""
    unit = unit_exponent(FORMAT, dtype)
    return 1.0 if dtype == tl.float16 else 2.0 ** (unit - unit // 2)
