"""What the loaders and the consumers must agree on: items, rings, and where keys lie in a block."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quire.kernels.triton.device_plan import COLUMNS

HALF: gl.constexpr = gl.constexpr(64)  # rows of one consumer warpgroup
BLOCK_M: gl.constexpr = gl.constexpr(128)  # rows of a tile
ITEM: gl.constexpr = gl.constexpr(COLUMNS)
# The places of device_plan.ITEM_COLUMNS.
SEQUENCE, KV_HEAD, Q_BEGIN, Q_LEN, Q_POSITION, KV_BEGIN, KV_END, PARTIAL, FIRST_PARTIAL, NUM_PARTS = map(
    gl.constexpr, range(COLUMNS)
)


@gluon.jit
def load_reach(items, i):
    """Item i's reach: the position of its first query, and where its keys begin and end."""
    item = items + i * ITEM
    return gl.load(item + Q_POSITION), gl.load(item + KV_BEGIN), gl.load(item + KV_END)


@gluon.jit
def load_source(items, i):
    """What item i reads: sequence, KV head, first query token."""
    item = items + i * ITEM
    return gl.load(item + SEQUENCE), gl.load(item + KV_HEAD), gl.load(item + Q_BEGIN)


@gluon.jit
def load_target(items, i):
    """Where item i's results go: KV head, first query token, tokens, partial, first partial, number of parts."""
    item = items + i * ITEM
    return (
        gl.load(item + KV_HEAD), gl.load(item + Q_BEGIN), gl.load(item + Q_LEN),
        gl.load(item + PARTIAL), gl.load(item + FIRST_PARTIAL), gl.load(item + NUM_PARTS),
    )  # fmt: skip


@gluon.jit
def count_blocks(kv_begin, kv_end, BLOCK_N: gl.constexpr):
    """Blocks of an item: at least one, so that an item without keys runs like any other, on zeros."""
    return gl.maximum((kv_end - kv_begin + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage; the phase flips when it comes round."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def box_token(key, kv_end, PAGE: gl.constexpr, BOX: gl.constexpr):
    """The token of its page at which the box for keys from ``key`` starts, so that no key behind kv_end is in it.

    Negative tokens lie outside the tensor and are filled with zeros. A box without keys is all zeros.
    """
    missing = gl.maximum(key + BOX - kv_end, 0)
    return gl.where(missing < BOX, key % PAGE - missing, -BOX)


@gluon.jit
def visible(block, row_limit, kv_end, BOX: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr):
    """[rows, BLOCK_N] which keys of the block that starts at key ``block`` each row may see, up to its row_limit.

    The counterpart of ``box_token``: column i holds key block + i, but in the last box ``short`` columns without keys
    come first.
    """
    column = gl.arange(0, BLOCK_N, COLUMNS)
    short = (BOX - kv_end % BOX) % BOX
    last_box = kv_end - kv_end % BOX - block
    near = column[None, :] <= gl.minimum(row_limit - block, last_box - 1)[:, None]
    in_last = (column[None, :] <= (row_limit - block + short)[:, None]) & (column >= last_box + short)[
        None, :
    ]
    return near | in_last
