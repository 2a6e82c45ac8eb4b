"""One tile's arithmetic: packed query rows against a range of keys, block by block, the softmax kept online.

For each block of keys t, with query rows r:

    s[r, t] = log2(e) · (softcap(scale · q_r · k_t) − slope · |position_r − t|)     −inf where hidden
    m' = max(m, max_t s),  p = 2^(s − m'),  l = l·2^(m − m') + Σ_t p
    acc = acc·2^(m − m') + p V

Blocks lie on the grid of BLOCK_N tokens, counted from the sequence's first. Addresses never leave what the tile may
see, ``begin`` to ``last``, and no hidden value is read: its weight of 0 would not silence a NaN.

TRANSPOSED scores lie [keys, rows], and acc [dims, rows]. The matrix units take tiles of 16 by 8: a decode tile's few
rows are then the side of 8, and keys, not queries, the operand whose registers must be neighbours.

Stored as bytes, keys and values are multiplied as float16, which holds each of them exactly and is cheap to make of a
byte. Rows of q are first divided by powers of two, ``split_queries``, and weights, times their values' scales, by the
largest power of two in those scales so far, ``unit``: so both fit float16's range. Steps in float32 need none of it.

Sources: PagedAttention, arXiv:2309.06180 §4.1; online softmax, arXiv:1805.02867; FlashAttention, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.formats import unit_exponent, widen, widen_apart, widen_words

LOG2_E = tl.constexpr(1.4426950408889634)
NO_SCORE = tl.constexpr(float("-inf"))
SMALLEST = tl.constexpr(2.0**-126)  # the first unit: no scale is smaller but 0


@triton.jit
def tanh(y):
    """(1 − e) / (1 + e) with e = 2^(−2·log2(e)·|y|); near 0, where that cancels, the odd series."""
    e = tl.exp2(tl.abs(y) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    square = y * y
    near = y * (
        1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    )
    return tl.where(tl.abs(y) < 0.25, near, tl.where(y < 0, -far, far))


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
def visible_keys(
    key, position, begin, end, window_left, mask_row, first_new, mask_columns,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which keys each row may see, as scores lie; see the contract in ``work`` and ``attention``."""
    seen = by_key(key < end, TRANSPOSED)
    key_here, position = by_key(key, TRANSPOSED), by_row(position, TRANSPOSED)
    if CAUSAL:
        seen = seen & (key_here <= position)
    if WINDOW:
        # The first block reaches back to the grid, into keys out of sight or another part's.
        seen = seen & (key_here >= begin) & (key_here >= position - window_left)
    if TREE:
        column = key - first_new
        asked = seen & by_key((column >= 0) & (column < mask_columns), TRANSPOSED)
        at = by_row(mask_row, TRANSPOSED) + by_key(column, TRANSPOSED)
        seen = seen & (tl.load(at, mask=asked, other=1) != 0)
    return seen


@triton.constexpr_function
def number_type(FORMAT, dtype):
    """What keys and values are multiplied as."""
    return dtype if FORMAT == "same" or dtype == tl.float32 else tl.float16


@triton.jit
def split_queries(queries, FORMAT: tl.constexpr):
    """Rows of q as ``number_type``, and what they were divided by: powers of two, or 1 for all."""
    dtype: tl.constexpr = number_type(FORMAT, queries.dtype)
    if FORMAT == "same" or dtype == tl.float32:
        return queries, 1.0
    else:
        wide = queries.to(tl.float32)
        unit = power_of_two(tl.max(tl.abs(wide), 1))
        return (wide / unit[:, None]).to(dtype), unit


@triton.jit
def power_of_two(x):
    """The largest one in each number, SMALLEST at least."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, SMALLEST)


@triton.jit
def load_rows(
    pages, row, inside, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr,
    CAPABILITY: tl.constexpr,
):  # fmt: skip
    """Rows of pages [len(row), BLOCK_D] as ``dtype`` numbers (see ``formats``), 0 where not ``inside``.

    PACKED rows are counted in int32s.
    """
    if PACKED:
        word = tl.arange(0, BLOCK_D // 4)
        stored = load_tile(
            pages.to(tl.pointer_type(tl.int32)), row, word, HEAD_DIM // 4, BLOCK_D // 4, inside, False
        )
        return widen_words(stored, FORMAT, CAPABILITY)
    else:
        dim = tl.arange(0, BLOCK_D)
        return widen(load_tile(pages, row, dim, HEAD_DIM, BLOCK_D, inside, False), FORMAT, dtype)


@triton.jit
def load_tile(
    base, row, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, inside, TRANSPOSED: tl.constexpr
):
    """[rows, columns] elements, or [columns, rows], with a mask only where one is needed."""
    at = base + by_row(row, TRANSPOSED) + by_key(column, TRANSPOSED)
    exists = by_key(column < COLUMNS, TRANSPOSED)
    if inside is not None:
        return tl.load(at, mask=by_row(inside, TRANSPOSED) & exists, other=0)
    elif COLUMNS == BLOCK:
        return tl.load(at)
    else:
        return tl.load(at, mask=exists, other=0)


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
def first_unit(FORMAT: tl.constexpr, dtype: tl.constexpr, INVARIANT: tl.constexpr, ROWS: tl.constexpr):
    """``unit`` before any key: one for all rows, or for each."""
    if is_narrow(FORMAT, dtype):
        if INVARIANT:
            return tl.full([ROWS], SMALLEST, tl.float32)
        else:
            return tl.full([], SMALLEST, tl.float32)
    else:
        return tl.full([], 1.0, tl.float32)


@triton.constexpr_function
def is_narrow(FORMAT, dtype):
    """Whether stored bytes are multiplied as float16."""
    return FORMAT != "same" and dtype == tl.float16


@triton.jit
def prefetch_rows(pages, row, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr):
    """Ask the second cache for rows of pages, 64 bytes at a time; NVIDIA only."""
    if PACKED:
        row = row * 4  # counted in int32s
    BYTES: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = (HEAD_DIM * BYTES + 63) // 64
    for line in tl.static_range(LINES):
        at = pages + (row + line * (64 // BYTES))
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def attend_keys(
    m, l, acc, unit, page, queries, score_scale, position, slopes, mask_row, first_new, mask_columns,
    start, stop, begin, end, table, k, v, k_scale, v_scale,
    k_page, k_slot, v_page, v_slot, scale_page, scale_slot, softcap, window_left,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr,
    INVARIANT: tl.constexpr, FINE: tl.constexpr, CAPABILITY: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Fold blocks ``start`` to ``stop`` of a tile that may see keys ``begin:end`` into (m, l, acc, unit).

    ``page`` holds the first block's page ids; those of the block after the last are returned with the state.
    MASKED is False where every row sees every key of these blocks. PLAIN scores are scale · q · k with a positive
    scale and nothing else: their maximum is kept unscaled, and each weight costs one fused multiply-add,
    p = 2^(c·s − c·m) with c = log2(e) · scale. ``score_scale`` is that scale, one for all rows or one each. FINE
    weights are multiplied in two parts: times a value's scale, one float16 would round as much as the result does.
    """
    dtype: tl.constexpr = queries.dtype
    NARROW: tl.constexpr = is_narrow(FORMAT, dtype)
    UNIT: tl.constexpr = unit_exponent(FORMAT, dtype)
    KEYS: tl.constexpr = 0 if TRANSPOSED else 1
    APART: tl.constexpr = TRANSPOSED and PACKED  # even and odd dims, see ``formats.widen_apart``
    last = end - 1
    scale = score_scale * 2.0 ** (UNIT - UNIT // 2)
    for first in tl.range(start, stop, BLOCK_N, num_stages=NUM_STAGES):
        slot = slots_in_page(first, begin, last, PAGE_SIZE, BLOCK_N, ALIGNED)
        at = page.to(tl.int64)
        # Page ids are fetched a block ahead, by hand: a load that waited for its own page id would
        # cost the compiler's pipeline half its depth.
        page = page_ids(table, first + BLOCK_N, begin, last, PAGE_SIZE, BLOCK_N, ALIGNED)
        key = first + tl.arange(0, BLOCK_N)

        keys = load_rows(
            k, at * k_page + slot * k_slot, None, dtype, HEAD_DIM, BLOCK_D, FORMAT, PACKED, CAPABILITY
        )
        if TRANSPOSED:
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        else:
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if FORMAT != "same":
            # Half of the unit with the key's scale, half with the softmax's: all of it at once could overflow.
            key_scale = tl.load(k_scale + at * scale_page + slot * scale_slot)
            s = s * by_key(key_scale * 2.0 ** (UNIT // 2), TRANSPOSED)
        if SOFTCAP:
            s = (softcap * LOG2_E) * tanh(s * per_row(scale / softcap, TRANSPOSED))
        elif not PLAIN:
            s = s * per_row(scale * LOG2_E, TRANSPOSED)
        if slopes is not None:
            distance = tl.abs(by_row(position, TRANSPOSED) - by_key(key, TRANSPOSED)).to(tl.float32)
            s -= by_row(slopes * LOG2_E, TRANSPOSED) * distance
        if MASKED:
            seen = visible_keys(
                key, position, begin, end, window_left, mask_row, first_new, mask_columns,
                CAUSAL, WINDOW, mask_row is not None, TRANSPOSED,
            )  # fmt: skip
            s = tl.where(seen, s, NO_SCORE)

        highest = tl.maximum(m, tl.max(s, KEYS))
        shift = highest
        if MASKED:  # a row that has seen nothing yet: −inf − −inf is no number
            shift = tl.where(highest == NO_SCORE, 0.0, highest)
        if PLAIN:
            factor = scale * LOG2_E
            shift = shift * factor
            p = tl.exp2(tl.fma(s, per_row(factor, TRANSPOSED), -by_row(shift, TRANSPOSED)))
            correction = tl.exp2(tl.fma(m, factor, -shift))
        else:
            p = tl.exp2(s - by_row(shift, TRANSPOSED))
            correction = tl.exp2(m - shift)
        l = tl.fma(l, correction, tl.sum(p, KEYS))
        m = highest

        inside = None
        if MASKED and ALIGNED:
            inside = key < end
        row = at * v_page + slot * v_slot
        if APART:
            pair = tl.arange(0, BLOCK_D // 2)
            pairs = load_tile(
                v.to(tl.pointer_type(tl.int16)), row * 2, pair, HEAD_DIM // 2, BLOCK_D // 2, inside, True
            )
            values = widen_apart(pairs, FORMAT, CAPABILITY)
        elif TRANSPOSED:
            stored = load_tile(v, row, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D, inside, True)
            values = widen(stored, FORMAT, dtype)
        else:
            values = load_rows(v, row, inside, dtype, HEAD_DIM, BLOCK_D, FORMAT, PACKED, CAPABILITY)
        if FORMAT != "same":
            value_scale = tl.load(v_scale + at * scale_page + slot * scale_slot)
            if MASKED and ALIGNED:
                value_scale = tl.where(inside, value_scale, 0.0)
            if NARROW:
                # Where no bit of a row may depend on keys that it cannot see, each row has a unit of its own.
                largest = value_scale
                if INVARIANT:
                    largest = p * by_key(value_scale, TRANSPOSED)
                larger = tl.maximum(unit, power_of_two(tl.max(largest, KEYS if INVARIANT else 0)))
                correction = correction * (unit / larger)
                unit = larger
                p = p * per_row(1.0 / unit, TRANSPOSED)
            p = p * by_key(value_scale * 2.0 ** (UNIT // 2), TRANSPOSED)
        weights = p.to(dtype)
        acc = add_values(acc, by_row(correction, TRANSPOSED), weights, values, TRANSPOSED, APART, PRECISION)
        if FINE:
            rest = (p - weights).to(dtype)
            acc = add_values(acc, 1.0, rest, values, TRANSPOSED, APART, PRECISION)
    return m, l, acc, unit, page


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


@triton.jit
def per_row(x, TRANSPOSED: tl.constexpr):
    """``by_row``, or the one number for all rows."""
    if x.type.is_block():
        return by_row(x, TRANSPOSED)
    else:
        return x


@triton.jit
def scores_in_base_2(m, score_scale, dtype: tl.constexpr, PLAIN: tl.constexpr, FORMAT: tl.constexpr):
    """The maxima as they stand in 2^(s − m)."""
    UNIT: tl.constexpr = unit_exponent(FORMAT, dtype)
    if PLAIN:
        return m * (score_scale * (2.0 ** (UNIT - UNIT // 2) * LOG2_E))
    else:
        return m


@triton.constexpr_function
def value_unit(FORMAT, dtype):
    """What ``acc`` is still to be multiplied with, beside ``unit``."""
    unit = unit_exponent(FORMAT, dtype)
    return 2.0 ** (unit - unit // 2)
