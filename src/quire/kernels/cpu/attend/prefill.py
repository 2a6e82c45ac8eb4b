"""Prefill: a tile of query rows of one sequence and KV head against its pages.

A row is one query head of one token; the heads of a group stand next to each other, so that K and V, once
converted to float32, serve ROWS of them. Scores are kept transposed, S[t, row] with rows across lanes:

    S[t, row] = k_t · q_row                  Qᵀ is laid out once per tile, K is used as it lies: no transpose
    m' = max(m, max_t S),  p = 2^(S − m'),  l = l·2^(m − m') + Σ_t p          lane by lane, no reduction
    acc[row] = acc[row]·2^(m − m') + Σ_t p[t, row] v_t

so the softmax needs no work across lanes, and both products are register tiles (``tiles``), with AVX-512 of 24 fused
multiply-adds per 8 to 11 loads, or of AMX's registers (``tile_products``).

Sources: FlashAttention-2, arXiv:2307.08691; online softmax, arXiv:1805.02867.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import compiled, part
from quire.kernels.cpu.attend.config import Config
from quire.kernels.cpu.attend.rows import (
    ITEM_AT,
    ITEM_BYTES,
    LOG2_E,
    LOWEST,
    ZERO,
    Call,
    Step,
    finish_partial,
    finish_row,
    load_row,
    load_scales,
    locate_tokens,
    query_scale,
    share_of,
)
from quire.kernels.cpu.attend.scores import (
    BLOCK,
    END_KEY,
    FIRST_KEY,
    POSITION,
    ROW_BYTES,
    ROWS,
    SCORES,
    SLOPE,
    L,
    M,
    adjust_scores,
    hide_by_tree,
    hide_keys,
    pair_weights,
    update_softmax,
)
from quire.kernels.cpu.attend.tile_products import (
    SCRATCH_BYTES,
    SQUARE,
    accumulate_tiles,
    copy_keys,
    correct_rows,
    lay_out_weights,
    score_tiles,
    zip_values,
)
from quire.kernels.cpu.attend.tiles import (
    K_ROWS,
    K_SCALES,
    MATRICES,
    SCORE_TOKENS,
    TILE_ROWS,
    V_ROWS,
    V_SCALES,
    accumulate_values,
    score_block,
)
from quire.kernels.cpu.simd.amx import CONFIG_BYTES, configure_tiles, release_tiles
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import BF16, F32, load, load_f32, load_i64, store, store_f32, store_i64
from quire.kernels.cpu.simd.pairs import load_pairs, zip_pairs_high, zip_pairs_low
from quire.kernels.cpu.simd.vectors import splat, tile, transpose
from quire.kernels.cpu.threads import parallel_for


def scratch_bytes(config: Config) -> int:
    """Scratch memory of one worker: Qᵀ [head_dim][ROWS], acc [ROWS][head_dim], K and V [BLOCK][head_dim] behind it,
    and what tile registers need."""
    return MATRICES + config.row_bytes * (2 * ROWS + 2 * BLOCK) + (SCRATCH_BYTES if config.amx else 0)


@compiled
def prefill(cfg: Any, threads: int, workers: int, step: Step, call: Call) -> None:
    """Run every worker's share."""
    parallel_for(attend_share, threads, workers, (cfg, step, call))


@part
def attend_share(worker: int, cfg: Any, step: Step, call: Call) -> None:
    """One worker's items, in order."""
    begin, end, scratch = share_of(worker, step)
    if cfg.amx:  # for each share: its thread may be another than the last one's
        configure_tiles(tile_scratch(cfg, scratch))
    for item in range(begin, end, ITEM_BYTES):
        attend_item(cfg, step, call, item, scratch)
    if cfg.amx:
        release_tiles()


@part
def tile_scratch(cfg: Any, scratch: int) -> Any:
    """Where what tile registers need begins."""
    return scratch + MATRICES + cfg.row_bytes * (2 * ROWS + 2 * BLOCK)


@part
def attend_item(cfg: Any, step: Step, call: Call, item: int, scratch: int) -> None:
    """One query tile against one KV range; a group of more than ROWS heads is walked in parts."""
    for first_head in range(0, step.group, ROWS):
        attend_heads(cfg, step, call, item, first_head, min(ROWS, step.group - first_head), scratch)


@part
def attend_heads(
    cfg: Any, step: Step, call: Call, item: int, first_head: int, heads: int, scratch: int
) -> None:
    """The tile's tokens × ``heads`` heads of the group from ``first_head`` on; row = token × heads + head."""
    sequence, kv_head = load_i64(item + ITEM_AT.sequence), load_i64(item + ITEM_AT.kv_head)
    token, q_len = load_i64(item + ITEM_AT.q_begin), load_i64(item + ITEM_AT.q_len)
    position, partial = load_i64(item + ITEM_AT.q_position), load_i64(item + ITEM_AT.partial)
    begin, end = load_i64(item + ITEM_AT.kv_begin), load_i64(item + ITEM_AT.kv_end)
    rows, head = q_len * heads, kv_head * step.group + first_head
    seq_len = load_i64(step.seq_lens + sequence * 8)
    queries = scratch + MATRICES
    acc = queries + ROWS * cfg.row_bytes
    keys = acc + ROWS * cfg.row_bytes
    values = keys + BLOCK * cfg.row_bytes

    start_rows(step, call, head, heads, position, rows, seq_len, scratch)
    load_queries(cfg, call, token, head, heads, rows, queries, acc)
    # Every row sees all of [all_first, all_end); blocks inside it need no mask.
    all_first = position + q_len - 1 - step.window_left if step.window_left >= 0 else 0
    all_end = min(seq_len, position + 1) if step.causal else seq_len
    while begin < end:
        # Blocks end at multiples of BLOCK tokens of the sequence, wherever the range begins. A row's keys are then in
        # the same blocks whatever tile it is in, and keys that it cannot see change no bit of it.
        count = min(BLOCK - begin % BLOCK, end - begin)
        load_block(cfg, step, call, sequence, kv_head, begin, count, keys, values, scratch)
        # Rows above see none of the block's keys and stay as they are.
        hidden = min(max(begin - position, 0), q_len) * heads if step.causal else 0
        if cfg.amx:
            first_row = hidden // SQUARE * SQUARE
            scale, at = query_scale(call), scratch + SCORES
            score_tiles(cfg, first_row, rows, count, queries, keys, scale, at)
        else:
            first_row = hidden // TILE_ROWS * TILE_ROWS
            score_block(
                cfg, first_row, rows, count, queries, scratch + K_ROWS, query_scale(call), scratch + SCORES
            )
        adjust_scores(call, first_row, rows, begin, position, count, scratch)
        if begin < all_first or begin + count > all_end:
            hide_keys(first_row, rows, begin, position, count, scratch)
        if call.tree_mask:
            hide_by_tree(step, call, sequence, token, heads, rows, begin, count, scratch)
        update_softmax(first_row, rows, count, scratch)
        if cfg.amx:
            weights = tile_scratch(cfg, scratch) + CONFIG_BYTES
            lay_out_weights(first_row, rows, begin % BLOCK, count, weights, scratch)
            correct_rows(cfg, first_row, rows, acc, scratch)
            accumulate_tiles(cfg, first_row, rows, weights, values, acc)
        else:
            steps = count
            if cfg.prefill_pairs:
                steps = pair_weights(first_row, rows, begin % 2, count, scratch)
            accumulate_values(cfg, first_row, rows, steps, acc, scratch)
        begin += count

    for row in range(rows):
        m, l = load_f32(scratch + M + row * 4), load_f32(scratch + L + row * 4)
        at, row_token, row_head = acc + row * cfg.row_bytes, row // heads, row % heads
        if partial < 0:
            finish_row(cfg, call, token + row_token, head + row_head, at, m, l)
        else:
            finish_partial(cfg, step, partial, row_token * step.group + first_head + row_head, at, m, l)


@part
def start_rows(
    step: Step, call: Call, head: int, heads: int, position: int, rows: int, seq_len: int, scratch: int
) -> None:
    """What each row may see, and an empty softmax state. Padding rows see nothing.

    Keys are counted from the tile's first query, so that the numbers a limit is decided by are small and
    exact in float32 however long the sequence is.
    """
    for row in range(ROWS):
        here = row // heads
        first = here - step.window_left if step.window_left >= 0 else -position
        end = min(here + 1, seq_len - position) if step.causal else seq_len - position
        slope = ZERO
        if call.alibi_slopes and row < rows:
            slope = load_f32(call.alibi_slopes + (head + row % heads) * 4) * LOG2_E
        store_f32(scratch + FIRST_KEY + row * 4, np.float32(first))
        store_f32(scratch + END_KEY + row * 4, np.float32(end if row < rows else -position))
        store_f32(scratch + POSITION + row * 4, np.float32(here))
        store_f32(scratch + SLOPE + row * 4, slope)
        store_f32(scratch + M + row * 4, LOWEST)
        store_f32(scratch + L + row * 4, ZERO)


@part
def load_queries(
    cfg: Any, call: Call, token: int, head: int, heads: int, rows: int, queries: int, acc: int
) -> None:
    """Lay out Qᵀ, in pairs or scaled so that scores come out in base 2, and empty the accumulators."""
    for offset in range(0, ROWS * cfg.row_bytes, LANES * 4):
        store(F32, acc + offset, splat(ZERO))
    for row in range(rows):  # acc holds the rows, not transposed yet
        source = call.q + (token + row // heads) * call.q_token + (head + row % heads) * call.q_head
        if cfg.prefill_pairs:
            for i in range(cfg.prefill_parts):
                store(
                    F32, acc + row * cfg.row_bytes + i * LANES * 4, load_pairs(BF16, source + i * LANES * 4)
                )
        else:
            load_row(cfg, cfg.q_dtype, source, query_scale(call), acc + row * cfg.row_bytes)
    square = tile(LANES)
    for row in range(0, rows, LANES):
        for d in range(0, cfg.steps, LANES):
            for i in range(LANES):
                square[i] = load(F32, acc + (row + i) * cfg.row_bytes + d * 4)
            transpose(square)
            for i in range(LANES):
                store(F32, queries + (d + i) * ROW_BYTES + row * 4, square[i])
    for offset in range(0, ROWS * cfg.row_bytes, LANES * 4):
        store(F32, acc + offset, splat(ZERO))


@part
def load_block(
    cfg: Any, step: Step, call: Call, sequence: int, kv_head: int, begin: int, count: int,
    keys: int, values: int, scratch: int,
) -> None:  # fmt: skip
    """Find a block's K and V rows, padded to whole register tiles of scores; values are paired up, or all but whole
    float32 rows converted, once for all rows of the tile."""
    locate_tokens(step, call, sequence, kv_head, begin, begin + count, scratch + K_ROWS, scratch + V_ROWS)
    if cfg.amx:
        copy_keys(cfg, count, scratch + K_ROWS, keys)
        zip_values(cfg, begin % BLOCK, count, scratch + V_ROWS, values)
    elif cfg.prefill_pairs:
        pair_values(cfg, begin % 2, count, values, scratch + V_ROWS)
    elif cfg.kv_dtype != F32 or cfg.tail:
        convert_block(cfg, step, call, sequence, kv_head, begin, count, keys, values, scratch)
    for t in range(count, -(-count // SCORE_TOKENS) * SCORE_TOKENS):
        store_i64(scratch + K_ROWS + t * 8, load_i64(scratch + K_ROWS))


@part
def convert_block(
    cfg: Any, step: Step, call: Call, sequence: int, kv_head: int, begin: int, count: int,
    keys: int, values: int, scratch: int,
) -> None:  # fmt: skip
    """Convert a block's rows to float32, times their scales, and let the block's addresses point there."""
    if call.k_scale:
        scales, end = kv_head * call.scale_head, begin + count
        load_scales(step, call, sequence, begin, end, call.k_scale + scales, scratch + K_SCALES, 4)
        load_scales(step, call, sequence, begin, end, call.v_scale + scales, scratch + V_SCALES, 4)
    k_factor = v_factor = np.float32(1.0)
    for t in range(count):
        if call.k_scale:
            k_factor, v_factor = load_f32(scratch + K_SCALES + t * 4), load_f32(scratch + V_SCALES + t * 4)
        k_row, v_row = scratch + K_ROWS + t * 8, scratch + V_ROWS + t * 8
        load_row(cfg, cfg.kv_dtype, load_i64(k_row), k_factor, keys + t * cfg.row_bytes)
        load_row(cfg, cfg.kv_dtype, load_i64(v_row), v_factor, values + t * cfg.row_bytes)
        store_i64(k_row, keys + t * cfg.row_bytes)
        store_i64(v_row, values + t * cfg.row_bytes)


@part
def pair_values(cfg: Any, odd: int, count: int, values: int, v_rows: int) -> None:
    """Zip rows of neighbouring tokens, an even one and the next, and let the block's addresses point there.

    Pairs begin at even tokens of the sequence, wherever the block begins, so that a row's sums are taken in one order.
    A first token that is odd (``odd``), or a last one that is even, is paired with itself, with weight zero.
    """
    for pair in range((odd + count + 1) // 2):
        first, second = max(2 * pair - odd, 0), min(2 * pair - odd + 1, count - 1)
        row, next_row = load_i64(v_rows + first * 8), load_i64(v_rows + second * 8)
        target = values + pair * cfg.row_bytes
        for i in range(cfg.prefill_parts):
            a, b = load_pairs(BF16, row + i * LANES * 4), load_pairs(BF16, next_row + i * LANES * 4)
            store(F32, target + 2 * i * LANES * 4, zip_pairs_low(a, b))
            store(F32, target + (2 * i + 1) * LANES * 4, zip_pairs_high(a, b))
        store_i64(v_rows + pair * 8, target)
