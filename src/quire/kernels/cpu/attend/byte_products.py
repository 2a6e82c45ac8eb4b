"""Decode's two products over int8 pages as integers, where the CPU multiplies bytes; ``short_products`` are AVX2's.

A query becomes integers of 16 bits, in steps of a power of two of its own, and meets keys in two products: of its high
bytes and of its low ones. A bfloat16 has 8 bits, so that only elements 2^7 times smaller than the largest lose any.
What they lose, times the largest number among a block's keys, bounds the error of a score. Where the bound exceeds
SLACK, the block's keys are converted to bfloat16 instead (``products``).

Weights become integers of 16 bits too, shares of the block's largest (off by 2^−17 of it at most, where bfloat16 is
off by 2^−9 of each), and meet the values of four tokens at once. The sums of integers are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import part
from quire.kernels.cpu.attend.products import (
    BLOCK,
    CORRECTION,
    DISTANCE,
    K_ROWS,
    K_SCALES,
    MAX_HEADS,
    OFFSET,
    Q_ROWS,
    STEP,
    UNIT,
    V_ROWS,
    prefetch_line,
    prefetch_row,
)
from quire.kernels.cpu.attend.rows import ZERO, Call
from quire.kernels.cpu.simd.integers import (
    add_integers,
    flip_signs,
    gather_quarters,
    load_bytes,
    multiply_bytes,
    power_below,
    shift_up,
    store_high,
    store_low,
    store_shorts,
    store_weights,
    subtract_integers,
    sum_integer_rows,
    to_floats,
    zip_rows_high,
    zip_rows_low,
    zip_words_high,
    zip_words_low,
)
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import BF16, BYTES, F32, load, load_f32, load_i64, store, store_f32
from quire.kernels.cpu.simd.pairs import LINE, load_pair
from quire.kernels.cpu.simd.vectors import (
    add,
    at_least,
    div,
    first_lane,
    fma,
    fold_max,
    fold_sum,
    magnitude,
    maximum,
    mul,
    select,
    splat,
    sub,
    tile,
)

# Largest error of a score, and so of lse: a sixteenth of the error of a weight rounded to bfloat16.
SLACK = np.float32(2.0**-13)
ROUND = np.float32(12582912.0)  # 1.5·2^23: adding it leaves a number of 16 bits, rounded, in the lowest ones
MOST = np.float32(65535.0)
INFINITY, NAN = np.float32(np.inf), np.float32(np.nan)
MOST_KEY = np.float32(128.0)
TINY = np.float32(2.0**-110)  # 65535 divided by it is finite, and a 65535th of it normal


@part
def split_query(cfg: Any, source: int, q_row: int, state: int, g: int) -> Any:
    """Lay head g's query as integers of 16 bits: as shorts, or as bytes behind its row of scratch, high ones first.

    Returns the sum of its elements' rounding errors; infinity where one is NaN.
    """
    largest = splat(ZERO)
    for i in range(cfg.vectors):
        largest = maximum(largest, magnitude(load(BF16, source + i * LANES * BYTES[BF16])))
    power = maximum(power_below(fold_max(largest, 1)), splat(TINY))
    step, inverse = mul(power, splat(np.float32(2.0**-14))), div(splat(np.float32(2.0**14)), power)
    high, low, lost = high_bytes(cfg, q_row), low_bytes(cfg, q_row), splat(ZERO)
    for i in range(cfg.vectors):
        exact = mul(load(BF16, source + i * LANES * BYTES[BF16]), inverse)
        rounded = add(exact, splat(ROUND))
        if cfg.shorts:
            store_shorts(short_row(cfg, q_row) + i * LANES * 2, rounded)
        else:
            store_high(high + i * LANES, rounded)
            store_low(low + i * LANES, rounded)
        lost = add(lost, magnitude(sub(exact, sub(rounded, splat(ROUND)))))
    offset = ZERO if cfg.shorts else offset_of(cfg, high)
    for t in range(cfg.tokens):
        lane = (t * cfg.padded_heads + g) * 4
        store_f32(state + STEP + lane, first_lane(step))
        store_f32(state + OFFSET + lane, offset)
    loss = first_lane(mul(fold_sum(lost, 1), step))
    return loss if loss == loss else INFINITY


@part
def offset_of(cfg: Any, high: int) -> Any:
    """What adding 128 to every key adds to a score: 128 times the sum of the query's high bytes, times 256."""
    offsets = tile(LANES)
    for j in range(LANES):
        offsets[j] = splat(ZERO)
    for i in range(cfg.lines):
        offsets[0] = multiply_bytes(flip_signs(splat(ZERO)), load(F32, high + i * LINE), offsets[0])
    return first_lane(shift_up(sum_integer_rows(offsets)))


@part
def integers_suffice(cfg: Any, call: Call, count: int, here: int, loss: float) -> Any:
    """Whether no score of a block is off by more than SLACK where no query loses more than ``loss`` as integers."""
    largest = splat(ZERO)
    for j in range(0, count, LANES):
        largest = maximum(largest, magnitude(load(F32, here + K_SCALES + j * 4)))
    return loss * first_lane(fold_max(largest, 1)) * MOST_KEY * abs(np.float32(call.softmax_scale)) <= SLACK


@part
def high_bytes(cfg: Any, q_row: int) -> Any:
    """Where a query's high bytes lie, behind its row of pairs."""
    return q_row + cfg.head_dim * BYTES[BF16]


@part
def low_bytes(cfg: Any, q_row: int) -> Any:
    """Where its low bytes lie."""
    return high_bytes(cfg, q_row) + cfg.head_dim


@part
def short_row(cfg: Any, q_row: int) -> Any:
    """Where its shorts lie: a tile has at most half of MAX_HEADS heads there, and the other half's rows are free."""
    return q_row + MAX_HEADS // 2 * cfg.row_bytes


@part
def score_bytes(
    cfg: Any, count: int, here: int, upcoming: int, state: int, scale: float, scores: int
) -> None:
    """scores[t, g] = q_g · k_t, as ``score_block``: (256 · high_g + low_g) · k_t, times the step."""
    k_rows, v_rows, q_rows = here + K_ROWS, here + V_ROWS, state + Q_ROWS
    factor, offset = mul(load(F32, state + STEP), splat(scale)), load(F32, state + OFFSET)
    for first in range(0, count, cfg.tokens):
        products = tile(LANES)
        for j in range(LANES):
            products[j] = splat(ZERO)
        for i in range(cfg.lines):
            for t in range(cfg.tokens):
                prefetch_line(upcoming + K_ROWS, first + t, i * LINE)
                prefetch_line(v_rows, first + t, i * LINE)
                prefetch_line(k_rows, first + t + DISTANCE, i * LINE)
                k = flip_signs(load_bytes(load_i64(k_rows + (first + t) * 8) + i * LINE))
                for g in range(cfg.heads):
                    q = load(F32, high_bytes(cfg, q_rows + g * cfg.row_bytes) + i * LINE)
                    j = t * cfg.padded_heads + g
                    products[j] = multiply_bytes(k, q, products[j])
        for j in range(LANES):
            products[j] = shift_up(products[j])
        for i in range(cfg.lines):
            for t in range(cfg.tokens):
                k = load_bytes(load_i64(k_rows + (first + t) * 8) + i * LINE)
                for g in range(cfg.heads):
                    q = load(F32, low_bytes(cfg, q_rows + g * cfg.row_bytes) + i * LINE)
                    j = t * cfg.padded_heads + g
                    products[j] = multiply_bytes(q, k, products[j])
        sums = subtract_integers(sum_integer_rows(products), offset)
        store(F32, scores + first * cfg.padded_heads * 4, mul(to_floats(sums), factor))


@part
def quantize_weights(cfg: Any, vectors: int, state: int, scores: int) -> None:
    """Weights become multiples of a 65535th of the largest, as bytes of four tokens together; UNIT is that 65535th.

    UNIT is NaN where a weight is NaN, infinite or negative.
    """
    largest, invalid = splat(ZERO), splat(ZERO)
    for j in range(vectors):
        weights = load(F32, scores + j * LANES * 4)
        largest = maximum(largest, weights)
        # 0 for finite weights of at least 0: integers hold no others.
        invalid = add(invalid, sub(magnitude(weights), weights))
    largest = maximum(fold_max(largest, cfg.padded_heads), splat(TINY))
    shares = div(splat(MOST), largest)
    for j in range(vectors):
        at = scores + j * LANES * 4
        store_weights(at, add(mul(load(F32, at), shares), splat(ROUND)), cfg.padded_heads)
    sound = at_least(splat(ZERO), fold_sum(invalid, cfg.padded_heads))
    store(F32, state + UNIT, select(sound, mul(largest, splat(np.float32(1.0) / MOST)), splat(NAN)))


@part
def load_four(cfg: Any, v_rows: int, t: int, i: int) -> Any:
    """Vector i of the values of four tokens: four of 64 to a lane, in the order that ``restore_byte_order`` undoes."""
    offset = i // 4 * LINE
    rows = v_rows + t * 8
    a, b = load_bytes(load_i64(rows) + offset), load_bytes(load_i64(rows + 8) + offset)
    c, d = load_bytes(load_i64(rows + 16) + offset), load_bytes(load_i64(rows + 24) + offset)
    ab, cd = (zip_rows_high(a, b), zip_rows_high(c, d)) if i & 2 else (zip_rows_low(a, b), zip_rows_low(c, d))
    return zip_words_high(ab, cd) if i & 1 else zip_words_low(ab, cd)


@part
def prefetch_ahead(cfg: Any, first: int, t: int, v_rows: int, upcoming: int) -> None:
    """While a strip takes the values from token t on: the next block's rows, all by the last strip's end, and values
    further down for the first."""
    strips = cfg.vectors // cfg.strip
    for ahead in range(cfg.at_once):
        step = first // cfg.strip * BLOCK + t + ahead
        if step % strips == 0:
            prefetch_row(cfg, upcoming + V_ROWS, step // strips)
            prefetch_row(cfg, upcoming + K_ROWS, step // strips)
        if first == 0:
            prefetch_row(cfg, v_rows, min(t + ahead + DISTANCE, BLOCK - 1))


@part
def accumulate_bytes(cfg: Any, count: int, here: int, upcoming: int, state: int, scores: int) -> None:
    """acc_g = correction_g · acc_g + unit_g · Σ_t (256 · high[t, g] + low[t, g]) v_t, as ``accumulate_values``."""
    v_rows, accs = here + V_ROWS, state + Q_ROWS + MAX_HEADS * cfg.row_bytes
    for first in range(0, cfg.vectors, cfg.strip):
        sums = tile(cfg.strip_tile)
        values = tile(cfg.strip)
        for j in range(cfg.strip_tile):
            sums[j] = splat(ZERO)
        for t in range(0, count, cfg.at_once):
            prefetch_ahead(cfg, first, t, v_rows, upcoming)
            for i in range(cfg.strip):
                values[i] = load_four(cfg, v_rows, t, first + i)
            weights = scores + t // cfg.tokens * LANES * 4 + t % cfg.tokens * cfg.padded_heads
            for g in range(cfg.heads):
                high, low = load_pair(weights + g * 4), load_pair(weights + LANES + g * 4)
                for i in range(cfg.strip):
                    j = (g * cfg.strip + i) * 2
                    sums[j] = multiply_bytes(high, values[i], sums[j])
                    sums[j + 1] = multiply_bytes(low, values[i], sums[j + 1])
        for g in range(cfg.heads):
            correction, unit = load_f32(state + CORRECTION + g * 4), load_f32(state + UNIT + g * 4)
            for i in range(cfg.strip):
                at, j = accs + g * cfg.row_bytes + (first + i) * LANES * 4, (g * cfg.strip + i) * 2
                total = to_floats(add_integers(shift_up(sums[j]), sums[j + 1]))
                store(F32, at, fma(splat(unit), total, mul(splat(correction), load(F32, at))))


@part
def restore_byte_order(cfg: Any, row: int) -> None:
    """Undo ``load_four``'s order in a row of float32 scratch."""
    for i in range(cfg.lines):
        at = row + i * LINE * 4
        a, b = load(F32, at), load(F32, at + LANES * 4)
        c, d = load(F32, at + LANES * 8), load(F32, at + LANES * 12)
        store(F32, at, gather_quarters(a, b, c, d, 0))
        store(F32, at + LANES * 4, gather_quarters(a, b, c, d, 1))
        store(F32, at + LANES * 8, gather_quarters(a, b, c, d, 2))
        store(F32, at + LANES * 12, gather_quarters(a, b, c, d, 3))
