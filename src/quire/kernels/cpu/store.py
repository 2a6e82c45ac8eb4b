"""Store: each token's K and V into its slot, quantised where the pages are.

Quantisation is symmetric, per token and head: scale = max|x| / largest(dtype), values = round(x / scale), so
that x ≈ values · scale and the largest element keeps its full precision. A row of zeros has scale 0, and so has
one whose scale would be subnormal.

Where scales are given they are read, and values = clamp(round(x / scale), ±largest(dtype)): 0 where the scale is 0 or
NaN. A NaN in x is stored as fp8's NaN, and as 0 of int8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quire.kernels.compile import compiled, part
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import (
    BYTES,
    load,
    load_f32,
    load_head,
    load_i64,
    store,
    store_f32,
    store_head,
)
from quire.kernels.cpu.simd.vectors import (
    at_least,
    div,
    first_lane,
    fold_max,
    fold_sum,
    less_than,
    magnitude,
    maximum,
    select,
    splat,
)
from quire.kernels.cpu.threads import parallel_for

SMALLEST_SCALE = np.finfo(np.float32).smallest_normal


class Layout(NamedTuple):
    """What calls of one layout have in common, but for the strides of K and V."""

    tokens: int
    heads: int
    slot_bytes: int  # from one int64 slot to the next
    num_slots: int  # of the pool
    page_size: int
    given: int  # whether scales are read, or computed and written


class Write(NamedTuple):
    """K's or V's tensors: addresses, then strides in bytes. A scale address of 0 means: not quantised."""

    rows: int
    pages: int
    scale: int
    token: int
    head: int
    pages_head: int
    page: int
    slot: int
    scale_head: int
    scale_page: int
    scale_slot: int


@compiled
def write(cfg: Any, threads: int, layout: Layout, slots: int, k: Write, v: Write) -> bool:
    """Write every token's K and V; or return False and write nothing if a slot is neither in the pool nor −1."""
    outside = 0
    for token in range(layout.tokens):
        slot = load_i64(slots + token * layout.slot_bytes)
        outside |= (slot < -1) | (slot >= layout.num_slots)
    if outside:
        return False
    parallel_for(write_token, threads, layout.tokens, (cfg, layout, slots, k, v))
    return True


@part
def write_token(token: int, cfg: Any, layout: Layout, slots: int, k: Write, v: Write) -> None:
    """All heads of one token; slot −1 writes nowhere."""
    slot = load_i64(slots + token * layout.slot_bytes)
    if slot < 0:
        return
    page, offset = slot // layout.page_size, slot % layout.page_size
    for head in range(layout.heads):
        write_row(cfg, layout.given, token, head, page, offset, k)
        write_row(cfg, layout.given, token, head, page, offset, v)


@part
def write_row(cfg: Any, given: int, token: int, head: int, page: int, offset: int, to: Write) -> None:
    """One row of head_dim elements."""
    source = to.rows + token * to.token + head * to.head
    target = to.pages + head * to.pages_head + page * to.page + offset * to.slot
    scale = np.float32(1.0)
    if to.scale:
        at = to.scale + head * to.scale_head + page * to.scale_page + offset * to.scale_slot
        if given:
            scale = load_f32(at)
        else:
            scale = largest_element(cfg, source) / np.float32(cfg.kv_largest)
            if scale < SMALLEST_SCALE:
                scale = np.float32(0.0)
            store_f32(at, scale)
    if scale > np.float32(0.0):
        store_divided(cfg, source, scale, target)
    else:  # a computed scale is NaN where the row has a NaN
        store_zeros(cfg, target)


@part
def store_divided(cfg: Any, source: int, scale: float, target: int) -> None:
    """values = x / scale, rounded as they are stored."""
    step, kv_step = LANES * BYTES[cfg.q_dtype], LANES * BYTES[cfg.kv_dtype]
    for i in range(cfg.vectors):
        values = load(cfg.q_dtype, source + i * step)
        store(cfg.kv_dtype, target + i * kv_step, divide(cfg, values, scale))
    if cfg.tail:
        values = load_head(cfg.q_dtype, source + cfg.vectors * step, cfg.tail)
        store_head(cfg.kv_dtype, target + cfg.vectors * kv_step, divide(cfg, values, scale), cfg.tail)


@part
def divide(cfg: Any, values: Any, scale: float) -> Any:
    """values / scale, clamped to the numbers of a quantised page's dtype. NaN stays NaN."""
    divided = div(values, splat(scale))
    if cfg.kv_largest:
        largest, lowest = splat(np.float32(cfg.kv_largest)), splat(np.float32(-cfg.kv_largest))
        divided = select(less_than(largest, divided), largest, maximum(lowest, divided))
    return divided


@part
def store_zeros(cfg: Any, target: int) -> None:
    """values = 0."""
    kv_step, zero = LANES * BYTES[cfg.kv_dtype], splat(np.float32(0.0))
    for i in range(cfg.vectors):
        store(cfg.kv_dtype, target + i * kv_step, zero)
    if cfg.tail:
        store_head(cfg.kv_dtype, target + cfg.vectors * kv_step, zero, cfg.tail)


@part
def largest_element(cfg: Any, source: int) -> Any:
    """max|x| of one row; NaN if any element is, so that the row's scale says so."""
    step, zero = LANES * BYTES[cfg.q_dtype], splat(np.float32(0.0))
    largest, strange = zero, zero
    for i in range(cfg.vectors):
        size = magnitude(load(cfg.q_dtype, source + i * step))
        largest, strange = maximum(largest, size), select(at_least(size, zero), strange, size)
    if cfg.tail:
        size = magnitude(load_head(cfg.q_dtype, source + cfg.vectors * step, cfg.tail))
        largest, strange = maximum(largest, size), select(at_least(size, zero), strange, size)
    return first_lane(fold_max(largest, 1)) + first_lane(fold_sum(strange, 1))
