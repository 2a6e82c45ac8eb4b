"""Where a block of decode's tokens lies: the addresses of its rows, their scales, and their places in the block.

A whole block lies in turn: its first token, its 17th, its 33rd and its 49th, then its second, and so on. Read in that
order, four places keep more of the memory's channels busy than one place after the other does. Rows that are converted
first, which is no more than reading them, lie as they come: that is faster by a seventh.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.cpu.launch import part
from quire.kernels.cpu.memory import load_i32, load_i64, prefetch, store_f32, store_i64
from quire.kernels.cpu.products import BLOCK, CACHE_LINE, K_ROWS, PLACES, STREAMS, V_ROWS
from quire.kernels.cpu.rows import Call, Step, load_scales, locate_tokens


@part
def locate_block(
    cfg: Any, step: Step, call: Call, sequence: int, kv_head: int, begin: int, end: int, block: int
) -> None:
    """Addresses of a block's K and V rows, in turn where it is whole, else padded with the last one."""
    k, v = call.k + kv_head * call.k_head, call.v + kv_head * call.v_head
    streams = streams_of(cfg, end - begin)
    length = (end - begin) // streams
    for i in range(streams):
        first = begin + i * length
        at, apart = block + i * 8, streams * 8
        locate_tokens(step, sequence, first, first + length, k, call.k_page, call.k_slot, at + K_ROWS, apart)
        locate_tokens(step, sequence, first, first + length, v, call.v_page, call.v_slot, at + V_ROWS, apart)
        if call.alibi_slopes:
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
def streams_of(cfg: Any, count: int) -> int:
    """From how many places so many tokens are read in turn; a short block is read as it comes."""
    return STREAMS if count == BLOCK and not cfg.converts else 1


@part
def scale_block(
    cfg: Any, step: Step, call: Call, sequence: int, begin: int, end: int, base: int, target: int
) -> None:
    """A block's scales in the order of its rows."""
    streams = streams_of(cfg, end - begin)
    length = (end - begin) // streams
    for i in range(streams):
        first = begin + i * length
        load_scales(step, call, sequence, first, first + length, base, target + i * 4, streams * 4)


@part
def prefetch_scales(step: Step, sequence: int, begin: int, end: int, base: int, call: Call) -> None:
    """Ask for the scales of every page that tokens begin … end − 1 lie on."""
    table, floats = step.page_table + sequence * step.page_table_row, CACHE_LINE // 4
    for page in range(begin // step.page_size, (end + step.page_size - 1) // step.page_size):
        scales = base + load_i32(table + page * 4) * call.scale_page
        for slot in range(0, min(step.page_size, BLOCK), floats):
            prefetch(scales + slot * call.scale_slot)
