"""Store: each token's K and V into its slot, quantised where the pages are.

Quantisation is symmetric, per token and head: scale = max|x| / largest(dtype), values = round(x / scale), so
that x ≈ values · scale and the largest element keeps its full precision. A row of zeros has scale 0, and so has
one whose scale would be subnormal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quire.kernels.cpu.simd.memory import BYTES, load, load_head, load_i64, store, store_f32, store_head
from quire.kernels.cpu.simd.vectors import (
    LANES,
    at_least,
    div,
    first_lane,
    fold_max,
    fold_sum,
    magnitude,
    maximum,
    select,
    splat,
)
from quire.kernels.cpu.threads import kernel, parallel_for, part

SMALLEST_SCALE = np.finfo(np.float32).smallest_normal


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


@kernel
def write(
    cfg: Any, threads: int, tokens: int, heads: int, slots: int, page_size: int, k: Write, v: Write
) -> None:
    """Write every token's K and V."""
    parallel_for(write_token, threads, tokens, (cfg, heads, slots, page_size, k, v))


@part
def write_token(token: int, cfg: Any, heads: int, slots: int, page_size: int, k: Write, v: Write) -> None:
    """All heads of one token; slot −1 writes nowhere."""
    slot = load_i64(slots + token * 8)
    if slot < 0:
        return
    page, offset = slot // page_size, slot % page_size
    for head in range(heads):
        write_row(cfg, token, head, page, offset, k)
        write_row(cfg, token, head, page, offset, v)


@part
def write_row(cfg: Any, token: int, head: int, page: int, offset: int, to: Write) -> None:
    """One row of head_dim elements."""
    source = to.rows + token * to.token + head * to.head
    target = to.pages + head * to.pages_head + page * to.page + offset * to.slot
    scale = np.float32(1.0)
    if to.scale:
        scale = largest_element(cfg, source) / np.float32(cfg.kv_largest)
        if scale < SMALLEST_SCALE:
            scale = np.float32(0.0)
        store_f32(to.scale + head * to.scale_head + page * to.scale_page + offset * to.scale_slot, scale)
    if scale > np.float32(0.0):
        store_divided(cfg, source, scale, target)
    else:  # a NaN in the row is in its scale
        store_zeros(cfg, target)


@part
def store_divided(cfg: Any, source: int, scale: float, target: int) -> None:
    """values = x / scale, rounded as they are stored."""
    step, kv_step = LANES * BYTES[cfg.q_dtype], LANES * BYTES[cfg.kv_dtype]
    for i in range(cfg.vectors):
        values = load(cfg.q_dtype, source + i * step)
        store(cfg.kv_dtype, target + i * kv_step, div(values, splat(scale)))
    if cfg.tail:
        values = load_head(cfg.q_dtype, source + cfg.vectors * step, cfg.tail)
        store_head(cfg.kv_dtype, target + cfg.vectors * kv_step, div(values, splat(scale)), cfg.tail)


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
