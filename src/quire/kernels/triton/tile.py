"""One tile's arithmetic: packed query rows against a range of keys, block by block, the softmax kept online.

For each block of keys t, with query rows r:

    s[r, t] = log2(e) · (softcap(scale · q_r · k_t) − slope · |position_r − t|)     −inf where hidden
    m' = max(m, max_t s),  p = 2^(s − m'),  l = l·2^(m − m') + Σ_t p
    acc = acc·2^(m − m') + p V

Values of hidden keys are not read, as 0 · NaN is NaN. ``layout`` says how scores and acc lie in registers, ``pages``
where keys and values lie in memory.

Quantised keys and values are multiplied as float16, which holds each of them exactly and is cheap to make of a byte. To
fit float16's range, rows of q are first divided by powers of two (``split_queries``), and weights times their values'
scales by the largest power of two among the scales so far (``unit``). float32 steps do without both.

Sources: PagedAttention, arXiv:2309.06180 §4.1; online softmax, arXiv:1805.02867; FlashAttention, arXiv:2307.08691.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quire.kernels.triton.formats import unit_exponent
from quire.kernels.triton.layout import add_values, by_key, by_row, per_row
from quire.kernels.triton.pages import load_rows, load_values, page_ids, slots_in_page

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


class Rows(NamedTuple):
    """A tile's query rows, and what decides which keys each of them sees."""

    queries: Any  # [rows, dims], as ``split_queries`` gives them
    score_scale: Any  # the softmax's, times what the queries were divided by: one for all rows or one each
    position: Any  # of each row in its sequence
    slopes: Any  # ALiBi's, or None
    mask_row: Any  # where each row's tree mask lies, or None
    first_new: Any  # the key at which the tree mask's first column stands
    mask_columns: Any
    window_left: Any


class Reach(NamedTuple):
    """The keys that a tile may see, ``begin:end``, and its sequence's page ids."""

    table: Any
    begin: Any
    end: Any


class Pages(NamedTuple):
    """One KV head's keys and values, their scales or None, and the strides between pages and slots."""

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    k_page: Any
    k_slot: Any
    v_page: Any
    v_slot: Any
    scale_page: Any
    scale_slot: Any


class CompiledFor(NamedTuple):
    """Those of ``attend.Constants`` that a tile's arithmetic depends on."""

    HEAD_DIM: Any
    PAGE_SIZE: Any
    BLOCK_N: Any
    BLOCK_D: Any
    CAUSAL: Any
    WINDOW: Any
    SOFTCAP: Any
    PLAIN: Any
    FORMAT: Any
    PACKED: Any
    ALIGNED: Any
    TRANSPOSED: Any
    INVARIANT: Any
    FINE: Any
    CAPABILITY: Any
    PRECISION: Any
    NUM_STAGES: Any


@triton.jit
def visible_keys(key, rows, reach, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which keys each row may see, as scores lie; the rules are those of ``AttentionPlan.run``."""
    seen = by_key(key < reach.end, TRANSPOSED)
    key_here, position = by_key(key, TRANSPOSED), by_row(rows.position, TRANSPOSED)
    if CAUSAL:
        seen = seen & (key_here <= position)
    if WINDOW:
        # The first block reaches back to the grid, into keys out of sight or another part's.
        seen = seen & (key_here >= reach.begin) & (key_here >= position - rows.window_left)
    if rows.mask_row is not None:
        column = key - rows.first_new
        asked = seen & by_key((column >= 0) & (column < rows.mask_columns), TRANSPOSED)
        at = by_row(rows.mask_row, TRANSPOSED) + by_key(column, TRANSPOSED)
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
def attend_keys(m, l, acc, unit, page, rows, reach, pages, start, stop, softcap, MASKED: tl.constexpr, c):
    """Fold blocks ``start`` to ``stop`` of the keys that a tile may see into (m, l, acc, unit); ``c`` is a CompiledFor.

    ``page`` holds the first block's page ids; those of the block after the last are returned with the state.
    MASKED is False where every row sees every key of these blocks. PLAIN scores are scale · q · k with a positive
    scale and nothing else: their maximum is kept unscaled, and each weight costs one fused multiply-add,
    p = 2^(f·s − f·m) with f = log2(e) · scale. FINE weights are multiplied in two parts: times a value's scale, one
    float16 would round as much as the result does.
    """
    dtype: tl.constexpr = rows.queries.dtype
    UNIT: tl.constexpr = unit_exponent(c.FORMAT, dtype)
    KEYS: tl.constexpr = 0 if c.TRANSPOSED else 1
    APART: tl.constexpr = c.TRANSPOSED and c.PACKED
    begin, end, last = reach.begin, reach.end, reach.end - 1
    scale = rows.score_scale * 2.0 ** (UNIT - UNIT // 2)
    for first in tl.range(start, stop, c.BLOCK_N, num_stages=c.NUM_STAGES):
        slot = slots_in_page(first, begin, last, c.PAGE_SIZE, c.BLOCK_N, c.ALIGNED)
        at = page.to(tl.int64)
        # Page ids are fetched a block ahead, by hand: a load that waited for its own page id would
        # cost the compiler's pipeline half its depth.
        page = page_ids(reach.table, first + c.BLOCK_N, begin, last, c.PAGE_SIZE, c.BLOCK_N, c.ALIGNED)
        key = first + tl.arange(0, c.BLOCK_N)
        row = at * pages.k_page + slot * pages.k_slot
        keys = load_rows(pages.k, row, None, dtype, c.HEAD_DIM, c.BLOCK_D, c.FORMAT, c.PACKED, c.CAPABILITY)
        if c.TRANSPOSED:
            s = tl.dot(keys, tl.trans(rows.queries), input_precision=c.PRECISION)
        else:
            s = tl.dot(rows.queries, tl.trans(keys), input_precision=c.PRECISION)
        if c.FORMAT != "same":
            # Half of the unit with the key's scale, half with the softmax's: all of it at once could overflow.
            key_scale = tl.load(pages.k_scale + at * pages.scale_page + slot * pages.scale_slot)
            s = s * by_key(key_scale * 2.0 ** (UNIT // 2), c.TRANSPOSED)
        s = shape_scores(s, scale, softcap, rows.slopes, rows.position, key, c.SOFTCAP, c.PLAIN, c.TRANSPOSED)
        if MASKED:
            s = tl.where(visible_keys(key, rows, reach, c.CAUSAL, c.WINDOW, c.TRANSPOSED), s, NO_SCORE)

        highest = tl.maximum(m, tl.max(s, KEYS))
        p, correction = weigh(s, m, highest, scale, MASKED, c.PLAIN, c.TRANSPOSED)
        l = tl.fma(l, correction, tl.sum(p, KEYS))
        m = highest

        inside = None
        if MASKED and c.ALIGNED:
            inside = key < end
        row = at * pages.v_page + slot * pages.v_slot
        values = load_values(
            pages.v, row, inside, dtype, c.HEAD_DIM, c.BLOCK_D, c.FORMAT, c.PACKED, c.TRANSPOSED, c.CAPABILITY
        )
        if c.FORMAT != "same":
            value_scale = tl.load(pages.v_scale + at * pages.scale_page + slot * pages.scale_slot)
            if inside is not None:
                value_scale = tl.where(inside, value_scale, 0.0)
            p, correction, unit = scale_weights(
                p, correction, unit, value_scale, c.FORMAT, dtype, c.INVARIANT, c.TRANSPOSED
            )
        weights = p.to(dtype)
        acc = add_values(
            acc, by_row(correction, c.TRANSPOSED), weights, values, c.TRANSPOSED, APART, c.PRECISION
        )
        if c.FINE:
            rest = (p - weights).to(dtype)
            acc = add_values(acc, 1.0, rest, values, c.TRANSPOSED, APART, c.PRECISION)
    return m, l, acc, unit, page


@triton.jit
def shape_scores(
    s, scale, softcap, slopes, position, key,
    SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Products as scores in base 2; PLAIN ones as they are."""
    if SOFTCAP:
        s = (softcap * LOG2_E) * tanh(s * per_row(scale / softcap, TRANSPOSED))
    elif not PLAIN:
        s = s * per_row(scale * LOG2_E, TRANSPOSED)
    if slopes is not None:
        distance = tl.abs(by_row(position, TRANSPOSED) - by_key(key, TRANSPOSED)).to(tl.float32)
        s -= by_row(slopes * LOG2_E, TRANSPOSED) * distance
    return s


@triton.jit
def weigh(s, m, highest, scale, MASKED: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """2^(s − highest), and what is to be multiplied with what was weighed by ``m``, 2^(m − highest)."""
    shift = highest
    if MASKED:  # a row that has seen nothing yet: −inf − −inf is no number
        shift = tl.where(highest == NO_SCORE, 0.0, highest)
    if PLAIN:
        factor = scale * LOG2_E
        shift = shift * factor
        p = tl.exp2(tl.fma(s, per_row(factor, TRANSPOSED), -by_row(shift, TRANSPOSED)))
        # Not an fma: m · factor is rounded as ``shift`` was when m was the highest. Where it still is, the correction
        # is 1 to the bit, and a block that a row does not see leaves the row's bits alone.
        return p, tl.exp2(m * factor - shift)
    else:
        return tl.exp2(s - by_row(shift, TRANSPOSED)), tl.exp2(m - shift)


@triton.jit
def scale_weights(
    p, correction, unit, value_scale,
    FORMAT: tl.constexpr, dtype: tl.constexpr, INVARIANT: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Weights times their values' scales, over ``unit``, which grows with them."""
    UNIT: tl.constexpr = unit_exponent(FORMAT, dtype)
    KEYS: tl.constexpr = 0 if TRANSPOSED else 1
    if is_narrow(FORMAT, dtype):
        # Where no bit of a row may depend on keys that it cannot see, each row has a unit of its own.
        largest = value_scale
        if INVARIANT:
            largest = p * by_key(value_scale, TRANSPOSED)
        larger = tl.maximum(unit, power_of_two(tl.max(largest, KEYS if INVARIANT else 0)))
        correction = correction * (unit / larger)
        unit = larger
        p = p * per_row(1.0 / unit, TRANSPOSED)
    return p * by_key(value_scale * 2.0 ** (UNIT // 2), TRANSPOSED), correction, unit


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
