"""The consumers, and the kernel that puts them beside the loaders.

Blocks run from the last to the first, so that the few which need a mask come first. Matrix products are asynchronous.
That for a block's scores is issued before that with the previous block's values, and the softmax runs beside the latter:

    S_j = Q K_jᵀ            issued
    O += P_{j+1} V_{j+1}    issued
    m, P_j, l from S_j      as soon as S_j is there
    O *= 2^(m_old − m)      when the product is

Source: FlashAttention-3, arXiv:2407.08608 §3.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quire.kernels.triton.hopper.finish import finish_tile
from quire.kernels.triton.hopper.geometry import (
    BLOCK_M,
    HALF,
    advance,
    count_blocks,
    load_reach,
    load_target,
    visible,
)
from quire.kernels.triton.hopper.load import load_keys, load_values


@gluon.jit
def mask_scores(s, block, row_limit, kv_end, BOX: gl.constexpr, BLOCK_N: gl.constexpr):
    """−inf where a row may not see a column's key; row_limit is the last it may."""
    seen = visible(block, row_limit, kv_end, BOX, BLOCK_N, gl.SliceLayout(0, s.type.layout))
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def halves(x):
    """The left and the right half of a tile's columns, which lie in different registers: nothing moves."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    return x.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()


@gluon.jit
def fold_columns(x, MAXIMUM: gl.constexpr):
    """[rows, 16] maxima or sums of a tile's columns, as a tree: in a chain of 32 each would wait for the one before."""
    if x.shape[1] > 16:
        left, right = halves(x)
        return fold_columns(gl.maximum(left, right) if MAXIMUM else left + right, MAXIMUM)
    else:
        return x


@gluon.jit
def softmax_step(s, m, l, scale_log2, MASKED: gl.constexpr):
    """Online softmax over one block of scores: p, the new m and l, and the factor for earlier sums.

    l is kept as [rows, 16] partial sums: only the end needs the whole.
    """
    ROWS: gl.constexpr = m.type.layout
    m_new = gl.maximum(m, gl.convert_layout(gl.max(fold_columns(s, True), 1), ROWS))
    m_used = gl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    shift = m_used * scale_log2
    alpha = gl.exp2(m * scale_log2 - shift)
    p = gl.exp2(s * scale_log2 - shift[:, None])
    return (
        p,
        m_new,
        l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None] + fold_columns(p, False),
        alpha,
    )


@gluon.jit
def attend_block(q, keys, values, stage, phase, v_stage, v_phase, has_next,
                 p, m, l, o, block, row_limit, kv_end, scale_log2,
                 BOX: gl.constexpr, HALF_INDEX: gl.constexpr, MASKED: gl.constexpr,):  # fmt: skip
    """Scores and softmax of one block, while the values of the block before it are added to o."""
    k_tiles, k_full, k_free = keys
    v_tiles, v_full, v_free = values
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([HALF, BLOCK_N], gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    product = warpgroup_mma(p, v_tiles.index(v_stage), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=(scores,))
    if MASKED:
        s = mask_scores(s, block, row_limit, kv_end, BOX, BLOCK_N)
    weights, m, l, alpha = softmax_step(s, m, l, scale_log2, MASKED)
    # This wait for the next block's keys stands here because it is a loop: the compiler moves no code across it, and so
    # does not move the exponentials behind the wait for the product.
    next_stage, next_phase = advance(stage, phase, k_tiles.shape[0])
    mbarrier.wait(k_full.index(next_stage), next_phase, pred=has_next)
    o, weights = warpgroup_mma_wait(0, deps=(product, weights))
    mbarrier.arrive(k_free.index(stage), count=1)
    mbarrier.arrive(v_free.index(v_stage), count=1)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o.type.layout))[:, None]
    # p is packed no earlier, as the product reads its registers until it is done. The second wait keeps it here.
    p = warpgroup_mma_wait(0, deps=(gl.convert_layout(weights.to(p.dtype), p.type.layout),))
    return next_stage, next_phase, p, m, l, o


@gluon.jit
def consume(queries, keys, values, items, first, last, results, scale_log2,
            HALF_INDEX: gl.constexpr, GROUP: gl.constexpr, GROUP_ROWS: gl.constexpr, BOX: gl.constexpr,
            CAUSAL: gl.constexpr,):  # fmt: skip
    """One consumer warpgroup: its 64 rows of every item."""
    q_tile, q_full, q_free = queries
    k_tiles, k_full, k_free = keys
    v_tiles, v_full, v_free = values
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q = q_tile.index(HALF_INDEX)
    row_token = (HALF_INDEX * HALF + gl.arange(0, HALF, ROWS)) // GROUP_ROWS
    stage = 0
    phase = 0
    q_phase = 0
    q_position, kv_begin, kv_end = load_reach(items, first)
    for i in range(first, last):
        blocks = count_blocks(kv_begin, kv_end, BLOCK_N)
        if CAUSAL:
            row_limit = gl.minimum(q_position + row_token, kv_end - 1)
            seen_by_all = gl.minimum(q_position + 1, kv_end)
        else:
            row_limit = row_token * 0 + (kv_end - 1)
            seen_by_all = kv_end
        unmasked = gl.maximum(seen_by_all - kv_begin, 0) // BLOCK_N

        # The last block's scores. Its values are added in the next round.
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(stage), phase)
        zero = gl.zeros([HALF, BLOCK_N], gl.float32, S_LAYOUT)
        scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_free.index(stage), count=1)
        last_block = kv_begin + (blocks - 1) * BLOCK_N
        s = mask_scores(s, last_block, row_limit, kv_end, BOX, BLOCK_N)
        m = gl.full([HALF], float("-inf"), gl.float32, ROWS)
        l = fold_columns(gl.zeros([HALF, BLOCK_N], gl.float32, S_LAYOUT), False)
        weights, m, l, alpha = softmax_step(s, m, l, scale_log2, True)
        p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        o = gl.zeros([HALF, D], gl.float32, O_LAYOUT)
        v_stage = stage
        v_phase = phase
        stage, phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_full.index(stage), phase, pred=blocks > 1)

        for unmasked_part in gl.static_range(2):
            if unmasked_part:
                begin = gl.maximum(blocks - unmasked, 1)
                end = blocks
            else:
                begin = 1
                end = gl.maximum(blocks - unmasked, 1)
            for j in range(begin, end):
                this_stage = stage
                this_phase = phase
                stage, phase, p, m, l, o = attend_block(
                    q, keys, values, stage, phase, v_stage, v_phase, j + 1 < blocks,
                    p, m, l, o, last_block - j * BLOCK_N, row_limit, kv_end, scale_log2,
                    BOX, HALF_INDEX, unmasked_part == 0,
                )  # fmt: skip
                v_stage = this_stage
                v_phase = this_phase

        # The first block's values. The next item is loaded meanwhile.
        mbarrier.arrive(q_free, count=1)
        target = load_target(items, i)
        q_position, kv_begin, kv_end = load_reach(items, gl.minimum(i + 1, last - 1))
        mbarrier.wait(v_full.index(v_stage), v_phase)
        product = warpgroup_mma(p, v_tiles.index(v_stage), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(v_free.index(v_stage), count=1)
        l = gl.convert_layout(gl.sum(l, 1), ROWS)
        finish_tile(target, results, m, l, o, scale_log2, HALF_INDEX, GROUP)
    tma.store_wait(0)


@gluon.jit
def allocate_ring(dtype: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Tiles in shared memory, each with a barrier for "full" (its bytes landed) and "free" (both warpgroups read it)."""
    tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    return tiles, full, free


@gluon.jit(do_not_specialize=["table_row"])
def hopper_prefill(
    q_descriptor, k_descriptor, v_descriptor, o_descriptor,
    out, lse, items, worker_indptr, arrivals, page_table, partial_out, partial_lse, scale_log2, table_row,
    out_token, out_head, lse_token,
    GROUP: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One worker's items; a program per worker."""
    D: gl.constexpr = q_descriptor.block_shape[3]
    GROUP_ROWS: gl.constexpr = q_descriptor.block_shape[2]
    BOX: gl.constexpr = k_descriptor.block_shape[2]
    worker = gl.program_id(0)
    first = gl.load(worker_indptr + worker)
    last = gl.load(worker_indptr + worker + 1)
    q_tile = gl.allocate_shared_memory(
        q_descriptor.dtype, [BLOCK_M // HALF, HALF, D], gl.NVMMASharedLayout(128, 16, 2)
    )
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    queries = (q_tile, q_full, q_free)
    keys = allocate_ring(k_descriptor.dtype, STAGES, BLOCK_N, D)
    values = allocate_ring(v_descriptor.dtype, STAGES, BLOCK_N, D)
    fence_async_shared()
    o_tile = gl.allocate_shared_memory(
        out.dtype.element_ty, [BLOCK_M // HALF, HALF, D], gl.NVMMASharedLayout(128, 16, 2)
    )
    results = (
        out, lse, partial_out, partial_lse, arrivals, out_token, out_head, lse_token, o_descriptor, o_tile,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (
                queries, keys, values, items, first, last, results, scale_log2, 0, GROUP, GROUP_ROWS, BOX, CAUSAL,
            )),
            (consume, (
                queries, keys, values, items, first, last, results, scale_log2, 1, GROUP, GROUP_ROWS, BOX, CAUSAL,
            )),
            (load_keys, (
                q_descriptor, k_descriptor, queries, keys, items, first, last, page_table, table_row, PAGE,
            )),
            (load_values, (v_descriptor, values, items, first, last, page_table, table_row, PAGE)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
