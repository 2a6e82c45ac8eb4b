"""Where keys and values lie, and how they are read: blocks of tokens on pages that may lie anywhere.

Blocks start at multiples of BLOCK_N tokens, counted from the sequence's first. Every address is that of a token from
``begin`` to ``last``, which the tile may see, so that no unused entry of the page table is read. ALIGNED: pages divide
blocks or blocks divide pages, and the tile begins at a block's start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.formats import widen, widen_apart, widen_words
from quire.kernels.triton.layout import by_key, by_row


@triton.jit
def page_ids(
    table, first, begin, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pages of the block of tokens at ``first``: one id, or one per token."""
    slot = tl.arange(0, BLOCK_N)
    if ALIGNED and PAGE_SIZE >= BLOCK_N:
        index = tl.minimum(first, last) // PAGE_SIZE
    elif ALIGNED:
        index = tl.minimum(first // PAGE_SIZE + slot // PAGE_SIZE, last // PAGE_SIZE)
    else:
        index = tl.maximum(tl.minimum(first + slot, last), begin) // PAGE_SIZE
    return tl.load(table + index, mask=last >= begin, other=0)


@triton.jit
def slots_in_page(first, begin, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Where in its page each token of the block at ``first`` lies."""
    slot = tl.arange(0, BLOCK_N)
    if ALIGNED and PAGE_SIZE >= BLOCK_N:
        return first % PAGE_SIZE + slot
    elif ALIGNED:
        return slot % PAGE_SIZE
    else:
        return tl.maximum(tl.minimum(first + slot, last), begin) % PAGE_SIZE


@triton.jit
def load_rows(
    pages, row, inside, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr,
    CAPABILITY: tl.constexpr,
):  # fmt: skip
    """Rows of pages [len(row), BLOCK_D] as ``dtype`` numbers (see ``formats``), 0 where not ``inside``.

    PACKED rows are counted in int32s.
    """
    if PACKED:
        word = tl.arange(0, BLOCK_D // 4)
        stored = load_tile(
            pages.to(tl.pointer_type(tl.int32)), row, word, HEAD_DIM // 4, BLOCK_D // 4, inside, False
        )
        return widen_words(stored, FORMAT, CAPABILITY)
    else:
        dim = tl.arange(0, BLOCK_D)
        return widen(load_tile(pages, row, dim, HEAD_DIM, BLOCK_D, inside, False), FORMAT, dtype)


@triton.jit
def load_values(
    pages, row, inside, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr, CAPABILITY: tl.constexpr,
):  # fmt: skip
    """Values as they are multiplied: [keys, dims], [dims, keys], or even and odd dims of the latter apart.

    Transposed values are loaded transposed: to transpose them afterwards costs a second pass through shared memory.
    """
    if TRANSPOSED and PACKED:
        pair = tl.arange(0, BLOCK_D // 2)
        pages = pages.to(tl.pointer_type(tl.int16))
        pairs = load_tile(pages, row * 2, pair, HEAD_DIM // 2, BLOCK_D // 2, inside, True)
        return widen_apart(pairs, FORMAT, CAPABILITY)
    elif TRANSPOSED:
        return widen(
            load_tile(pages, row, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D, inside, True), FORMAT, dtype
        )
    else:
        return load_rows(pages, row, inside, dtype, HEAD_DIM, BLOCK_D, FORMAT, PACKED, CAPABILITY)


@triton.jit
def load_tile(
    base, row, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, inside, TRANSPOSED: tl.constexpr
):
    """[rows, columns] elements, or [columns, rows], with a mask only where one is needed."""
    at = base + by_row(row, TRANSPOSED) + by_key(column, TRANSPOSED)
    exists = by_key(column < COLUMNS, TRANSPOSED)
    if inside is not None:
        return tl.load(at, mask=by_row(inside, TRANSPOSED) & exists, other=0)
    elif COLUMNS == BLOCK:
        return tl.load(at)
    else:
        return tl.load(at, mask=exists, other=0)


@triton.jit
def prefetch_rows(pages, row, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr):
    """Prefetch rows of pages into the L2 cache, 64 bytes at a time; NVIDIA only."""
    if PACKED:
        row = row * 4  # counted in int32s
    BYTES: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = (HEAD_DIM * BYTES + 63) // 64
    for line in tl.static_range(LINES):
        at = pages + (row + line * (64 // BYTES))
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )
