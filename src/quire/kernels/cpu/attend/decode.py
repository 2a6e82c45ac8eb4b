"""Decode: one query token per sequence against its pages, all query heads of a KV head in one tile.

For each block of tokens, with query heads g of the group:

    s[t, g] = q_g · k_t                      K is read once and serves every head of the group
    m' = max(m, max_t s),  p = 2^(s − m'),  l = l·2^(m − m') + Σ_t p
    acc_g = acc_g·2^(m − m') + Σ_t p[t, g] v_t

The kernel is bound by reading K and V: per token of 2·head_dim elements it spends 2·heads·head_dim/16 fused
multiply-adds (of AVX-512), and everything else is arranged so that those keep up with memory. Scores of a block lie
token-major, [token][head] with heads padded to a power of two, so that a tile of LANES dot products ends up in
the lanes of one vector (``sum_rows``). A block's tokens are taken in the order of ``blocks``. While one block is
computed, the next one's rows are prefetched (``products.prefetch_line``): pages lie anywhere, so the hardware cannot
predict them.

Sources: PagedAttention, arXiv:2309.06180 §4.1; online softmax, arXiv:1805.02867; FlashDecoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import compiled, part
from quire.kernels.cpu.attend.blocks import locate_block, scale_block
from quire.kernels.cpu.attend.byte_products import (
    accumulate_bytes,
    integers_suffice,
    quantize_weights,
    restore_byte_order,
    score_bytes,
    split_query,
)
from quire.kernels.cpu.attend.products import (
    BLOCK,
    BLOCK_SCRATCH,
    CORRECTION,
    K_ROWS,
    K_SCALES,
    MAX_HEADS,
    OFFSET,
    PLACES,
    Q_ROWS,
    SLOPE,
    STEP,
    V_ROWS,
    V_SCALES,
    L,
    M,
    accumulate_values,
    convert_block,
    load_part,
    restore_order,
    score_block,
)
from quire.kernels.cpu.attend.rows import (
    ITEM_AT,
    ITEM_BYTES,
    LOG2_E,
    LOWEST,
    MINUS_INFINITY,
    ZERO,
    Call,
    Step,
    finish_partial,
    finish_row,
    query_scale,
    share_of,
)
from quire.kernels.cpu.attend.short_products import (
    accumulate_shorts,
    restore_short_order,
    score_shorts,
    weights_to_shorts,
)
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import (
    BF16,
    BYTES,
    F32,
    load,
    load_f32,
    load_head,
    load_i64,
    load_u8,
    store,
    store_f32,
)
from quire.kernels.cpu.simd.pairs import pair_up, rotate
from quire.kernels.cpu.simd.vectors import (
    add,
    exp2,
    fma,
    fold_max,
    fold_sum,
    maximum,
    mul,
    repeat,
    splat,
    sub,
    tanh,
)
from quire.kernels.cpu.threads import parallel_for


def scratch_bytes(head_dim: int, tiles: int) -> int:
    """Scratch memory of one worker: two blocks, their scores, the tiles of one group, and a block as bfloat16."""
    row_bytes = -(-head_dim // LANES) * LANES * 4
    return (
        2 * BLOCK_SCRATCH
        + BLOCK * LANES * 4
        + tiles * (Q_ROWS + 2 * MAX_HEADS * row_bytes)
        + BLOCK * row_bytes
    )


@compiled
def decode(cfg: Any, threads: int, workers: int, step: Step, call: Call) -> None:
    """Run every worker's share."""
    parallel_for(attend_share, threads, workers, (cfg, step, call))


@part
def attend_share(worker: int, cfg: Any, step: Step, call: Call) -> None:
    """One worker's items, in order."""
    begin, end, scratch = share_of(worker, step)
    here, upcoming = scratch, scratch + BLOCK_SCRATCH
    if begin < end:
        locate_first_block(cfg, step, call, begin, here)
    for item in range(begin, end, ITEM_BYTES):
        here, upcoming = attend_item(cfg, step, call, item, end, scratch, here, upcoming)


@part
def visible_keys(call: Call, item: int) -> tuple[int, int]:
    """The range of tokens that an item's query sees."""
    begin, end = load_i64(item + ITEM_AT.kv_begin), load_i64(item + ITEM_AT.kv_end)
    token, position = load_i64(item + ITEM_AT.q_begin), load_i64(item + ITEM_AT.q_position)
    if (
        call.tree_mask
        and begin < end == position + 1
        and load_u8(call.tree_mask + token * call.tree_mask_row) == 0
    ):
        end -= 1  # the mask hides the query's own key, the only new one of a decode step
    return begin, end


@part
def locate_first_block(cfg: Any, step: Step, call: Call, item: int, block: int) -> None:
    """``locate_block`` for the first tokens of an item."""
    begin, end = visible_keys(call, item)
    sequence, kv_head = load_i64(item + ITEM_AT.sequence), load_i64(item + ITEM_AT.kv_head)
    locate_block(cfg, step, call, sequence, kv_head, begin, min(begin + BLOCK, end), block)


@part
def attend_item(
    cfg: Any, step: Step, call: Call, item: int, items_end: int, scratch: int, here: int, upcoming: int
) -> tuple[int, int]:
    """One KV range of one sequence and KV head; the group is walked in tiles of at most ``cfg.heads``.

    Its first block is located ``here``, and the next item's is at the end: returns that place and the other one.
    """
    sequence, kv_head = load_i64(item + ITEM_AT.sequence), load_i64(item + ITEM_AT.kv_head)
    token = load_i64(item + ITEM_AT.q_begin)
    position, partial = load_i64(item + ITEM_AT.q_position), load_i64(item + ITEM_AT.partial)
    begin, end = visible_keys(call, item)
    scores = scratch + 2 * BLOCK_SCRATCH
    states = scores + BLOCK * LANES * 4
    tiles = (step.group + cfg.heads - 1) // cfg.heads
    loss = ZERO
    for i in range(tiles):
        loss = max(
            loss, start_tile(cfg, step, call, token, kv_head, i, states + i * tile_bytes(cfg.row_bytes))
        )

    has_next = item + ITEM_BYTES < items_end
    if begin == end and has_next:
        locate_first_block(cfg, step, call, item + ITEM_BYTES, here)
    block_end = min(begin + BLOCK, end)
    while begin < end:
        next_end = min(block_end + BLOCK, end)
        if block_end < end:
            locate_block(cfg, step, call, sequence, kv_head, block_end, next_end, upcoming)
        elif has_next:
            locate_first_block(cfg, step, call, item + ITEM_BYTES, upcoming)
        if call.k_scale:
            scale_block(cfg, step, call, sequence, kv_head, begin, block_end, here)
        converted = states + tiles * tile_bytes(cfg.row_bytes)
        as_integers = cfg.integers and integers_suffice(cfg, call, block_end - begin, here, loss)
        if cfg.converts and not as_integers:
            convert_block(cfg, here + K_ROWS, converted)
        for i in range(tiles):
            state = states + i * tile_bytes(cfg.row_bytes)
            if cfg.integers and as_integers:
                score_integers(cfg, block_end - begin, here, upcoming, state, query_scale(call), scores)
            else:
                score_block(cfg, block_end - begin, here, upcoming, state, query_scale(call), scores)
            adjust_scores(cfg, call, position - begin, block_end - begin, here, state, scores)
            update_softmax(cfg, call, block_end - begin, here, state, scores)
            if cfg.integers:
                accumulate_integers(cfg, block_end - begin, here, upcoming, state, scores)
            else:
                if cfg.converts and i == 0:
                    # Over the keys if no other tile needs them: both and their source outgrow the first cache.
                    over = min(tiles - 1, 1) * BLOCK * cfg.head_dim * BYTES[BF16]
                    convert_block(cfg, here + V_ROWS, converted + over)
                accumulate_values(cfg, block_end - begin, here, upcoming, state, scores)
        here, upcoming = upcoming, here
        begin, block_end = block_end, next_end
    for i in range(tiles):
        finish_tile(cfg, step, call, token, kv_head, i, partial, states + i * tile_bytes(cfg.row_bytes))
    return here, upcoming


@part
def score_integers(
    cfg: Any, count: int, here: int, upcoming: int, state: int, scale: float, scores: int
) -> None:
    """``score_block`` of integers."""
    if cfg.shorts:
        score_shorts(cfg, count, here, upcoming, state, scale, scores)
    else:
        score_bytes(cfg, count, here, upcoming, state, scale, scores)


@part
def accumulate_integers(cfg: Any, count: int, here: int, upcoming: int, state: int, scores: int) -> None:
    """``accumulate_values`` of integers."""
    if cfg.shorts:
        accumulate_shorts(cfg, count, here, upcoming, state, scores)
    else:
        accumulate_bytes(cfg, count, here, upcoming, state, scores)


@part
def tile_bytes(row_bytes: int) -> int:
    """Scratch of one tile; its accumulators follow the rows of q."""
    return Q_ROWS + 2 * MAX_HEADS * row_bytes


@part
def start_tile(cfg: Any, step: Step, call: Call, token: int, kv_head: int, number: int, state: int) -> Any:
    """Load the tile's queries and empty its softmax state; returns the largest loss of a query as integers."""
    scale = query_scale(call)
    store(F32, state + M, splat(LOWEST))
    store(F32, state + L, splat(ZERO))
    for lanes in (SLOPE, STEP, OFFSET):
        store(F32, state + lanes, splat(ZERO))
    loss = ZERO
    for g in range(cfg.heads):
        q_row = state + Q_ROWS + g * cfg.row_bytes
        in_group = min(number * cfg.heads + g, step.group - 1)  # a last tile repeats its last head
        head = kv_head * step.group + in_group
        source = call.q + token * call.q_token + head * call.q_head
        load_query(cfg, source, scale, q_row)
        if cfg.integers:
            loss = max(loss, split_query(cfg, source, q_row, state, g))
        for i in range(0, cfg.row_bytes, LANES * 4):
            store(F32, q_row + MAX_HEADS * cfg.row_bytes + i, splat(ZERO))
        if call.alibi_slopes:
            slope = load_f32(call.alibi_slopes + head * 4) * LOG2_E
            for t in range(cfg.tokens):
                store_f32(state + SLOPE + (t * cfg.padded_heads + g) * 4, slope)
    return loss


@part
def load_query(cfg: Any, source: int, factor: float, target: int) -> None:
    """Load one row of q as keys are loaded: in pairs, or times a factor as float32."""
    for i in range(cfg.parts):
        values = load_part(cfg, cfg.q_dtype, source, i)
        store(F32, target + i * LANES * 4, values if cfg.pairs else mul(values, splat(factor)))
    if cfg.tail:
        i = cfg.vectors
        values = load_head(cfg.q_dtype, source + i * LANES * BYTES[cfg.q_dtype], cfg.tail)
        store(F32, target + i * LANES * 4, mul(values, splat(factor)))


@part
def adjust_scores(
    cfg: Any, call: Call, distance: int, count: int, here: int, state: int, scores: int
) -> None:
    """Scales of quantised keys, softcap and ALiBi, where asked for; −inf behind the block's last token.

    ``distance`` is how far the query stands behind the block's first token.
    """
    used = count * cfg.padded_heads
    vectors = (used + LANES - 1) // LANES
    if call.k_scale:
        for j in range(vectors):
            at, scale = scores + j * LANES * 4, load(F32, here + K_SCALES + j * cfg.tokens * 4)
            store(F32, at, mul(load(F32, at), repeat(scale, cfg.padded_heads)))
    if call.softcap > 0.0:
        cap = splat(np.float32(call.softcap) * LOG2_E)
        for j in range(vectors):
            at = scores + j * LANES * 4
            store(F32, at, mul(cap, tanh(load(F32, at))))
    if call.alibi_slopes:
        slope, block_behind = load(F32, state + SLOPE), splat(np.float32(distance))
        for j in range(vectors):
            at = scores + j * LANES * 4
            token = repeat(load(F32, here + PLACES + j * cfg.tokens * 4), cfg.padded_heads)
            behind = sub(token, block_behind)
            store(F32, at, fma(slope, behind, load(F32, at)))
    for j in range(used, vectors * LANES):
        store_f32(scores + j * 4, MINUS_INFINITY)


@part
def update_softmax(cfg: Any, call: Call, count: int, here: int, state: int, scores: int) -> None:
    """Scores become weights p = 2^(s − m'); m, l and the correction 2^(m − m') move on (online softmax).

    Weights of quantised values come out times their scales, which l leaves out; in pairs, each with the next token's,
    or as integers.
    """
    vectors = (count * cfg.padded_heads + LANES - 1) // LANES
    before = load(F32, state + M)
    highest = before
    for j in range(vectors):
        highest = maximum(highest, load(F32, scores + j * LANES * 4))
    highest = fold_max(highest, cfg.padded_heads)
    correction = exp2(sub(before, highest))
    total = mul(load(F32, state + L), correction)
    for j in range(vectors):
        p = exp2(sub(load(F32, scores + j * LANES * 4), highest))
        total = add(total, p)
        if call.v_scale:
            scale = load(F32, here + V_SCALES + j * cfg.tokens * 4)
            p = mul(p, repeat(scale, cfg.padded_heads))
        if cfg.pairs and not cfg.integers:
            p = pair_up(p, rotate(p, cfg.padded_heads))
        store(F32, scores + j * LANES * 4, p)
    if cfg.shorts:
        weights_to_shorts(cfg, vectors, state, scores)
    elif cfg.integers:
        quantize_weights(cfg, vectors, state, scores)
    store(F32, state + M, highest)
    store(F32, state + L, total)
    store(F32, state + CORRECTION, correction)


@part
def finish_tile(
    cfg: Any, step: Step, call: Call, token: int, kv_head: int, number: int, partial: int, state: int
) -> None:
    """Write the tile's rows, as results or as partial states."""
    store(F32, state + L, fold_sum(load(F32, state + L), cfg.padded_heads))
    for g in range(min(cfg.heads, step.group - number * cfg.heads)):
        in_group = number * cfg.heads + g
        acc = state + Q_ROWS + (MAX_HEADS + g) * cfg.row_bytes
        if cfg.shorts:
            restore_short_order(cfg, acc)
        elif cfg.integers:
            restore_byte_order(cfg, acc)
        else:
            restore_order(cfg, acc)
        m, l = load_f32(state + M + g * 4), load_f32(state + L + g * 4)
        if partial < 0:
            finish_row(cfg, call, token, kv_head * step.group + in_group, acc, m, l)
        else:
            finish_partial(cfg, step, partial, in_group, acc, m, l)
