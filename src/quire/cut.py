"""The plan's arithmetic: tiles laid on a line of work, and the line cut into equal shares. Compiled by Numba.

A tile of q query tokens against n KV tokens weighs ``q × (n + ITEM_OVERHEAD)``. Ideal cut w of W lies at w/W of the
whole weight. A cut inside a tile splits its KV range between blocks; one that would leave a sliver below two
blocks moves to the nearer end of the tile instead.

With ``kv_split`` every tile comes as parts between multiples of it, the same whatever else is in the batch, and
each cut moves to the nearer end of a part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.compiled import compiled

# What loading the queries and writing the result of an item costs, in KV tokens; it keeps a share of many
# short sequences from being taken for a cheap one.
ITEM_OVERHEAD = 16


@compiled
def visible_range(
    seq_len: int, q_position: int, q_len: int, causal: bool, window_left: int
) -> tuple[int, int]:
    """The union of what a tile's queries see: [first − window_left, last] when causal, else up to the end."""
    end = max(q_position + q_len, 0) if causal else seq_len
    begin = max(q_position - window_left, 0) if window_left >= 0 else 0
    return begin, end


@compiled
def part_end(begin: int, end: int, kv_split: int) -> int:
    """Where the part of a tile that starts at ``begin`` ends."""
    return min(end, (begin // kv_split + 1) * kv_split) if kv_split else end


@compiled
def count_parts(
    seq_lens: Any, starts: Any, least_q: int, most_q: int, q_tokens: int, kv_split: int, causal: bool,
    window_left: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Tiles of one KV head, their parts, and their weight."""
    tiles = parts = weight = 0
    for i in range(len(seq_lens)):
        q_len = starts[i + 1] - starts[i]
        if least_q <= q_len <= most_q:
            for first in range(0, q_len, q_tokens):
                rows = min(q_tokens, q_len - first)
                begin, end = visible_range(
                    seq_lens[i], seq_lens[i] - q_len + first, rows, causal, window_left
                )
                count = max(1, (end - 1) // kv_split - begin // kv_split + 1) if kv_split else 1
                tiles += 1
                parts += count
                weight += rows * (end - begin + count * ITEM_OVERHEAD)
    return tiles, parts, weight


@compiled
def share_work(
    seq_lens: Any, starts: Any, least_q: int, most_q: int, q_tokens: int, kv_tokens: int, kv_split: int,
    num_kv_heads: int, causal: bool, window_left: int, num_workers: int,
) -> tuple[Any, Any, Any, int]:  # fmt: skip
    """Items, worker_indptr, merges and the number of partials of ``work.WorkList``.

    Takes the sequences with least_q to most_q queries; ``starts`` is cu_seqlens_q.
    """
    tiles, parts, weight = count_parts(
        seq_lens, starts, least_q, most_q, q_tokens, kv_split, causal, window_left
    )
    total = weight * num_kv_heads
    items = np.empty((parts * num_kv_heads + num_workers, 8), np.int64)
    merges = np.empty((tiles * num_kv_heads if kv_split else num_workers, 5), np.int64)
    worker_indptr = np.zeros(num_workers + 1, np.int64)
    num_items = num_merges = num_partials = worker = line = 0
    for i in range(len(seq_lens)):
        q_len = starts[i + 1] - starts[i]
        if not least_q <= q_len <= most_q:
            continue
        for head in range(num_kv_heads):
            for first in range(0, q_len, q_tokens):
                rows = min(q_tokens, q_len - first)
                position = seq_lens[i] - q_len + first
                begin, end = visible_range(seq_lens[i], position, rows, causal, window_left)
                first_item, last = num_items, begin
                while last < end or num_items == first_item:
                    last = part_end(begin, end, kv_split)
                    line_end = line + rows * (last - begin + ITEM_OVERHEAD)
                    at_end = 0
                    while worker + 1 < num_workers and total * (worker + 1) // num_workers < line_end:
                        ahead = (total * (worker + 1) // num_workers - line) // rows
                        cut = max(begin, (begin + ahead) // kv_tokens * kv_tokens)
                        worker += 1
                        if not kv_split and min(cut - begin, last - cut) >= 2 * kv_tokens:
                            items[num_items] = (i, head, starts[i] + first, rows, position, begin, cut, -1)
                            num_items += 1
                            line += rows * (cut - begin)
                            begin = cut
                            worker_indptr[worker] = num_items
                        elif cut - begin < last - cut:
                            worker_indptr[worker] = num_items
                        else:
                            at_end += 1
                    items[num_items] = (i, head, starts[i] + first, rows, position, begin, last, -1)
                    num_items += 1
                    line, begin = line_end, last
                    worker_indptr[worker - at_end + 1 : worker + 1] = num_items
                if num_items - first_item > 1:
                    items[first_item:num_items, 7] = np.arange(num_items - first_item) + num_partials
                    merges[num_merges] = (
                        head, starts[i] + first, rows, num_partials, num_items - first_item,
                    )  # fmt: skip
                    num_partials += num_items - first_item
                    num_merges += 1
    worker_indptr[num_workers] = num_items
    return items[:num_items], worker_indptr, merges[:num_merges], num_partials
