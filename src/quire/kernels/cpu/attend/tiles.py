"""Prefill's two products over one block of tokens: register tiles of transposed scores, and of weighted values.

Where the CPU multiplies bfloat16 pairs (``pairs``) both take half the steps: queries meet keys as they are, two numbers
at a time, and weights, rounded to bfloat16, meet values two tokens at a time.
"""

from __future__ import annotations

from typing import Any

from quire.kernels.compile import part
from quire.kernels.cpu.attend.rows import ZERO
from quire.kernels.cpu.attend.scores import BLOCK, CORRECTION, ROW_BYTES, SCORES
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, load_f32, load_i64, store
from quire.kernels.cpu.simd.pairs import load_pair, multiply_pairs
from quire.kernels.cpu.simd.vectors import add, fma, mul, splat, tile

# Register tiles: of S tokens × vectors of rows, of acc rows × vectors of head_dim. Their sums take 24 of 32 registers
# (AVX-512), or 12 of 16 (AVX); NEON keeps each vector of these in two of its 32.
SCORE_TOKENS, SCORE_VECTORS = (8, 3) if LANES == 16 else (4, 3)
VALUE_ROWS, VALUE_VECTORS = (6, 4) if LANES == 16 else (6, 2)
SEGMENT = 64  # steps along head_dim, at a time
SCORE_TILE, VALUE_TILE = SCORE_TOKENS * SCORE_VECTORS, VALUE_ROWS * VALUE_VECTORS
TILE_ROWS = SCORE_VECTORS * LANES  # rows of a register tile of scores: a number of whole ones of values

# Behind the scores: byte addresses and scales of a block's rows.
K_ROWS = SCORES + BLOCK * ROW_BYTES
V_ROWS, K_SCALES, V_SCALES = K_ROWS + BLOCK * 8, K_ROWS + BLOCK * 16, K_ROWS + BLOCK * 20
MATRICES = K_ROWS + BLOCK * 24


@part
def multiply(cfg: Any, a: Any, b: Any, c: Any) -> Any:
    """c + a·b, of pairs or of single numbers."""
    return multiply_pairs(a, b, c) if cfg.prefill_pairs else fma(a, b, c)


@part
def load_step(cfg: Any, address: int) -> Any:
    """One step of a row of keys, in all lanes."""
    return load_pair(address) if cfg.prefill_pairs else splat(load_f32(address))


@part
def score_block(
    cfg: Any, first_row: int, rows: int, count: int, queries: int, k_rows: int, scale: float, scores: int
) -> None:
    """S[t, row] = k_t · q_row, of rows from ``first_row`` on, where a register tile begins.

    Scores behind the block's last token come out too, and are never read.

    head_dim is walked in segments whose sums are added at the end: their share of Qᵀ and of the keys stays in the first
    cache, and short chains of additions round less. ``scale`` is for scores of pairs, where else it
    is in the queries.
    """
    vectors = (rows + LANES - 1) // LANES
    for segment in range(0, cfg.steps, SEGMENT):
        column = first_row // LANES
        while column + SCORE_VECTORS <= vectors:
            at = column * LANES * 4
            for t in range(0, count, SCORE_TOKENS):
                target = scores + t * ROW_BYTES + at
                score_tile(cfg, segment, queries + at, k_rows + t * 8, scale, target)
            column += SCORE_VECTORS
        while column < vectors:  # a short tile's last vectors, one by one
            at = column * LANES * 4
            for t in range(0, count, SCORE_TOKENS):
                target = scores + t * ROW_BYTES + at
                score_column(cfg, segment, queries + at, k_rows + t * 8, scale, target)
            column += 1


@part
def score_tile(cfg: Any, segment: int, queries: int, keys: int, scale: float, scores: int) -> None:
    """One register tile of S over one segment of head_dim: SCORE_TOKENS × SCORE_VECTORS."""
    sums = tile(SCORE_TILE)
    for i in range(SCORE_TILE):
        sums[i] = splat(ZERO)
    # A while loop over addresses: Numba's range costs six more instructions a step here.
    at, end = segment * 4, min(segment + SEGMENT, cfg.steps) * 4
    q_row = queries + segment * ROW_BYTES
    while at < end:
        q = tile(SCORE_VECTORS)
        for c in range(SCORE_VECTORS):
            q[c] = load(F32, q_row + c * LANES * 4)
        for t in range(SCORE_TOKENS):
            k = load_step(cfg, load_i64(keys + t * 8) + at)
            for c in range(SCORE_VECTORS):
                sums[t * SCORE_VECTORS + c] = multiply(cfg, k, q[c], sums[t * SCORE_VECTORS + c])
        at += 4
        q_row += ROW_BYTES
    for t in range(SCORE_TOKENS):
        for c in range(SCORE_VECTORS):
            add_segment(
                cfg, segment, sums[t * SCORE_VECTORS + c], scale, scores + t * ROW_BYTES + c * LANES * 4
            )


@part
def score_column(cfg: Any, segment: int, queries: int, keys: int, scale: float, scores: int) -> None:
    """The same, one vector of rows wide."""
    sums = tile(SCORE_TOKENS)
    for t in range(SCORE_TOKENS):
        sums[t] = splat(ZERO)
    for d in range(segment, min(segment + SEGMENT, cfg.steps)):
        q = load(F32, queries + d * ROW_BYTES)
        for t in range(SCORE_TOKENS):
            sums[t] = multiply(cfg, load_step(cfg, load_i64(keys + t * 8) + d * 4), q, sums[t])
    for t in range(SCORE_TOKENS):
        add_segment(cfg, segment, sums[t], scale, scores + t * ROW_BYTES)


@part
def add_segment(cfg: Any, segment: int, total: Any, scale: float, at: int) -> None:
    """Add a segment's sums to those before it."""
    if cfg.prefill_pairs:
        total = mul(total, splat(scale))
    if segment:
        total = add(total, load(F32, at))
    store(F32, at, total)


@part
def accumulate_values(cfg: Any, first_row: int, rows: int, count: int, acc: int, scratch: int) -> None:
    """acc[row] = correction[row] · acc[row] + Σ_t p[t, row] v_t. Rows of a last, short tile are padding.

    ``count`` is of tokens, or of pairs of them.
    """
    column = 0
    while column + VALUE_VECTORS * LANES * 4 <= cfg.row_bytes:  # these columns of V stay in the first cache
        for first in range(first_row, rows, VALUE_ROWS):
            value_tile(cfg, first, count, column, acc + first * cfg.row_bytes + column, scratch)
        column += VALUE_VECTORS * LANES * 4
    while column < cfg.row_bytes:  # head_dim's last vectors, one by one
        for first in range(first_row, rows, VALUE_ROWS):
            value_column(cfg, first, count, column, acc + first * cfg.row_bytes + column, scratch)
        column += LANES * 4


@part
def value_tile(cfg: Any, first: int, count: int, column: int, acc: int, scratch: int) -> None:
    """One register tile of acc, rows from ``first`` on: VALUE_ROWS × VALUE_VECTORS."""
    corrections, weights = scratch + CORRECTION + first * 4, scratch + SCORES + first * 4
    sums = tile(VALUE_TILE)
    for r in range(VALUE_ROWS):
        correction = splat(load_f32(corrections + r * 4))
        for c in range(VALUE_VECTORS):
            at = acc + r * cfg.row_bytes + c * LANES * 4
            sums[r * VALUE_VECTORS + c] = mul(correction, load(F32, at))
    at, end = scratch + V_ROWS, scratch + V_ROWS + count * 8
    while at < end:
        v = tile(VALUE_VECTORS)
        values = load_i64(at) + column
        for c in range(VALUE_VECTORS):
            v[c] = load(F32, values + c * LANES * 4)
        for r in range(VALUE_ROWS):
            p = splat(load_f32(weights + r * 4))
            for c in range(VALUE_VECTORS):
                sums[r * VALUE_VECTORS + c] = multiply(cfg, p, v[c], sums[r * VALUE_VECTORS + c])
        at += 8
        weights += ROW_BYTES
    for r in range(VALUE_ROWS):
        for c in range(VALUE_VECTORS):
            store(F32, acc + r * cfg.row_bytes + c * LANES * 4, sums[r * VALUE_VECTORS + c])


@part
def value_column(cfg: Any, first: int, count: int, column: int, acc: int, scratch: int) -> None:
    """The same, one vector wide."""
    corrections, weights = scratch + CORRECTION + first * 4, scratch + SCORES + first * 4
    sums = tile(VALUE_ROWS)
    for r in range(VALUE_ROWS):
        sums[r] = mul(splat(load_f32(corrections + r * 4)), load(F32, acc + r * cfg.row_bytes))
    for t in range(count):
        v = load(F32, load_i64(scratch + V_ROWS + t * 8) + column)
        for r in range(VALUE_ROWS):
            sums[r] = multiply(cfg, splat(load_f32(weights + t * ROW_BYTES + r * 4)), v, sums[r])
    for r in range(VALUE_ROWS):
        store(F32, acc + r * cfg.row_bytes, sums[r])
