"""Linear layers of many tokens, whose sums are taken in the order of ``linear``: the same bits, at a prompt's speed.

    out[t, n] = Σ_k x[t, k] · w[n, k] + b[n]

``linear`` runs a dot product along k with lanes on k: lane l sums k = l, l + LANES, …, and a tree adds up the lanes.
Here lanes lie on n, and the k of one lane are taken together: for each l a register tile of TOKENS × VECTORS vectors
sums k = l, l + LANES, …, and the tiles of all l meet in the same tree. Every product and sum is one of those of
``linear``, so a token has the same bits here and there, among any number of others and on any number of threads.

A group of w's rows is packed to [l][k / LANES][row] once for a PANEL of tokens, the panel to [l][k / LANES][token]. A
weight that lies as [k][n] is packed without being transposed, and only here.

Source: the register tile and the packing are the usual ones of matrix products (Goto, van de Geijn,
10.1145/1356052.1356053).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quire.kernels.compile import compile_time, compiled, part
from quire.kernels.cpu.attend.products import add_product
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import BF16, BYTES, F32, load, load_f32, load_head, store, store_head
from quire.kernels.cpu.simd.pairs import PAIRED, load_pair, load_pairs
from quire.kernels.cpu.simd.vectors import add, splat, tile, transpose
from quire.kernels.cpu.threads import parallel_for

PANEL = 256  # tokens that meet a packed group of rows
TOKENS = LANES // 2  # of a register tile
VECTORS = 3  # of rows in a register tile
TILE = TOKENS * VECTORS
GROUP = VECTORS * LANES  # rows of the weight that are packed together
LEVELS = LANES.bit_length() - 1  # of the tree
TREE_BYTES = (LEVELS + 1) * TILE * LANES * 4


@compile_time
class PanelConfig(NamedTuple):
    """What the kernel is specialised for."""

    dtype: int  # of x, weight, bias and out: a code of memory.py
    pairs: int  # whether pairs of bfloat16 are multiplied, as in ``linear``
    by_columns: int  # whether the weight lies as [k][n]

    @property
    def at_once(self) -> int:
        """Elements of a row in one vector."""
        return PAIRED if self.pairs else LANES


class Panels(NamedTuple):
    """The tensors of one call: addresses, and strides in bytes. A bias of 0 means: none."""

    x: int
    x_token: int
    weight: int
    weight_row: int  # from one n to the next; unused by columns
    weight_column: int  # from one k to the next; used by columns
    bias: int
    out: int
    out_token: int
    num_tokens: int
    num_rows: int
    width: int  # elements of a row of x and of the weight
    scratch: int
    scratch_bytes: int  # of one worker


def scratch_bytes(tokens: int, vectors: int) -> int:
    """Scratch memory of one worker: the trees of a block's tiles, a packed group and a packed panel."""
    token_blocks = -(-min(tokens, PANEL) // LANES)
    return LANES // TOKENS * TREE_BYTES + (GROUP + token_blocks * LANES) * vectors * LANES * 4


@compiled
def multiply_panels(cfg: Any, threads: int, workers: int, panels: Panels) -> None:
    """Run every worker's share."""
    parallel_for(multiply_share, threads, workers, (cfg, workers, panels))


@part
def multiply_share(worker: int, cfg: Any, workers: int, panels: Panels) -> None:
    """Consecutive pairs of a panel of tokens and a group of rows, panel by panel."""
    tree = panels.scratch + worker * panels.scratch_bytes
    vectors = (panels.width + cfg.at_once - 1) // cfg.at_once
    packed = tree + LANES // TOKENS * TREE_BYTES
    tokens = packed + GROUP * vectors * LANES * 4
    groups = (panels.num_rows + GROUP - 1) // GROUP
    total = (panels.num_tokens + PANEL - 1) // PANEL * groups
    panel = -1
    for item in range(total * worker // workers, total * (worker + 1) // workers):
        if item // groups != panel:
            panel = item // groups
            pack_tokens(cfg, panels, vectors, panel * PANEL, tokens)
        row = item % groups * GROUP
        if cfg.by_columns:
            pack_columns(cfg, panels, vectors, row, packed)
        else:
            pack_rows(cfg, panels, vectors, row, packed)
        for first in range(panel * PANEL, min((panel + 1) * PANEL, panels.num_tokens), LANES):
            at = tokens + (first - panel * PANEL) * vectors * LANES * 4
            tiles = min((panels.num_tokens - first + TOKENS - 1) // TOKENS, LANES // TOKENS)
            multiply_block(cfg, vectors, tiles, packed, at, tree)
            for i in range(tiles):
                finish_tile(
                    cfg, panels, row, first + i * TOKENS, tree + i * TREE_BYTES + LEVELS * TILE * LANES * 4
                )


@part
def load_step(cfg: Any, row: int, i: int, width: int) -> Any:
    """Vector i of a row of x or of the weight, as pairs or as float32; zeros behind its end."""
    at = row + i * cfg.at_once * BYTES[cfg.dtype]
    if cfg.pairs:
        return load_pairs(BF16, at)
    if (i + 1) * LANES <= width:
        return load(cfg.dtype, at)
    return load_head(cfg.dtype, at, width - i * LANES)


@part
def pack_tokens(cfg: Any, panels: Panels, vectors: int, first: int, tokens: int) -> None:
    """Lay out a panel as [token / LANES][l][k / LANES][LANES tokens]; its last token fills the last block."""
    square = tile(LANES)
    last = panels.num_tokens - 1
    for block in range(first, min(first + PANEL, panels.num_tokens), LANES):
        target = tokens + (block - first) * vectors * LANES * 4
        for i in range(vectors):
            for t in range(LANES):
                square[t] = load_step(cfg, panels.x + min(block + t, last) * panels.x_token, i, panels.width)
            transpose(square)
            for l in range(LANES):
                store(F32, target + (l * vectors + i) * LANES * 4, square[l])


@part
def pack_rows(cfg: Any, panels: Panels, vectors: int, first: int, packed: int) -> None:
    """Lay out a group of rows as [l][k / LANES][GROUP rows]; the weight's last row fills the last group."""
    square = tile(LANES)
    last = panels.num_rows - 1
    for v in range(VECTORS):
        for i in range(vectors):
            for r in range(LANES):
                row = panels.weight + min(first + v * LANES + r, last) * panels.weight_row
                square[r] = load_step(cfg, row, i, panels.width)
            transpose(square)
            for l in range(LANES):
                store(F32, packed + ((l * vectors + i) * VECTORS + v) * LANES * 4, square[l])


@part
def pack_columns(cfg: Any, panels: Panels, vectors: int, first: int, packed: int) -> None:
    """The same for a weight that lies as [k][n]; zeros behind its last k and n."""
    for k in range(vectors * LANES):
        target = packed + (k % LANES * vectors + k // LANES) * GROUP * 4
        source = panels.weight + k * panels.weight_column + first * BYTES[cfg.dtype]
        for v in range(VECTORS):
            count = panels.num_rows - first - v * LANES if k < panels.width else 0
            at = source + v * LANES * BYTES[cfg.dtype]
            if count >= LANES:
                store(F32, target + v * LANES * 4, load(cfg.dtype, at))
            else:
                store(F32, target + v * LANES * 4, load_head(cfg.dtype, at, max(count, 0)))


@part
def multiply_block(cfg: Any, vectors: int, tiles: int, packed: int, tokens: int, tree: int) -> None:
    """The products of a group of rows with a block of tokens, at the last levels of its tiles' trees.

    Lanes come in the order of their reversed bits, 0, 8, 4, 12, …, so that whatever a tree adds comes one behind the
    other: a level holds a tile until its neighbour is there. What is packed for a lane serves all tiles of the block
    while it is in the first cache.
    """
    for number in range(LANES):
        lane, bits = 0, number
        for _ in range(LEVELS):
            lane, bits = lane * 2 + bits % 2, bits // 2
        w, x = packed + lane * vectors * GROUP * 4, tokens + lane * vectors * LANES * 4
        for i in range(tiles):
            multiply_tile(cfg, vectors, number, w, x + i * TOKENS * 4, tree + i * TREE_BYTES)


@part
def multiply_tile(cfg: Any, vectors: int, number: int, w: int, x: int, tree: int) -> None:
    """One lane's sums of a register tile, added to those that the tree holds for its neighbours."""
    sums, weights = tile(TILE), tile(VECTORS)
    for j in range(TILE):
        sums[j] = splat(np.float32(0.0))
    for _ in range(vectors):
        for v in range(VECTORS):
            weights[v] = load(F32, w + v * LANES * 4)
        for t in range(TOKENS):
            token = load_pair(x + t * 4) if cfg.pairs else splat(load_f32(x + t * 4))
            for v in range(VECTORS):
                sums[t * VECTORS + v] = add_product(cfg, weights[v], token, sums[t * VECTORS + v])
        w += GROUP * 4
        x += LANES * 4
    at, bits = tree, number
    while bits % 2:
        for j in range(TILE):
            sums[j] = add(load(F32, at + j * LANES * 4), sums[j])
        at += TILE * LANES * 4
        bits //= 2
    for j in range(TILE):
        store(F32, at + j * LANES * 4, sums[j])


@part
def finish_tile(cfg: Any, panels: Panels, row: int, first: int, sums: int) -> None:
    """Add the bias and write the tile's sums into out."""
    for t in range(min(TOKENS, panels.num_tokens - first)):
        for v in range(VECTORS):
            offset = (row + v * LANES) * BYTES[cfg.dtype]
            count = min(panels.num_rows - row - v * LANES, LANES)
            total, out = (
                load(F32, sums + (t * VECTORS + v) * LANES * 4),
                panels.out + (first + t) * panels.out_token,
            )
            if count == LANES:
                if panels.bias:
                    total = add(total, load(cfg.dtype, panels.bias + offset))
                store(cfg.dtype, out + offset, total)
            elif count > 0:
                if panels.bias:
                    total = add(total, load_head(cfg.dtype, panels.bias + offset, count))
                store_head(cfg.dtype, out + offset, total, count)
