"""Prefill's two products over one block of tokens by AMX's tile registers, for bfloat16 queries and pages.

A register holds 16 × 16 sums, 16 rows × 32 bfloat16 numbers of a left factor, or 16 pairs × 16 columns of a right one.
Four registers of sums meet two of each side, so that four products need four loads:

    S[t, row] = k_t · q_row      left: keys, copied to rows one behind the other; right: Qᵀ in pairs along head_dim
    acc[row] += Σ_t p[t, row] v_t      left: weights, pairs of tokens along a row; right: values, zipped by two tokens

Weights and values lie at fixed places: those of token t at t % BLOCK, zeros where there is none. A row's sums are then
taken in one order wherever the range of its tile begins, and adding the product of zeros changes none of them.

Ceiling, for a whole block of 64 tokens against 96 rows at head_dim 128: 2 · 96 products of 16 cycles, 3,072 cycles for
3.1 MFLOP, 1,024 a cycle, where fused multiply-adds do 64. Loads and stores of tiles, 8 cycles or more each, hide behind
the products. Around them the vector unit takes about as long: the softmax 2,300 cycles or more, scaling scores
and acc 1,100, transposing weights 800, copying keys and zipping values 700.
"""

from __future__ import annotations

from typing import Any

from quire.kernels.compile import part
from quire.kernels.cpu.attend.rows import ZERO
from quire.kernels.cpu.attend.scores import BLOCK, CORRECTION, ROW_BYTES, ROWS, SCORES
from quire.kernels.cpu.simd.amx import (
    CONFIG_BYTES,
    TILE_BYTES,
    TILE_ROWS,
    load_tile,
    multiply_tiles,
    store_tile,
    zero_tile,
)
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import BF16, BYTES, F32, load, load_f32, load_i64, store
from quire.kernels.cpu.simd.pairs import load_pairs, pair_up, zip_pairs_high, zip_pairs_low
from quire.kernels.cpu.simd.vectors import mul, splat, tile, transpose

SQUARE = 2 * TILE_ROWS  # tokens, rows or columns of two registers side by side
WEIGHT_BYTES = BLOCK * BYTES[BF16]  # of a row of weights
# Scratch behind that of other kernels: what configures the registers, then weights [ROWS][BLOCK] in bfloat16.
SCRATCH_BYTES = CONFIG_BYTES + ROWS * WEIGHT_BYTES


@part
def copy_keys(cfg: Any, count: int, k_rows: int, keys: int) -> None:
    """Copy a block's keys to rows one behind the other."""
    row_bytes = cfg.head_dim * BYTES[BF16]
    for t in range(count):
        source = load_i64(k_rows + t * 8)
        for offset in range(0, row_bytes, LANES * 4):
            store(F32, keys + t * row_bytes + offset, load_pairs(BF16, source + offset))


@part
def score_tiles(
    cfg: Any, first_row: int, rows: int, count: int, queries: int, keys: int, scale: float, scores: int
) -> None:
    """S[t, row] = scale · k_t · q_row, of rows from ``first_row`` on, by squares of 32 tokens × 32 rows.

    Scores behind the block's last token and behind the last row come out too, and are never read.
    """
    key_bytes = cfg.head_dim * BYTES[BF16]
    for t in range(0, count, SQUARE):
        for row in range(first_row, rows, SQUARE):
            target = scores + t * ROW_BYTES + row * 4
            score_square(cfg, keys + t * key_bytes, queries + row * 4, target)
            for at in range(target, target + SQUARE * ROW_BYTES, ROW_BYTES):
                for c in range(0, SQUARE * 4, LANES * 4):
                    store(F32, at + c, mul(splat(scale), load(F32, at + c)))


@part
def score_square(cfg: Any, keys: int, queries: int, scores: int) -> None:
    """32 × 32 scores, not scaled."""
    key_bytes = cfg.head_dim * BYTES[BF16]
    zero_tile(0)
    zero_tile(1)
    zero_tile(2)
    zero_tile(3)
    for _ in range(cfg.head_dim // SQUARE):
        load_tile(4, keys, key_bytes)
        load_tile(5, keys + TILE_ROWS * key_bytes, key_bytes)
        load_tile(6, queries, ROW_BYTES)
        load_tile(7, queries + TILE_BYTES, ROW_BYTES)
        multiply_square()
        keys += TILE_BYTES
        queries += TILE_ROWS * ROW_BYTES
    store_square(scores, ROW_BYTES)


@part
def multiply_square() -> None:
    """Registers 0 to 3 += 4 and 5, one above the other, times 6 and 7 side by side."""
    multiply_tiles(0, 4, 6)
    multiply_tiles(1, 4, 7)
    multiply_tiles(2, 5, 6)
    multiply_tiles(3, 5, 7)


@part
def store_square(at: int, stride: int) -> None:
    """Write the sums of registers 0 to 3, 32 × 32."""
    store_tile(0, at, stride)
    store_tile(1, at + TILE_BYTES, stride)
    store_tile(2, at + TILE_ROWS * stride, stride)
    store_tile(3, at + TILE_ROWS * stride + TILE_BYTES, stride)


@part
def lay_out_weights(first_row: int, rows: int, place: int, count: int, weights: int, scratch: int) -> None:
    """Weights of a block as [row][place of the token] in bfloat16, rounded to nearest even; zero where no token is.

    ``place`` is that of the block's first token.
    """
    square = tile(LANES)
    for row in range(first_row, rows, LANES):
        scores = scratch + SCORES + row * 4
        for first in range(0, BLOCK, SQUARE):
            for i in range(LANES):
                t = first + 2 * i - place
                even = load(F32, scores + t * ROW_BYTES) if 0 <= t < count else splat(ZERO)
                odd = load(F32, scores + (t + 1) * ROW_BYTES) if 0 <= t + 1 < count else splat(ZERO)
                square[i] = pair_up(even, odd)
            transpose(square)
            for r in range(LANES):
                store(F32, weights + (row + r) * WEIGHT_BYTES + first * BYTES[BF16], square[r])


@part
def zip_values(cfg: Any, place: int, count: int, v_rows: int, values: int) -> None:
    """Values of a block as pairs of tokens, [place of the pair][head_dim]; zeros where no token is."""
    for pair in range(BLOCK // 2):
        t, target = 2 * pair - place, values + pair * cfg.row_bytes
        for i in range(cfg.head_dim // SQUARE):
            a = load_value(t, count, v_rows, i)
            b = load_value(t + 1, count, v_rows, i)
            store(F32, target + 2 * i * LANES * 4, zip_pairs_low(a, b))
            store(F32, target + (2 * i + 1) * LANES * 4, zip_pairs_high(a, b))


@part
def load_value(t: int, count: int, v_rows: int, i: int) -> Any:
    """32 elements of a token's values, or zeros."""
    if 0 <= t < count:
        return load_pairs(BF16, load_i64(v_rows + t * 8) + i * LANES * 4)
    return splat(ZERO)


@part
def correct_rows(cfg: Any, first_row: int, rows: int, acc: int, scratch: int) -> None:
    """acc[row] *= correction[row], where that is not 1."""
    for row in range(first_row, rows):
        correction = load_f32(scratch + CORRECTION + row * 4)
        if correction != 1.0:
            for at in range(acc + row * cfg.row_bytes, acc + (row + 1) * cfg.row_bytes, LANES * 4):
                store(F32, at, mul(splat(correction), load(F32, at)))


@part
def accumulate_tiles(cfg: Any, first_row: int, rows: int, weights: int, values: int, acc: int) -> None:
    """acc[row] += Σ_t p[t, row] v_t, by squares of 32 rows × 32 of head_dim."""
    for row in range(first_row, rows, SQUARE):
        for column in range(0, cfg.head_dim * 4, SQUARE * 4):
            at = acc + row * cfg.row_bytes + column
            accumulate_square(cfg, weights + row * WEIGHT_BYTES, values + column, at)


@part
def accumulate_square(cfg: Any, weights: int, values: int, acc: int) -> None:
    """32 × 32 sums over all places of a block."""
    load_tile(0, acc, cfg.row_bytes)
    load_tile(1, acc + TILE_BYTES, cfg.row_bytes)
    load_tile(2, acc + TILE_ROWS * cfg.row_bytes, cfg.row_bytes)
    load_tile(3, acc + TILE_ROWS * cfg.row_bytes + TILE_BYTES, cfg.row_bytes)
    for _ in range(BLOCK // SQUARE):
        load_tile(4, weights, WEIGHT_BYTES)
        load_tile(5, weights + TILE_ROWS * WEIGHT_BYTES, WEIGHT_BYTES)
        load_tile(6, values, cfg.row_bytes)
        load_tile(7, values + TILE_BYTES, cfg.row_bytes)
        multiply_square()
        weights += TILE_BYTES
        values += TILE_ROWS * cfg.row_bytes
    store_square(acc, cfg.row_bytes)
