"""Finish a warpgroup's rows of a tile: ``merge`` in Gluon, with the group's padding taken out.

Each of the two warpgroups counts its own arrivals: a split tile has at least two parts, so at least two counters.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from quire.kernels.triton.hopper.geometry import BLOCK_M, HALF

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6, 3.7

FOLD_ROWS: gl.constexpr = gl.constexpr(16)  # of partial states that a warpgroup folds at a time
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def locate_rows(row, q_begin, q_len, kv_head, GROUP: gl.constexpr, GROUP_ROWS: gl.constexpr):
    """A tile's rows: their packed tokens and query heads, which rows exist, and their numbers without the padding."""
    token = row // GROUP_ROWS
    head = row % GROUP_ROWS
    exists = (token < q_len) & (head < GROUP)
    return q_begin + token, kv_head * GROUP + head, exists, token * GROUP + head


@gluon.jit
def write_lse(base_2, token, head, exists, results):
    """The lse of finished rows, if it is asked for."""
    out, lse, partial_out, partial_lse, arrivals, out_token, out_head, lse_token, o_descriptor, o_tile = (
        results
    )
    if lse is not None:
        gl.store(lse + token.to(gl.int64) * lse_token + head, base_2 * LN_2, mask=exists)


@gluon.jit
def write_rows(o, base_2, token, head, exists, column, results):
    """Finished rows, each to its token and head."""
    out, lse, partial_out, partial_lse, arrivals, out_token, out_head, lse_token, o_descriptor, o_tile = (
        results
    )
    at = token.to(gl.int64) * out_token + head * out_head
    gl.store(out + at[:, None] + column[None, :], o.to(out.dtype.element_ty), mask=exists[:, None])
    write_lse(base_2, token, head, exists, results)


@gluon.jit
def arrived_last(counter, num_parts):
    """Count a finished part of a tile. True for the last one, which also resets the count for the next layer."""
    thread_barrier()  # one thread releases, so all threads' stores must come before
    before = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = before == num_parts - 1
    if last:
        gl.store(counter, 0)
    return last


@gluon.jit
def fold_parts(
    first_partial, num_parts, place, exists, column, results, LAYOUT: gl.constexpr, D: gl.constexpr
):
    """All parts of some rows as one output and base-2 lse, in the order of the parts.

    Loads bypass the L1 cache, which does not see what other multiprocessors write.
    """
    out, lse, partial_out, partial_lse, arrivals, out_token, out_head, lse_token, o_descriptor, o_tile = (
        results
    )
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    m = gl.full([FOLD_ROWS], float("-inf"), gl.float32, ROWS)
    l = gl.zeros([FOLD_ROWS], gl.float32, ROWS)
    o = gl.zeros([FOLD_ROWS, D], gl.float32, LAYOUT)
    for part in range(first_partial, first_partial + num_parts):
        at = part.to(gl.int64) * BLOCK_M + place
        base_2 = gl.load(partial_lse + at, mask=exists, other=float("-inf"), cache_modifier=".cg")
        element = at[:, None] * D + column[None, :]
        result = gl.load(partial_out + element, mask=exists[:, None], other=0.0, cache_modifier=".cg")
        highest = gl.maximum(m, base_2)
        shift = gl.where(highest == float("-inf"), 0.0, highest)
        correction = gl.exp2(m - shift)
        weight = gl.exp2(base_2 - shift)
        l = l * correction + weight
        o = o * correction[:, None] + result * weight[:, None]
        m = highest
    return o * gl.where(l > 0, 1.0 / l, 0.0)[:, None], m + gl.log2(l)


@gluon.jit
def fold_tile(target, results, HALF_INDEX: gl.constexpr, GROUP: gl.constexpr, GROUP_ROWS: gl.constexpr,
              D: gl.constexpr):  # fmt: skip
    """Fold and write a warpgroup's rows of a split tile, a few at a time."""
    kv_head, q_begin, q_len, partial, first_partial, num_parts = target
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    for first_row in range(HALF_INDEX * HALF, HALF_INDEX * HALF + HALF, FOLD_ROWS):
        row = first_row + gl.arange(0, FOLD_ROWS, gl.SliceLayout(1, LAYOUT))
        token, head, exists, place = locate_rows(row, q_begin, q_len, kv_head, GROUP, GROUP_ROWS)
        o, base_2 = fold_parts(first_partial, num_parts, place, exists, column, results, LAYOUT, D)
        write_rows(o, base_2, token, head, exists, column, results)


@gluon.jit
def send_rows(o, o_descriptor, rows, token, kv_head):
    """A warpgroup's rows, all of which exist: to shared memory, and from there by an asynchronous copy."""
    tma.store_wait(0)
    thread_barrier()
    rows.store(o.to(rows.dtype))
    fence_async_shared()
    box = rows._reinterpret(rows.dtype, o_descriptor.block_shape, o_descriptor.layout)
    tma.async_copy_shared_to_global(o_descriptor, [token, kv_head, 0, 0], box)


@gluon.jit
def finish_tile(target, results, m, l, o, scale_log2, HALF_INDEX: gl.constexpr, GROUP: gl.constexpr):
    """Write a warpgroup's rows of a tile, or, if it is split, leave a partial state; the last to finish folds them."""
    out, lse, partial_out, partial_lse, arrivals, out_token, out_head, lse_token, o_descriptor, o_tile = (
        results
    )
    kv_head, q_begin, q_len, partial, first_partial, num_parts = target
    TOKENS: gl.constexpr = o_descriptor.block_shape[0]
    GROUP_ROWS: gl.constexpr = o_descriptor.block_shape[2]
    D: gl.constexpr = o_descriptor.block_shape[3]
    ROWS: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    # An explicit fma: whether the compiler fuses by itself depends on the code around it, such as the write of lse.
    base_2 = gl.convert_layout(gl.fma(m, scale_log2, gl.log2(l)), ROWS)
    o = o * gl.convert_layout(gl.where(l > 0, 1.0 / l, 0.0), ROWS)[:, None]
    row = HALF_INDEX * HALF + gl.arange(0, HALF, ROWS)
    token, head, exists, place = locate_rows(row, q_begin, q_len, kv_head, GROUP, GROUP_ROWS)
    column = gl.arange(0, D, gl.SliceLayout(0, o.type.layout))
    if num_parts == 1:
        if q_len >= (HALF_INDEX + 1) * TOKENS:
            send_rows(o, o_descriptor, o_tile.index(HALF_INDEX), q_begin + HALF_INDEX * TOKENS, kv_head)
            write_lse(base_2, token, head, exists, results)
        else:
            write_rows(o, base_2, token, head, exists, column, results)
    else:
        at = partial.to(gl.int64) * BLOCK_M + place
        gl.store(partial_out + at[:, None] * D + column[None, :], o, mask=exists[:, None])
        gl.store(partial_lse + at, base_2, mask=exists)
        if arrived_last(arrivals + first_partial + HALF_INDEX, num_parts):
            fold_tile(target, results, HALF_INDEX, GROUP, GROUP_ROWS, D)
