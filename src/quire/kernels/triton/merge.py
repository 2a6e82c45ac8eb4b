"""Finish a tile: write its rows, or, if it is split, leave a partial state. The last worker to finish folds them all.

Over the parts i of a row, each normalised over its own keys, in base 2:

    M = max_i lse_i,   w_i = 2^(lse_i − M),   l = Σ w_i,   out = Σ w_i · out_i / l

folded online, always in the order of the parts, so that results do not depend on which worker folds.

Sources: FlashDecoding; arXiv:2501.01005 §2.2; the fix-up of Stream-K, arXiv:2301.03598.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.tile import LOG2_E, NO_SCORE

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def normalise(m, l, acc):
    """(m, l, acc) as an output and its base-2 lse; an empty row, whose l is 0, gives 0 and −inf."""
    empty = l == 0.0
    total = tl.where(empty, 1.0, l)
    return tl.where(empty[:, None], 0.0, acc / total[:, None]), tl.where(empty, NO_SCORE, m + tl.log2(total))


@triton.jit
def add_sink(m, l, acc, sink):
    """A logit that takes part in the softmax and has no value: an empty row is left with it alone."""
    sink = sink * LOG2_E
    highest = tl.maximum(m, sink)
    shift = tl.where(highest == NO_SCORE, 0.0, highest)  # a sink may be −inf, which is none
    correction = tl.exp2(m - shift)
    return highest, tl.fma(l, correction, tl.exp2(sink - shift)), acc * correction[:, None]


@triton.jit
def write_rows(
    m, l, acc, out, lse, sinks, token, head, valid,
    out_token, out_head, lse_token, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The finished rows, each to its token and head."""
    result, base_2 = normalise(m, l, acc)
    natural = base_2 * LN_2
    if sinks is not None:
        empty = base_2 == NO_SCORE
        sink = tl.load(sinks + head, mask=valid, other=0.0)
        # The sink is added to the normalised row, as a row folded from parts is one: both get the same bits.
        m, l, acc = add_sink(base_2, tl.where(empty, 0.0, 1.0), result, sink)
        result, base_2 = normalise(m, l, acc)
        # An empty row's lse is its sink to the bit, without the way through base 2, which rounds.
        natural = tl.where(empty, sink, base_2 * LN_2)
    dim = tl.arange(0, BLOCK_D)
    at = out + (token.to(tl.int64) * out_token + head * out_head)[:, None] + dim[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=valid[:, None] & (dim < HEAD_DIM)[None, :])
    if lse is not None:
        tl.store(lse + token.to(tl.int64) * lse_token + head, natural, mask=valid)


@triton.jit
def leave_partial(
    m, l, acc, partial, partial_out, partial_lse, valid,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This worker's part of a split tile, in float32."""
    row = partial * BLOCK_M + tl.arange(0, BLOCK_M)
    result, base_2 = normalise(m, l, acc)
    at = partial_out + row.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(at, result, mask=valid[:, None])
    tl.store(partial_lse + row, base_2, mask=valid)


@triton.jit
def arrived_last(first, count, arrivals):
    """Count a finished part of a tile. True for the last one, which also resets the count for the next layer."""
    tl.debug_barrier()  # one thread releases, so all threads' stores must come before
    before = tl.atomic_add(arrivals + first, 1, sem="acq_rel", scope="gpu")
    last = before == count - 1
    if last:
        tl.store(arrivals + first, 0)
    return last


@triton.jit
def fold_parts(
    first, count, row, valid, partial_out, partial_lse,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, FOLD_ROWS: tl.constexpr, FOLD_PARTS: tl.constexpr,
):  # fmt: skip
    """All parts of some rows of a tile as one (m, l, acc), FOLD_PARTS at a time.

    Loads bypass the L1 cache, which does not see what other multiprocessors write.
    """
    dim = tl.arange(0, BLOCK_D)
    m = tl.full([FOLD_ROWS], NO_SCORE, tl.float32)
    l = tl.zeros([FOLD_ROWS], tl.float32)
    acc = tl.zeros([FOLD_ROWS, BLOCK_D], tl.float32)
    for start in range(first, first + count, FOLD_PARTS):
        part = start + tl.arange(0, FOLD_PARTS)
        inside = (part < first + count)[:, None] & valid[None, :]
        at = part.to(tl.int64)[:, None] * BLOCK_M + row[None, :]
        base_2 = tl.load(partial_lse + at, mask=inside, other=NO_SCORE, cache_modifier=".cg")
        result = tl.load(
            partial_out + (at * BLOCK_D)[:, :, None] + dim[None, None, :],
            mask=inside[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        highest = tl.maximum(m, tl.max(base_2, 0))
        shift = tl.where(highest == NO_SCORE, 0.0, highest)
        correction = tl.exp2(m - shift)
        weight = tl.exp2(base_2 - shift[None, :])
        l = tl.fma(l, correction, tl.sum(weight, 0))
        acc = tl.fma(acc, correction[:, None], tl.sum(result * weight[:, :, None], 0))
        m = highest
    return m, l, acc
