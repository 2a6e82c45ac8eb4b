"""Where a block of decode's tokens lies: the addresses of its rows, their scales, and their places in the block.

The rows of a whole block are interleaved: its first token, its 17th, its 33rd and its 49th, then its second, and so on.
Reading from four places at once keeps more of the memory's channels busy. Rows of 8 bits that meet bfloat16 queries
stay in order, which is faster by a seventh: they are half as long, and their scales lie in order too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import part
from quire.kernels.cpu.attend.products import (
    BLOCK,
    CACHE_LINE,
    K_ROWS,
    K_SCALES,
    PLACES,
    STREAMS,
    V_ROWS,
    V_SCALES,
)
from quire.kernels.cpu.attend.rows import ZERO, Call, Step, load_scales, locate_tokens
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, load_i32, load_i64, prefetch, store, store_f32, store_i64
from quire.kernels.cpu.simd.vectors import interleave, tile

ROW_VECTORS = BLOCK * 8 // (LANES * 4)  # vectors that a block's addresses fill


@part
def locate_block(
    cfg: Any, step: Step, call: Call, sequence: int, kv_head: int, begin: int, end: int, block: int
) -> None:
    """Addresses of a block's K and V rows: interleaved where it is whole, else padded with the last one."""
    locate_tokens(step, call, sequence, kv_head, begin, end, block + K_ROWS, block + V_ROWS)
    streams = streams_of(cfg, end - begin)
    if streams == STREAMS:
        interleave_rows(block + K_ROWS)
        interleave_rows(block + V_ROWS)
    if call.alibi_slopes:
        length = (end - begin) // streams
        for i in range(streams):
            for t in range(length):
                store_f32(block + PLACES + (t * streams + i) * 4, np.float32(i * length + t))
    if begin < end:
        last = (end - begin - 1) * 8
        for at in range(last + 8, BLOCK * 8, 8):
            store_i64(block + K_ROWS + at, load_i64(block + K_ROWS + last))
            store_i64(block + V_ROWS + at, load_i64(block + V_ROWS + last))
    if call.k_scale:
        prefetch_scales(step, sequence, begin, end, call.k_scale + kv_head * call.scale_head, call)
        prefetch_scales(step, sequence, begin, end, call.v_scale + kv_head * call.scale_head, call)


@part
def interleave_rows(rows: int) -> None:
    """Interleave the addresses of 64 rows: 0, 16, 32, 48, 1, …."""
    quarter = BLOCK // STREAMS * 8
    mixed = tile(ROW_VECTORS)
    for i in range(0, ROW_VECTORS, STREAMS):
        at = rows + i // STREAMS * LANES * 4
        a, b = load(F32, at), load(F32, at + quarter)
        c, d = load(F32, at + 2 * quarter), load(F32, at + 3 * quarter)
        mixed[i] = interleave(a, b, c, d, 0)
        mixed[i + 1] = interleave(a, b, c, d, 1)
        mixed[i + 2] = interleave(a, b, c, d, 2)
        mixed[i + 3] = interleave(a, b, c, d, 3)
    for i in range(ROW_VECTORS):
        store(F32, rows + i * LANES * 4, mixed[i])


@part
def streams_of(cfg: Any, count: int) -> int:
    """From how many places a block of ``count`` tokens is interleaved; a short block is read in order."""
    return STREAMS if count == BLOCK and not cfg.converts else 1


@part
def scale_block(
    cfg: Any, step: Step, call: Call, sequence: int, kv_head: int, begin: int, end: int, block: int
) -> None:
    """A block's scales in the order of its rows.

    Behind the last token's lie zeros: padding that is multiplied along with it has no weight.
    """
    head, streams = kv_head * call.scale_head, streams_of(cfg, end - begin)
    length, apart = (end - begin) // streams, streams * 4
    for i in range(streams):
        first, at = begin + i * length, block + i * 4
        last = first + length
        load_scales(step, call, sequence, first, last, call.k_scale + head, at + K_SCALES, apart)
        load_scales(step, call, sequence, first, last, call.v_scale + head, at + V_SCALES, apart)
    for t in range(end - begin, -(-(end - begin) // LANES) * LANES + 1):
        store_f32(block + K_SCALES + t * 4, ZERO)
        store_f32(block + V_SCALES + t * 4, ZERO)


@part
def prefetch_scales(step: Step, sequence: int, begin: int, end: int, base: int, call: Call) -> None:
    """Prefetch the scales of every page that tokens begin … end − 1 lie on."""
    table, floats = step.page_table + sequence * step.page_table_row, CACHE_LINE // 4
    for page in range(begin // step.page_size, (end + step.page_size - 1) // step.page_size):
        scales = base + load_i32(table + page * 4) * call.scale_page
        for slot in range(0, min(step.page_size, BLOCK), floats):
            prefetch(scales + slot * call.scale_slot)
