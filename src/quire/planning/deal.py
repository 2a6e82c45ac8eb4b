"""Whole tiles dealt out to workers, for kernels whose tiles cost much beside their keys. Compiled by Numba.

Tiles are taken sequence by sequence, those with the longest prefix first, in groups of heads whose keys a cache holds
together, the heaviest tiles of a group first; each goes to the worker that is predicted to be free first. It is what a
queue would do, settled ahead: workers read the same keys at about the same time, and the end is light.

    cost of a tile = its blocks of kv_tokens keys, at least one, + tile_cost

in KV tokens. A step of so few tiles that the slowest worker would be much later than an equal share is not dealt.

Sources: list scheduling, Graham 1966; the scheduler of FlashAttention-3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import compiled
from quire.planning.stream_k import count_parts, visible_range

# The slowest worker of a dealt step may take so many 64ths of an equal share: beyond, tiles are better split.
LATEST = 72
# KV tokens of a group of heads. Measured on an H200: all eight heads at once lose 3 % at 8k tokens, for the cache; one
# at a time loses 6 % at 2k, where there are too few tiles to even out.
GROUP_TOKENS = 1 << 14


@compiled
def give_to_first_free(free: Any, num_workers: int, cost: int) -> int:
    """The worker that is free first, who is busy for ``cost`` from then on.

    ``free`` is a heap of time · num_workers + worker.
    """
    worker = free[0] % num_workers
    value = free[0] + cost * num_workers
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= num_workers:
            break
        if child + 1 < num_workers and free[child + 1] < free[child]:
            child += 1
        if free[child] >= value:
            break
        free[hole] = free[child]
        hole = child
    free[hole] = value
    return int(worker)


@compiled
def deal_tiles(
    seq_lens: Any, starts: Any, least_q: int, most_q: int, q_tokens: int, kv_tokens: int, tile_cost: int,
    num_kv_heads: int, causal: bool, window_left: int, num_workers: int,
) -> tuple[Any, Any, bool]:  # fmt: skip
    """Items and worker_indptr of ``work.WorkList``, none of them split, and whether they are evenly dealt.

    Takes the sequences with least_q to most_q queries; ``starts`` is cu_seqlens_q.
    """
    tiles = count_parts(seq_lens, starts, least_q, most_q, q_tokens, 0, True, causal, window_left)[0]
    dealt = np.empty((tiles * num_kv_heads, 8), np.int64)
    owner = np.empty(tiles * num_kv_heads, np.int64)
    free = np.arange(num_workers)
    count = total = 0
    prefix = seq_lens - (starts[1:] - starts[:-1])
    for i in np.argsort(-(prefix << 32) - seq_lens, kind="mergesort"):
        q_len = starts[i + 1] - starts[i]
        if not least_q <= q_len <= most_q:
            continue
        group = min(num_kv_heads, max(1, GROUP_TOKENS // max(1, seq_lens[i])))
        for first_head in range(0, num_kv_heads, group):
            for first in range((q_len - 1) // q_tokens * q_tokens, -1, -q_tokens):
                rows = min(q_tokens, q_len - first)
                position = seq_lens[i] - q_len + first
                begin, end = visible_range(seq_lens[i], position, rows, causal, window_left)
                cost = max(1, -(-(end - begin) // kv_tokens)) * kv_tokens + tile_cost
                for head in range(first_head, min(first_head + group, num_kv_heads)):
                    dealt[count] = (i, head, starts[i] + first, rows, position, begin, end, -1)
                    owner[count] = give_to_first_free(free, num_workers, cost)
                    count += 1
                    total += cost
    latest = free.max() // num_workers
    evenly = latest * num_workers * 64 <= total * LATEST
    worker_indptr = np.zeros(num_workers + 1, np.int64)
    for j in range(count):
        worker_indptr[owner[j] + 1] += 1
    worker_indptr = np.cumsum(worker_indptr)
    place, items = worker_indptr[:-1].copy(), np.empty_like(dealt)
    for j in range(count):
        items[place[owner[j]]] = dealt[j]
        place[owner[j]] += 1
    return items, worker_indptr, evenly
