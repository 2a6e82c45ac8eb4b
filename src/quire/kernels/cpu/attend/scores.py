"""What prefill does to a block of scores: softcap, ALiBi, masks, and the online softmax.

Scores lie transposed, S[t, row] with the rows of a tile across lanes, so that every step works lane by lane. What a
row may see is a range [first_key, end_key): causality, windows and the end of the sequence are one comparison.
"""

from __future__ import annotations

import numpy as np

from quire.kernels.compile import part
from quire.kernels.cpu.attend.rows import LOG2_E, MINUS_INFINITY, ZERO, Call, Step
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, load_i64, load_u8, store, store_f32
from quire.kernels.cpu.simd.pairs import pair_up
from quire.kernels.cpu.simd.vectors import (
    add,
    at_least,
    both,
    exp2,
    less_than,
    maximum,
    mul,
    select,
    splat,
    sub,
    tanh,
)

BLOCK = 64  # tokens per block: K and V as float32 are 64 KiB at head_dim 128
ROWS = 96  # query rows per tile: whole register tiles of scores across lanes, and of values down
ROW_BYTES = ROWS * 4

# Scratch of a tile, in float32 rows of ROWS: what each row may see, its slope, position and softmax state.
FIRST_KEY, END_KEY, SLOPE, POSITION, M, L, CORRECTION = (i * ROW_BYTES for i in range(7))
SCORES = 7 * ROW_BYTES  # [BLOCK][ROWS]


@part
def adjust_scores(
    call: Call, first_row: int, rows: int, begin: int, position: int, count: int, scratch: int
) -> None:
    """Softcap and ALiBi, where asked for."""
    if call.softcap > 0.0:
        cap = splat(np.float32(call.softcap) * LOG2_E)
        for t in range(count):
            for column in range(first_row * 4, rows * 4, LANES * 4):
                at = scratch + SCORES + t * ROW_BYTES + column
                store(F32, at, mul(cap, tanh(load(F32, at))))
    if call.alibi_slopes:
        for column in range(first_row * 4, rows * 4, LANES * 4):
            slope, here = load(F32, scratch + SLOPE + column), load(F32, scratch + POSITION + column)
            for t in range(count):
                at = scratch + SCORES + t * ROW_BYTES + column
                ahead = sub(splat(np.float32(begin - position + t)), here)
                distance = maximum(ahead, sub(splat(ZERO), ahead))
                store(F32, at, sub(load(F32, at), mul(slope, distance)))


@part
def hide_keys(first_row: int, rows: int, begin: int, position: int, count: int, scratch: int) -> None:
    """−inf where a key lies outside its row's [first_key, end_key)."""
    for column in range(first_row * 4, rows * 4, LANES * 4):
        first, end = load(F32, scratch + FIRST_KEY + column), load(F32, scratch + END_KEY + column)
        for t in range(count):
            at = scratch + SCORES + t * ROW_BYTES + column
            key = splat(np.float32(begin - position + t))
            visible = both(at_least(key, first), less_than(key, end))
            store(F32, at, select(visible, load(F32, at), splat(MINUS_INFINITY)))


@part
def hide_by_tree(
    step: Step, call: Call, sequence: int, token: int, heads: int, rows: int, begin: int, count: int, scratch: int
) -> None:  # fmt: skip
    """−inf where the tree mask hides one of this step's own keys from a row."""
    starts = step.cu_seqlens_q + sequence * 8
    q_begin, q_end = load_i64(starts), load_i64(starts + 8)
    first_new = load_i64(step.seq_lens + sequence * 8) - (q_end - q_begin)
    for t in range(max(0, first_new - begin), count):
        for row in range(rows):
            mask_row = call.tree_mask + (token + row // heads) * call.tree_mask_row
            if load_u8(mask_row + (begin + t - first_new)) == 0:
                store_f32(scratch + SCORES + t * ROW_BYTES + row * 4, MINUS_INFINITY)


@part
def update_softmax(first_row: int, rows: int, count: int, scratch: int) -> None:
    """Scores become weights p = 2^(S − m'); m, l and the correction 2^(m − m') move on, a row per lane."""
    for column in range(first_row * 4, rows * 4, LANES * 4):
        scores = scratch + SCORES + column
        before = load(F32, scratch + M + column)
        highest = before
        for t in range(count):
            highest = maximum(highest, load(F32, scores + t * ROW_BYTES))
        correction = exp2(sub(before, highest))
        total = mul(load(F32, scratch + L + column), correction)
        for t in range(count):
            p = exp2(sub(load(F32, scores + t * ROW_BYTES), highest))
            total = add(total, p)
            store(F32, scores + t * ROW_BYTES, p)
        store(F32, scratch + M + column, highest)
        store(F32, scratch + L + column, total)
        store(F32, scratch + CORRECTION + column, correction)


@part
def pair_weights(first_row: int, rows: int, odd: int, count: int, scratch: int) -> int:
    """Pair up the weights of an even token and the next, rounded to bfloat16, as ``pair_values`` does their values.

    Returns the number of pairs; they lie as weights did, [pair][row].
    """
    pairs = (odd + count + 1) // 2
    for column in range(first_row * 4, rows * 4, LANES * 4):
        weights = scratch + SCORES + column
        for pair in range(pairs):
            t = 2 * pair - odd
            even = load(F32, weights + t * ROW_BYTES) if t >= 0 else splat(ZERO)
            following = load(F32, weights + (t + 1) * ROW_BYTES) if t + 1 < count else splat(ZERO)
            store(F32, weights + pair * ROW_BYTES, pair_up(even, following))
    return pairs
