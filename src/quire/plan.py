"""The host plan: lengths and page tables become index lists and equal shares of work.

One step's attention is a set of *tiles*: a run of query tokens of one sequence, with all query heads of
one KV head packed together (GQA), against the KV range they may see. Tiles are laid end to end on a line
measured in work; the line is cut into ``num_workers`` equal shares, and a tile that straddles a cut is split
along its KV range (FlashDecoding's split, placed the Stream-K way: at most ``num_workers − 1`` splits in all,
whatever the lengths). Split tiles leave partial softmax states, which ``merges`` says how to fold.
A batch-invariant step (``Tiling.kv_split``) is split at fixed keys instead, and shares are runs of whole parts.

``cut`` does the arithmetic, compiled; the index lists of pages (``work.StepPlan``) are NumPy over whole batches.

Sources: PagedAttention, arXiv:2309.06180 §4; FlashDecoding (KV split); Stream-K, arXiv:2301.03598.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.work import Ints, StepPlan, TileShape, Tiling, WorkBound, WorkList


def plan_step(
    page_table: NDArray[np.int32],
    seq_lens: Ints,
    cu_seqlens_q: Ints,
    *,
    num_kv_heads: int,
    page_size: int,
    causal: bool,
    window_left: int,
    tiling: Tiling,
) -> StepPlan:
    """Cut one step into one equal share per worker and kernel.

    Args:
        page_table, seq_lens, cu_seqlens_q: the step, on the host, already checked.
        window_left: keys further back than this many positions are out of sight; −1 for no window.
        tiling: how the backend wants it cut.
    Cost: a microsecond per hundred items; the first plan of a process loads Numba.
    """
    decode, prefill, max_q_len = _arithmetic()(
        seq_lens, cu_seqlens_q, tiling.decode_max_q_len, *tiling.decode, *tiling.prefill, tiling.kv_split,
        tiling.whole_tiles, num_kv_heads, causal, window_left, tiling.num_workers,
    )  # fmt: skip
    many = WorkList(*prefill)
    if tiling.prefill_tile_cost and not tiling.kv_split and many.num_items:
        many = _dealt(seq_lens, cu_seqlens_q, num_kv_heads, causal, window_left, tiling) or many
    return StepPlan(
        page_table, seq_lens, cu_seqlens_q, page_size, causal, window_left,
        WorkList(*decode), many, tiling.kv_split, max_q_len,
    )  # fmt: skip


def largest_work(
    tiling: Tiling, num_kv_heads: int, max_batch: int, max_tokens: int, max_seq_len: int, max_q_len: int
) -> tuple[WorkBound, WorkBound]:
    """What decode and prefill of any step within these limits have at most."""
    few = tiling.decode_max_q_len
    short = max_batch * -(-min(max_q_len, few) // tiling.decode.q_tokens)
    long, q_tokens = min(max_batch, max_tokens // (few + 1)), tiling.prefill.q_tokens
    tiles = 0 if max_q_len <= few else min(long * -(-max_q_len // q_tokens), long + max_tokens // q_tokens)
    return (
        _largest(tiling.decode, tiling, short * num_kv_heads, max_seq_len),
        _largest(tiling.prefill, tiling, tiles * num_kv_heads, max_seq_len),
    )


def _largest(shape: TileShape, tiling: Tiling, tiles: int, max_seq_len: int) -> WorkBound:
    """For so many tiles, all as long as can be.

    A cut between shares splits at most one tile, and leaves at least two blocks on both sides. Where parts have
    workers of their own, there are no more parts than workers.
    """
    workers, kv_split = shape.num_workers or tiling.num_workers, tiling.kv_split
    if kv_split:
        parts = -(-max_seq_len // kv_split)
        return WorkBound(workers, tiles * parts, tiles * parts if parts > 1 else 0)
    cuts = min(workers - 1, tiles * max(0, max_seq_len // (2 * shape.kv_tokens) - 1))
    own = min(workers, tiles * -(-max_seq_len // shape.kv_tokens)) if shape.part_cost else 0
    return WorkBound(workers, max(tiles + cuts, own), max(cuts + min(cuts, tiles), own))


def _dealt(
    seq_lens: Ints, starts: Ints, num_kv_heads: int, causal: bool, window_left: int, tiling: Tiling
) -> WorkList | None:
    """Whole prefill tiles dealt out to the workers, or None where that would be uneven."""
    from quire.deal import deal_tiles

    tile = tiling.prefill
    items, worker_indptr, evenly = deal_tiles(
        seq_lens, starts, tiling.decode_max_q_len + 1, np.iinfo(np.int64).max, tile.q_tokens, tile.kv_tokens,
        tiling.prefill_tile_cost, num_kv_heads, causal, window_left, tile.num_workers or tiling.num_workers,
    )  # fmt: skip
    if not evenly:
        return None
    return WorkList(np.concatenate((items.ravel(), worker_indptr)), len(worker_indptr) - 1, len(items))


@functools.cache
def _arithmetic() -> Callable[..., Any]:
    # Imported late: `import quire` must stay light, and Numba is not.
    from quire.cut import share_step

    arithmetic: Callable[..., Any] = share_step
    return arithmetic
