"""The host plan: lengths and page tables become index lists and equal shares of work.

One step's attention is a set of *tiles*: a run of query tokens of one sequence, with all query heads of
one KV head packed together (GQA), against the KV range they may see. Tiles are laid end to end on a line
measured in work; the line is cut into ``num_workers`` equal shares, and a tile that straddles a cut is split
along its KV range (FlashDecoding's split, placed the Stream-K way: at most ``num_workers − 1`` splits in all,
whatever the lengths). Split tiles leave partial softmax states, which ``merges`` says how to fold.

Everything here is NumPy over whole batches: no Python loop over sequences, heads or pages.

Sources: PagedAttention, arXiv:2309.06180 §4; FlashDecoding (KV split); Stream-K, arXiv:2301.03598.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.work import ITEM_COLUMNS, MERGE_COLUMNS, Ints, StepPlan, TileShape, Tiling, WorkList

# What loading the queries and writing the result of an item costs, in KV tokens; it keeps a share of many
# short sequences from being taken for a cheap one.
ITEM_OVERHEAD = 16


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
    Cost: a few dozen NumPy calls over (sequences × kv heads) elements.
    """
    q_lens = np.diff(cu_seqlens_q)
    is_decode = q_lens <= tiling.decode_max_q_len

    def work(selected: NDArray[np.bool_], tile: TileShape) -> WorkList:
        chosen = np.flatnonzero(selected & (q_lens > 0))
        tiles = _cut_queries(chosen, seq_lens, cu_seqlens_q, tile.q_tokens, num_kv_heads, causal, window_left)
        return _share(tiles, tile, tiling.num_workers)

    return StepPlan(
        page_table=page_table,
        seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        page_size=page_size,
        causal=causal,
        window_left=window_left,
        decode=work(is_decode, tiling.decode),
        prefill=work(~is_decode, tiling.prefill),
    )


def _cut_queries(
    chosen: Ints,
    seq_lens: Ints,
    cu_seqlens_q: Ints,
    q_tokens: int,
    num_kv_heads: int,
    causal: bool,
    window_left: int,
) -> Ints:
    """Tiles [n, 7] of the chosen sequences (ITEM_COLUMNS without the last), ordered by sequence, head, query.

    Query j of sequence i stands at position ``seq_lens[i] − q_lens[i] + j``; a tile's KV range is the union of
    what its queries see: ``[first − window_left, last]`` when causal, up to the end of the sequence otherwise.
    """
    q_lens = np.diff(cu_seqlens_q)[chosen]
    tiles_per_head = -(-q_lens // q_tokens)
    tiles_per_sequence = tiles_per_head * num_kv_heads
    owner = np.repeat(np.arange(len(chosen)), tiles_per_sequence)
    ordinal = np.arange(len(owner)) - np.repeat(
        np.cumsum(tiles_per_sequence) - tiles_per_sequence, tiles_per_sequence
    )

    kv_head, tile = np.divmod(ordinal, tiles_per_head[owner])
    first = tile * q_tokens
    q_len = np.minimum(q_tokens, q_lens[owner] - first)
    sequence = chosen[owner]
    seq_len = seq_lens[sequence]
    q_position = seq_len - q_lens[owner] + first
    kv_end = np.maximum(q_position + q_len, 0) if causal else seq_len
    kv_begin = np.maximum(q_position - window_left, 0) if window_left >= 0 else np.zeros_like(kv_end)
    kv_begin = np.minimum(kv_begin, kv_end)
    return np.stack(
        [sequence, kv_head, cu_seqlens_q[sequence] + first, q_len, q_position, kv_begin, kv_end], axis=1
    )


def _share(tiles: Ints, shape: TileShape, num_workers: int) -> WorkList:
    """Lay the tiles on a line of work and cut it into equal shares.

    A tile of q queries against n KV tokens weighs ``q × (n + ITEM_OVERHEAD)``. Cuts fall between grains of
    ``shape.kv_tokens``; one that would leave a sliver below two grains moves to the nearer end of its tile.
    """
    if not len(tiles):
        nothing = np.zeros((0, len(ITEM_COLUMNS)), np.int64)
        return WorkList(
            nothing, np.zeros(num_workers + 1, np.int64), np.zeros((0, len(MERGE_COLUMNS)), np.int64), 0
        )
    q_len, kv_len = tiles[:, 3], tiles[:, 6] - tiles[:, 5]
    weight = q_len * (kv_len + ITEM_OVERHEAD)
    end = np.cumsum(weight)
    start = end - weight

    ideal_cuts = end[-1] * np.arange(1, num_workers) // num_workers
    cut_tile = np.searchsorted(end, ideal_cuts, side="right")
    cut_kv = (ideal_cuts - start[cut_tile]) // (q_len[cut_tile] * shape.kv_tokens) * shape.kv_tokens
    rest = kv_len[cut_tile] - cut_kv
    sliver = np.minimum(cut_kv, rest) < 2 * shape.kv_tokens
    nearer_end = np.where(cut_kv < rest, 0, kv_len[cut_tile] + ITEM_OVERHEAD)
    cut_kv = np.where(sliver, nearer_end, cut_kv)

    # An item begins wherever a tile begins or a cut falls; a cut at a tile's end is the next tile's beginning.
    cuts = start[cut_tile] + cut_kv * q_len[cut_tile]
    item_start = np.union1d(start, cuts[cuts < end[-1]])
    tile_of = np.searchsorted(start, item_start, side="right") - 1
    skipped_kv = (item_start - start[tile_of]) // q_len[tile_of]
    opens = np.diff(tile_of, prepend=-1) != 0  # first item of its tile
    closes = np.append(opens[1:], True)
    is_split = ~(opens & closes)

    items = np.empty((len(item_start), len(ITEM_COLUMNS)), np.int64)
    items[:, :7] = tiles[tile_of]
    items[:, 5] += skipped_kv
    items[:, 6] = np.where(closes, items[:, 6], np.append(items[1:, 5], 0))
    items[:, 7] = np.where(is_split, np.cumsum(is_split) - 1, -1)

    first = np.flatnonzero(is_split & opens)
    last = np.flatnonzero(is_split & closes)
    merges = np.column_stack([items[first][:, [1, 2, 3]], items[first, 7], last - first + 1])
    bounds = np.concatenate([[0], cuts, end[-1:]])
    worker_indptr = np.searchsorted(item_start, bounds).astype(np.int64)
    return WorkList(items, worker_indptr, np.ascontiguousarray(merges), int(is_split.sum()))
