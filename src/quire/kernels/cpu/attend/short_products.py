"""Decode's two products over int8 pages as integers of 16 bits ("shorts"), with AVX2: ``vpmaddwd``, two a lane.

Queries become the integers that ``byte_products`` splits into bytes, and the same bound says when a block is multiplied
as float32 instead. Here they stay whole: one product of 16 × 8 bits where bytes need two, and where float32 needs two
and a conversion. ``vpmaddubsw``, which multiplies bytes, sums in 16 bits that 255 · 127 · 2 exceeds: a query would need
three products of 6 bits each, and two more instructions a product to widen its sums.

Weights become shares of the block's largest, with a sign (off by 2^−16 of it at most), and meet the values of two
tokens at once. Nothing overflows: a score is at most 512 · 32640 · 128 < 2^31, a block's sum 64 · 32767 · 128 < 2^29.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import part
from quire.kernels.cpu.attend.byte_products import NAN, ROUND, TINY, prefetch_ahead, short_row
from quire.kernels.cpu.attend.products import (
    CORRECTION,
    DISTANCE,
    K_ROWS,
    MAX_HEADS,
    Q_ROWS,
    STEP,
    UNIT,
    V_ROWS,
    prefetch_line,
)
from quire.kernels.cpu.attend.rows import ZERO
from quire.kernels.cpu.simd.integers import (
    gather_high_halves,
    gather_low_halves,
    load_shorts,
    multiply_shorts,
    pair_shorts,
    sum_integer_rows,
    to_floats,
    zip_words_high,
    zip_words_low,
)
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, load_f32, load_i64, store
from quire.kernels.cpu.simd.pairs import LINE, load_pair, rotate
from quire.kernels.cpu.simd.vectors import (
    add,
    at_least,
    div,
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

MOST = np.float32(32767.0)
LINE_VECTORS = LINE // (2 * LANES)  # vectors of shorts in a line of bytes


@part
def score_shorts(
    cfg: Any, count: int, here: int, upcoming: int, state: int, scale: float, scores: int
) -> None:
    """scores[t, g] = q_g · k_t, as ``score_block``: products of integers, times the query's step."""
    k_rows, v_rows, q_rows = here + K_ROWS, here + V_ROWS, short_row(cfg, state + Q_ROWS)
    factor = mul(load(F32, state + STEP), splat(scale))
    for first in range(0, count, cfg.tokens):
        products = tile(LANES)
        for j in range(LANES):
            products[j] = splat(ZERO)
        for line in range(0, cfg.short_vectors, LINE_VECTORS):
            for t in range(cfg.tokens):
                prefetch_line(upcoming + K_ROWS, first + t, line * 2 * LANES)
                prefetch_line(v_rows, first + t, line * 2 * LANES)
                prefetch_line(k_rows, first + t + DISTANCE, line * 2 * LANES)
            for i in range(LINE_VECTORS):
                for t in range(cfg.tokens):
                    k = load_shorts(load_i64(k_rows + (first + t) * 8) + (line + i) * 2 * LANES)
                    for g in range(cfg.heads):
                        q = load(F32, q_rows + g * cfg.row_bytes + (line + i) * LANES * 4)
                        j = t * cfg.padded_heads + g
                        products[j] = multiply_shorts(k, q, products[j])
        sums = to_floats(sum_integer_rows(products))
        store(F32, scores + first * cfg.padded_heads * 4, mul(sums, factor))


@part
def weights_to_shorts(cfg: Any, vectors: int, state: int, scores: int) -> None:
    """Weights become multiples of a 32767th of the largest, each paired with the next token's; UNIT is that 32767th.

    UNIT is NaN where a weight is NaN or infinite.
    """
    largest, invalid = splat(ZERO), splat(ZERO)
    for j in range(vectors):
        weights = load(F32, scores + j * LANES * 4)
        largest = maximum(largest, magnitude(weights))
        invalid = add(invalid, sub(weights, weights))  # 0 for finite weights: integers hold no others
    largest = maximum(fold_max(largest, cfg.padded_heads), splat(TINY))
    shares = div(splat(MOST), largest)
    for j in range(vectors):
        at = scores + j * LANES * 4
        steps = add(mul(load(F32, at), shares), splat(ROUND))
        store(F32, at, pair_shorts(steps, rotate(steps, cfg.padded_heads)))
    sound = at_least(splat(ZERO), fold_sum(invalid, cfg.padded_heads))
    store(F32, state + UNIT, select(sound, mul(largest, splat(np.float32(1.0) / MOST)), splat(NAN)))


@part
def accumulate_shorts(cfg: Any, count: int, here: int, upcoming: int, state: int, scores: int) -> None:
    """acc_g = correction_g · acc_g + unit_g · Σ_t w[t, g] v_t, as ``accumulate_values``.

    Two tokens' values are zipped within 16 bytes of a vector, so that acc lies in an order that ``restore_short_order``
    undoes.
    """
    v_rows, accs = here + V_ROWS, state + Q_ROWS + MAX_HEADS * cfg.row_bytes
    for first in range(0, cfg.vectors, cfg.strip):
        sums = tile(cfg.strip_tile)
        values = tile(cfg.strip)
        for j in range(cfg.strip_tile):
            sums[j] = splat(ZERO)
        for t in range(0, count, cfg.at_once):
            prefetch_ahead(cfg, first, t, v_rows, upcoming)
            row, next_row = load_i64(v_rows + t * 8), load_i64(v_rows + t * 8 + 8)
            for i in range(0, cfg.strip, 2):
                one, other = (
                    load_shorts(row + (first + i) * LANES),
                    load_shorts(next_row + (first + i) * LANES),
                )
                values[i] = zip_words_low(one, other)
                values[i + 1] = zip_words_high(one, other)
            for g in range(cfg.heads):
                weights = load_pair(scores + (t * cfg.padded_heads + g) * 4)
                for i in range(cfg.strip):
                    j = g * cfg.strip + i
                    sums[j] = multiply_shorts(weights, values[i], sums[j])
        for g in range(cfg.heads):
            correction, unit = load_f32(state + CORRECTION + g * 4), load_f32(state + UNIT + g * 4)
            for i in range(cfg.strip):
                at = accs + g * cfg.row_bytes + (first + i) * LANES * 4
                total = to_floats(sums[g * cfg.strip + i])
                store(F32, at, fma(splat(unit), total, mul(splat(correction), load(F32, at))))


@part
def restore_short_order(cfg: Any, row: int) -> None:
    """Undo the order of zipped values in a row of float32 scratch."""
    for i in range(0, cfg.vectors, 2):
        at = row + i * LANES * 4
        a, b = load(F32, at), load(F32, at + LANES * 4)
        store(F32, at, gather_low_halves(a, b))
        store(F32, at + LANES * 4, gather_high_halves(a, b))
