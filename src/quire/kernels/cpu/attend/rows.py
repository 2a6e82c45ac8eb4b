"""What the decode and prefill kernels share: a call's addresses, rows in and rows out, and where pages lie.

Inside the kernels scores are in base 2, ``s = score · log2(e)``, so that exponentials are exp2; a row's state is
(m, l, acc) with out = acc / l and lse = ln 2 · (m + log2 l).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quire.kernels.compile import part
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import (
    BYTES,
    F32,
    load,
    load_f32,
    load_head,
    load_i32,
    load_i64,
    store,
    store_f32,
    store_head,
    store_i64,
    store_steps,
)
from quire.kernels.cpu.simd.vectors import add, mul, splat
from quire.planning.work_list import ITEM, MERGE, Item, Merge

LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)
MINUS_INFINITY = np.float32(-np.inf)
LOWEST = np.float32(np.finfo(np.float32).min)  # where a maximum starts: −inf minus −inf would be NaN
ZERO = np.float32(0.0)
# Where each column's int64 lies in an item or a merge, and how long these are, in bytes.
ITEM_AT, ITEM_BYTES = Item._make(8 * column for column in ITEM), 8 * len(ITEM)
MERGE_AT, MERGE_BYTES = Merge._make(8 * column for column in MERGE), 8 * len(MERGE)


class Step(NamedTuple):
    """One kernel's part of a plan: addresses of int64 arrays and of scratch memory."""

    items: int  # [num_items, 8], work_list.Item
    worker_indptr: int  # [num_workers + 1]
    merges: int  # [num_merges, 5], work_list.Merge
    page_table: int  # int32 [batch, max_pages]
    page_table_row: int  # bytes from one row to the next
    seq_lens: int  # [batch]
    cu_seqlens_q: int  # [batch + 1]
    page_size: int
    group: int  # query heads per KV head
    causal: int
    window_left: int
    partial_rows: int  # rows of one partial state
    partial_out: int  # float32 [num_partials, partial_rows, padded head_dim]
    partial_softmax: int  # float32 [num_partials, partial_rows, 2]: m and l
    scratch: int
    scratch_bytes: int  # per worker


class Call(NamedTuple):
    """One layer's tensors: addresses, then strides in bytes and numbers. An address of 0 means: not given."""

    q: int
    k: int
    v: int
    out: int
    lse: int
    alibi_slopes: int
    sinks: int
    tree_mask: int
    k_scale: int
    v_scale: int

    q_token: int
    q_head: int
    k_head: int
    k_page: int
    k_slot: int
    v_head: int
    v_page: int
    v_slot: int
    out_token: int
    out_head: int
    lse_token: int
    scale_head: int  # of k_scale and v_scale; 0 where one scale is given for all heads, pages or slots
    scale_page: int
    scale_slot: int
    tree_mask_row: int
    softmax_scale: float
    softcap: float


@part
def share_of(worker: int, step: Step) -> tuple[int, int, int]:
    """Addresses of a worker's first item, of the end of its items, and of its scratch."""
    bounds = step.worker_indptr + worker * 8
    begin = step.items + load_i64(bounds) * ITEM_BYTES
    end = step.items + load_i64(bounds + 8) * ITEM_BYTES
    return begin, end, step.scratch + worker * step.scratch_bytes


@part
def query_scale(call: Call) -> Any:
    """What q · k is multiplied with so that scores come out in base 2, or as the argument of tanh under a softcap."""
    if call.softcap > 0.0:
        return np.float32(call.softmax_scale / call.softcap)
    return np.float32(call.softmax_scale) * LOG2_E


@part
def load_row(cfg: Any, dtype: Any, source: int, factor: float, target: int) -> None:
    """Convert one row of head_dim elements to float32 scratch, times a factor, padded with zeros."""
    for i in range(cfg.vectors):
        values = load(dtype, source + i * LANES * BYTES[dtype])
        store(F32, target + i * LANES * 4, mul(values, splat(factor)))
    if cfg.tail:
        i = cfg.vectors
        values = load_head(dtype, source + i * LANES * BYTES[dtype], cfg.tail)
        store(F32, target + i * LANES * 4, mul(values, splat(factor)))


@part
def store_row(cfg: Any, dtype: Any, source: int, factor: float, target: int) -> None:
    """Write one row of float32 scratch, times a factor, as head_dim elements.

    Adding zero turns −0 into 0: whether a sum that underflowed is −0 or 0 depends on how many masked keys followed.
    """
    for i in range(cfg.vectors):
        values = mul(add(load(F32, source + i * LANES * 4), splat(ZERO)), splat(factor))
        store(dtype, target + i * LANES * BYTES[dtype], values)
    if cfg.tail:
        i = cfg.vectors
        values = mul(add(load(F32, source + i * LANES * 4), splat(ZERO)), splat(factor))
        store_head(dtype, target + i * LANES * BYTES[dtype], values, cfg.tail)


@part
def finish_row(cfg: Any, call: Call, token: int, head: int, acc: int, m: float, l: float) -> None:
    """Write a whole row's result: out = acc / (l + sink's share), lse = ln 2 · (m + log2 l).

    A row that saw no key has l = 0: out is zero, and lse is the sink's logit as it was given, or −inf without one.
    """
    factor, lse = ZERO, MINUS_INFINITY
    if call.sinks:
        lse = load_f32(call.sinks + head * 4)
    if l > ZERO or l != l:
        weight = np.float32(1.0)
        if call.sinks:
            sink = load_f32(call.sinks + head * 4) * LOG2_E
            highest = max(m, sink)
            weight = np.exp2(m - highest)
            l = l * weight + np.exp2(sink - highest)
            m = highest
        factor = weight / l
        lse = (m + np.log2(l)) * LN_2
    store_row(cfg, cfg.q_dtype, acc, factor, call.out + token * call.out_token + head * call.out_head)
    if call.lse:
        store_f32(call.lse + token * call.lse_token + head * 4, lse)


@part
def finish_partial(cfg: Any, step: Step, partial: int, row: int, acc: int, m: float, l: float) -> None:
    """Store a split row's state undivided, so that merging it with empty states changes no bit."""
    at = partial * step.partial_rows + row
    for i in range(0, cfg.row_bytes, LANES * 4):
        store(F32, step.partial_out + at * cfg.row_bytes + i, load(F32, acc + i))
    store_f32(step.partial_softmax + at * 8, m)
    store_f32(step.partial_softmax + at * 8 + 4, l)


@part
def locate_tokens(
    step: Step, call: Call, sequence: int, kv_head: int, begin: int, end: int, k_rows: int, v_rows: int
) -> None:
    """Write the byte addresses of a sequence's tokens begin … end − 1, of their keys and of their values."""
    k_head, v_head = call.k + kv_head * call.k_head, call.v + kv_head * call.v_head
    page_at = step.page_table + sequence * step.page_table_row + begin // step.page_size * 4
    slot, left = begin % step.page_size, end - begin
    while left > 0:
        page = load_i32(page_at)
        k = k_head + page * call.k_page + slot * call.k_slot
        v = v_head + page * call.v_page + slot * call.v_slot
        here = min(step.page_size - slot, left)
        left -= here
        while here >= LANES:
            store_steps(k_rows, k, call.k_slot)
            store_steps(v_rows, v, call.v_slot)
            k_rows, v_rows = k_rows + LANES * 8, v_rows + LANES * 8
            k, v, here = k + LANES * call.k_slot, v + LANES * call.v_slot, here - LANES
        while here > 0:
            store_i64(k_rows, k)
            store_i64(v_rows, v)
            k_rows, v_rows, k, v, here = k_rows + 8, v_rows + 8, k + call.k_slot, v + call.v_slot, here - 1
        page_at, slot = page_at + 4, 0


@part
def load_scales(
    step: Step, call: Call, sequence: int, begin: int, end: int, base: int, target: int, apart: int
) -> None:
    """Copy the fp32 scales of a sequence's tokens begin … end − 1 to ``target``, ``apart`` bytes apart."""
    table = step.page_table + sequence * step.page_table_row
    token = begin
    while token < end:
        page = token // step.page_size
        first = page * step.page_size
        last = min(first + step.page_size, end)
        address = base + load_i32(table + page * 4) * call.scale_page + (token - first) * call.scale_slot
        while apart == call.scale_slot == BYTES[F32] and token + LANES <= last:
            store(F32, target, load(F32, address))
            target += LANES * BYTES[F32]
            address += LANES * BYTES[F32]
            token += LANES
        while token < last:
            store_f32(target, load_f32(address))
            target += apart
            address += call.scale_slot
            token += 1
