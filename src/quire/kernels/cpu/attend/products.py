"""Decode's two products over one block of tokens, for all query heads of a tile: scores, and weighted values.

K and V stream through registers once and serve every head, while the next block's rows are prefetched. A row of
bfloat16 is split into even and odd elements, which costs a shift and a mask for two vectors, where widening them
in order costs four operations: q and acc lie in that order too, vector by vector (``load_part``).

Where the CPU multiplies bfloat16 pairs (``pairs``), neither is needed, and there are half the multiplications: queries
meet keys as they are, pairs along head_dim; weights, rounded to bfloat16, meet values in pairs of tokens.
"""

from __future__ import annotations

from typing import Any

from quire.kernels.compile import part
from quire.kernels.cpu.attend.config import CACHE_LINE as CACHE_LINE
from quire.kernels.cpu.attend.rows import ZERO
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import (
    BF16,
    BYTES,
    F32,
    load,
    load_even,
    load_f32,
    load_head,
    load_i64,
    load_odd,
    prefetch,
    store,
    store_i64,
)
from quire.kernels.cpu.simd.pairs import (
    LINE,
    PAIRED,
    load_pairs,
    load_second_pairs,
    multiply_pairs,
    zip_pairs_high,
    zip_pairs_low,
)
from quire.kernels.cpu.simd.vectors import fma, mul, splat, sum_rows, tile, zip_high, zip_low

BLOCK = 64  # tokens per block: 32 KiB of bf16 K and V at head_dim 128
MAX_HEADS = LANES  # query heads per tile
STREAMS = 4  # places of a block that its tokens are interleaved from: hardware prefetching runs ahead in each
DISTANCE = 24  # tokens from a line's last prefetch to its use

# Scratch of one block: byte addresses of its K and V rows, their scales where pages are quantised, and for ALiBi
# where its tokens lie in it. Whole vectors of numbers are read; DISTANCE behind the last keys lie values.
K_ROWS, V_ROWS, K_SCALES = 0, BLOCK * 8, BLOCK * 16
V_SCALES = K_SCALES + (BLOCK + LANES) * 4
PLACES = V_SCALES + (BLOCK + LANES) * 4
BLOCK_SCRATCH = PLACES + (BLOCK + LANES) * 4

# Scratch of one tile: float32 vectors by lane (m, l, the last correction, ALiBi slope), then q and acc rows of up to
# MAX_HEADS heads. Lane j belongs to head j % padded_heads, so that it can meet a vector of scores.
M, L, CORRECTION, SLOPE = 0, 64, 128, 192
STEP, OFFSET, UNIT = 256, 320, 384  # of ``byte_products``
Q_ROWS = 448


@part
def load_part(cfg: Any, dtype: Any, row: int, i: int) -> Any:
    """Vector i of a row: pairs, or single numbers in the order that the pages' dtype is split into."""
    if cfg.pairs:
        return load_pairs(BF16, row + i * PAIRED * BYTES[BF16])
    if cfg.halved and (cfg.halved == cfg.vectors or i < cfg.halved):
        at = row + (i & ~1) * LANES * BYTES[BF16]
        return load_odd(at) if i & 1 else load_even(at)
    return load(dtype, row + i * LANES * BYTES[dtype])


@part
def convert_block(cfg: Any, rows: int, target: int) -> None:
    """Convert a block's rows of 8 bits to bfloat16, and let its addresses point there."""
    for t in range(BLOCK):
        row = load_i64(rows + t * 8)
        for i in range(cfg.head_dim // LINE):
            line, at = row + i * LINE, target + i * LINE * BYTES[BF16]
            # Both before either is stored: the compiler shares their work only if nothing is written between.
            first, second = load_pairs(cfg.kv_dtype, line), load_second_pairs(cfg.kv_dtype, line)
            store(F32, at, first)
            store(F32, at + LANES * 4, second)
        store_i64(rows + t * 8, target)
        target += cfg.head_dim * BYTES[BF16]


@part
def load_values(cfg: Any, row: int, next_row: int, i: int) -> Any:
    """What output vector i takes from one token's row, or from two tokens' rows in pairs."""
    if cfg.pairs:
        one, other = load_part(cfg, cfg.kv_dtype, row, i // 2), load_part(cfg, cfg.kv_dtype, next_row, i // 2)
        return zip_pairs_high(one, other) if i & 1 else zip_pairs_low(one, other)
    return load_part(cfg, cfg.kv_dtype, row, i)


@part
def add_product(cfg: Any, a: Any, b: Any, c: Any) -> Any:
    """c + a·b, of pairs or of single numbers."""
    return multiply_pairs(a, b, c) if cfg.pairs else fma(a, b, c)


@part
def restore_order(cfg: Any, row: int) -> None:
    """Undo ``load_part``'s order in a row of float32 scratch."""
    if cfg.halved:
        for i in range(0, cfg.halved, 2):
            even, odd = row + i * LANES * 4, row + (i + 1) * LANES * 4
            first, second = load(F32, even), load(F32, odd)
            store(F32, even, zip_low(first, second))
            store(F32, odd, zip_high(first, second))


@part
def prefetch_line(rows: int, t: int, offset: int) -> None:
    """Prefetch the cache line that begins at an offset of row t.

    One line at a time, between the multiplications: a core has few buffers for lines under way, and a prefetch that
    finds them full seems to be dropped. So each line is prefetched three times: a block ahead, half a block ahead, and
    DISTANCE tokens ahead.
    """
    prefetch(load_i64(rows + t * 8) + offset)


@part
def prefetch_row(cfg: Any, rows: int, t: int) -> None:
    """Prefetch all of row t."""
    row = load_i64(rows + t * 8)
    for offset in range(0, cfg.head_dim * BYTES[cfg.kv_dtype], CACHE_LINE):
        prefetch(row + offset)


@part
def score_block(
    cfg: Any, count: int, here: int, upcoming: int, state: int, scale: float, scores: int
) -> None:
    """scores[t, g] = q_g · k_t, a vector of them at a time, and prefetch the next block's keys.

    ``scale`` is for queries in pairs, which were loaded as they are; it multiplies the scores.
    """
    k_rows, q_rows = here + K_ROWS, state + Q_ROWS
    step_bytes = LANES * BYTES[cfg.kv_dtype]
    for first in range(0, count, cfg.tokens):
        products = tile(LANES)
        for j in range(LANES):
            products[j] = splat(ZERO)
        for line in range(0, cfg.lined_parts, cfg.line_parts):
            prefetch_keys(cfg, here, upcoming, first, line * cfg.part_bytes)
            for i in range(cfg.line_parts):
                multiply_keys(cfg, k_rows + first * 8, q_rows, line + i, products)
        if cfg.lined_parts < cfg.parts:
            prefetch_keys(cfg, here, upcoming, first, cfg.lined_parts * cfg.part_bytes)
            for i in range(cfg.lined_parts, cfg.parts):
                multiply_keys(cfg, k_rows + first * 8, q_rows, i, products)
        if cfg.tail:
            for t in range(cfg.tokens):
                k = load_head(
                    cfg.kv_dtype, load_i64(k_rows + (first + t) * 8) + cfg.vectors * step_bytes, cfg.tail
                )
                for g in range(cfg.heads):
                    q = load(F32, q_rows + g * cfg.row_bytes + cfg.vectors * LANES * 4)
                    products[t * cfg.padded_heads + g] = fma(k, q, products[t * cfg.padded_heads + g])
        sums = sum_rows(products)
        if cfg.pairs:
            sums = mul(sums, splat(scale))
        store(F32, scores + first * cfg.padded_heads * 4, sums)


@part
def prefetch_keys(cfg: Any, here: int, upcoming: int, first: int, offset: int) -> None:
    """One line each of ``tokens`` rows: of the next block's keys, of this block's values, and of keys further down."""
    for t in range(cfg.tokens):
        prefetch_line(upcoming + K_ROWS, first + t, offset)
        prefetch_line(here + V_ROWS, first + t, offset)
        if not cfg.converts:
            prefetch_line(here + K_ROWS, first + t + DISTANCE, offset)


@part
def multiply_keys(cfg: Any, k_rows: int, q_rows: int, i: int, products: Any) -> None:
    """Vector i of ``tokens`` keys times that of every query."""
    for t in range(cfg.tokens):
        k = load_part(cfg, cfg.kv_dtype, load_i64(k_rows + t * 8), i)
        for g in range(cfg.heads):
            q = load(F32, q_rows + g * cfg.row_bytes + i * LANES * 4)
            j = t * cfg.padded_heads + g
            products[j] = add_product(cfg, k, q, products[j])


@part
def accumulate_values(cfg: Any, count: int, here: int, upcoming: int, state: int, scores: int) -> None:
    """acc_g = correction_g · acc_g + Σ_t p[t, g] v_t, a strip of output vectors at a time in registers.

    By the end of the last strip all rows of the next block were prefetched.
    """
    v_rows, step_bytes = here + V_ROWS, LANES * BYTES[cfg.kv_dtype]
    accs = state + Q_ROWS + MAX_HEADS * cfg.row_bytes
    for first in range(0, cfg.vectors, cfg.strips_step):
        accumulate_strip(cfg, first, count, v_rows, upcoming, accs, state, scores)
        if cfg.strips_step > cfg.strip:
            accumulate_strip(cfg, first + cfg.strip, count, v_rows, upcoming, accs, state, scores)
    if cfg.tail:
        for g in range(cfg.heads):
            at = accs + g * cfg.row_bytes + cfg.vectors * LANES * 4
            total = mul(splat(load_f32(state + CORRECTION + g * 4)), load(F32, at))
            for t in range(count):
                p = splat(load_f32(scores + (t * cfg.padded_heads + g) * 4))
                v = load_head(cfg.kv_dtype, load_i64(v_rows + t * 8) + cfg.vectors * step_bytes, cfg.tail)
                total = fma(p, v, total)
            store(F32, at, total)


@part
def accumulate_strip(
    cfg: Any, first: int, count: int, v_rows: int, upcoming: int, accs: int, state: int, scores: int
) -> None:
    """The output vectors from ``first`` on, ``strip`` of them to a head."""
    strips = cfg.vectors // cfg.strip
    sums = tile(cfg.strip_tile)
    values = tile(cfg.strip)
    for g in range(cfg.heads):
        correction = splat(load_f32(state + CORRECTION + g * 4))
        for i in range(cfg.strip):
            at = accs + g * cfg.row_bytes + (first + i) * LANES * 4
            sums[g * cfg.strip + i] = mul(correction, load(F32, at))
    for t in range(0, count, cfg.at_once):
        row, next_row = load_i64(v_rows + t * 8), load_i64(v_rows + (t + cfg.at_once - 1) * 8)
        for ahead in range(cfg.at_once):
            step = first // cfg.strip * BLOCK + t + ahead
            if step % strips == 0:
                prefetch_row(cfg, upcoming + V_ROWS, step // strips)
                prefetch_row(cfg, upcoming + K_ROWS, step // strips)
            if first == 0 and not cfg.converts:
                prefetch_row(cfg, v_rows, min(t + ahead + DISTANCE, BLOCK - 1))
        for i in range(cfg.strip):
            values[i] = load_values(cfg, row, next_row, first + i)
        for g in range(cfg.heads):
            p = splat(load_f32(scores + (t * cfg.padded_heads + g) * 4))
            for i in range(cfg.strip):
                sums[g * cfg.strip + i] = add_product(cfg, p, values[i], sums[g * cfg.strip + i])
    for g in range(cfg.heads):
        for i in range(cfg.strip):
            store(F32, accs + g * cfg.row_bytes + (first + i) * LANES * 4, sums[g * cfg.strip + i])
