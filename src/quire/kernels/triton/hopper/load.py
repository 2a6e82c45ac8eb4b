"""The loaders: one warp issues the copies of queries and keys, another those of values."""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from quire.kernels.triton.hopper.geometry import (
    BLOCK_M,
    HALF,
    advance,
    box_token,
    count_blocks,
    load_reach,
    load_source,
)

SLAB: gl.constexpr = gl.constexpr(64)  # columns of 16 bits in 128 bytes, the widest box there is


@gluon.jit
def load_block(descriptor, tile, full, free, phase, kv_head, row, block, kv_end,
               WHOLE: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Issue the copies of one block of keys or values, box by box, once its stage is free. WHOLE blocks hold keys only.

    As the matrix unit reads it, a [BLOCK_N, D] tile lies in slabs of SLAB columns; a box fills rows of one slab.
    """
    BLOCK_N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    BOX: gl.constexpr = descriptor.block_shape[2]
    pages = ()
    for j in gl.static_range(BLOCK_N // BOX):
        key = block + j * BOX
        if WHOLE:
            pages = pages + (gl.load(row + key // PAGE),)
        else:
            pages = pages + (gl.load(row + key // PAGE, mask=key < kv_end, other=0),)
    mbarrier.wait(free, phase)
    mbarrier.expect(full, BLOCK_N * D * 2)
    slabs = tile._reinterpret(descriptor.dtype, [D // SLAB, BLOCK_N, SLAB], tile.layout)
    for j in gl.static_range(BLOCK_N // BOX):
        key = block + j * BOX
        token = key % PAGE if WHOLE else box_token(key, kv_end, PAGE, BOX)
        for slab in gl.static_range(D // SLAB):
            rows = slabs.index(slab).slice(j * BOX, BOX)
            box = rows._reinterpret(descriptor.dtype, [1, 1, BOX, SLAB], descriptor.layout)
            tma.async_copy_global_to_shared(descriptor, [kv_head, pages[j], token, slab * SLAB], full, box)


@gluon.jit
def load_blocks(descriptor, ring, stage, phase, kv_head, row, kv_begin, kv_end, PAGE: gl.constexpr):
    """The keys or the values of one item, last block first."""
    tiles, full, free = ring
    STAGES: gl.constexpr = tiles.shape[0]
    BLOCK_N: gl.constexpr = tiles.shape[1]
    last_block = kv_begin + (count_blocks(kv_begin, kv_end, BLOCK_N) - 1) * BLOCK_N
    load_block(descriptor, tiles.index(stage), full.index(stage), free.index(stage), phase, kv_head, row,
               last_block, kv_end, False, PAGE)  # fmt: skip
    stage, phase = advance(stage, phase, STAGES)
    for block in range(last_block - BLOCK_N, kv_begin - BLOCK_N, -BLOCK_N):
        load_block(descriptor, tiles.index(stage), full.index(stage), free.index(stage), phase, kv_head, row,
                   block, kv_end, True, PAGE)  # fmt: skip
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def load_keys(q_descriptor, k_descriptor, queries, keys, items, first, last, page_table, table_row,
              PAGE: gl.constexpr):  # fmt: skip
    """Every item's queries and keys, as far ahead as shared memory has room."""
    tile, q_full, q_free = queries
    TOKENS: gl.constexpr = q_descriptor.block_shape[0]
    GROUP_ROWS: gl.constexpr = q_descriptor.block_shape[2]
    D: gl.constexpr = tile.shape[2]
    stage = 0
    phase = 1
    q_phase = 1
    for i in range(first, last):
        q_position, kv_begin, kv_end = load_reach(items, i)
        sequence, kv_head, q_begin = load_source(items, i)
        mbarrier.wait(q_free, q_phase)
        q_phase ^= 1
        mbarrier.expect(q_full, BLOCK_M * D * 2)
        for half in gl.static_range(BLOCK_M // HALF):
            box = tile.index(half)._reinterpret(
                q_descriptor.dtype, [TOKENS, 1, GROUP_ROWS, D], q_descriptor.layout
            )
            at = [q_begin + half * TOKENS, kv_head, 0, 0]
            tma.async_copy_global_to_shared(q_descriptor, at, q_full, box)
        row = page_table + sequence.to(gl.int64) * table_row
        stage, phase = load_blocks(k_descriptor, keys, stage, phase, kv_head, row, kv_begin, kv_end, PAGE)


@gluon.jit
def load_values(v_descriptor, values, items, first, last, page_table, table_row, PAGE: gl.constexpr):
    """Every item's values."""
    stage = 0
    phase = 1
    for i in range(first, last):
        q_position, kv_begin, kv_end = load_reach(items, i)
        sequence, kv_head, q_begin = load_source(items, i)
        row = page_table + sequence.to(gl.int64) * table_row
        stage, phase = load_blocks(v_descriptor, values, stage, phase, kv_head, row, kv_begin, kv_end, PAGE)
