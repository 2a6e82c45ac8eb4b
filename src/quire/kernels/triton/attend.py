"""The attention kernel: persistent workers, each walking its share of the plan's tiles.

Decode and prefill are two launches of it, each with its own tile shape: a decode tile holds the few query rows
of one KV head, a prefill tile as many tokens of a sequence as fill the matrix units, all query heads of the KV
head packed together (GQA). A tile that the plan split between workers leaves partial states, and the last worker
to finish its part folds them: no second launch, no host in between.

Sources: PagedAttention, arXiv:2309.06180 §4.1; Stream-K, arXiv:2301.03598; GQA packing, FlashAttention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.merge import arrived_last, fold_parts, leave_partial, write_rows
from quire.kernels.triton.tile import NO_SCORE, attend_keys, value_unit

# Numbers that change from step to step: compiled code must not depend on them.
PER_STEP = ["table_row", "window_left", "mask_token", "mask_columns"]


@triton.jit(do_not_specialize=PER_STEP)
def attend(
    q, k, v, out, lse, k_scale, v_scale, alibi_slopes, sinks, tree_mask,
    items, worker_indptr, parts, arrivals, cu_seqlens_q, page_table, partial_out, partial_lse,
    softmax_scale, softcap, table_row, window_left, mask_token, mask_columns,
    q_token, q_head, out_token, out_head, lse_token,
    k_head, k_page, k_slot, v_head, v_page, v_slot, scale_head, scale_page, scale_slot,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FORMAT: tl.constexpr,
    PHASES: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attend this worker's items; their columns are ``work.ITEM_COLUMNS``.

    With two PHASES, the keys that every row of a tile sees are walked first and without a mask.
    """
    worker = tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    for item in range(tl.load(worker_indptr + worker), tl.load(worker_indptr + worker + 1)):
        entry = items + item * 8
        sequence, kv_head = tl.load(entry), tl.load(entry + 1).to(tl.int64)
        q_begin, q_len, q_position = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
        begin, end, partial = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)

        token = q_begin + row // GROUP
        head = kv_head * GROUP + row % GROUP
        valid = row < q_len * GROUP
        at = q + (token.to(tl.int64) * q_token + head * q_head)[:, None] + dim[None, :]
        queries = tl.load(at, mask=valid[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        position = q_position + row // GROUP
        slopes = None
        if alibi_slopes is not None:
            slopes = tl.load(alibi_slopes + head, mask=valid, other=0.0)
        mask_row, first_new = None, 0
        unmasked = tl.minimum(q_position + 1, end) if CAUSAL else end
        if tree_mask is not None:
            mask_row = tree_mask + tl.where(valid, token, q_begin).to(tl.int64) * mask_token
            first_new = q_position - (q_begin - tl.load(cu_seqlens_q + sequence))
            unmasked = tl.minimum(unmasked, first_new)

        table = page_table + sequence.to(tl.int64) * table_row
        k_here, v_here = k + kv_head * k_head, v + kv_head * v_head
        k_scale_here, v_scale_here = None, None
        if FORMAT != "same":
            k_scale_here, v_scale_here = k_scale + kv_head * scale_head, v_scale + kv_head * scale_head

        m = tl.full([BLOCK_M], NO_SCORE, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        split = begin
        if PHASES == 2:
            split = begin + tl.maximum(unmasked - begin, 0) // BLOCK_N * BLOCK_N
            m, l, acc = attend_keys(
                m, l, acc, queries, position, slopes, mask_row, first_new, mask_columns,
                begin, split, end, table, k_here, v_here, k_scale_here, v_scale_here,
                k_page, k_slot, v_page, v_slot, scale_page, scale_slot, softmax_scale, softcap, window_left,
                HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, False, CAUSAL, WINDOW, SOFTCAP, FORMAT, PRECISION, NUM_STAGES,
            )  # fmt: skip
        m, l, acc = attend_keys(
            m, l, acc, queries, position, slopes, mask_row, first_new, mask_columns,
            split, end, end, table, k_here, v_here, k_scale_here, v_scale_here,
            k_page, k_slot, v_page, v_slot, scale_page, scale_slot, softmax_scale, softcap, window_left,
            HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOW, SOFTCAP, FORMAT, PRECISION, NUM_STAGES,
        )  # fmt: skip
        if FORMAT != "same":
            acc = acc * value_unit(FORMAT, queries.dtype)

        if partial < 0:
            write_rows(
                m, l, acc, out, lse, sinks, token, head, valid,
                out_token, out_head, lse_token, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
        else:
            leave_partial(m, l, acc, partial, partial_out, partial_lse, valid, BLOCK_M, BLOCK_D)
            last, first, count = arrived_last(partial, parts, arrivals)
            if last:
                m, l, acc = fold_parts(first, count, partial_out, partial_lse, valid, BLOCK_M, BLOCK_D, 2)
                write_rows(
                    m, l, acc, out, lse, sinks, token, head, valid,
                    out_token, out_head, lse_token, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
