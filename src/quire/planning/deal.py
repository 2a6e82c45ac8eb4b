"""Whole tiles dealt out to workers, for kernels whose tiles cost much beside their keys. Compiled by Numba.

Tiles are taken sequence by sequence, those with the longest prefix first, in groups of heads whose keys fit a cache
together, the heaviest tiles of a group first. Each goes to the worker that is predicted to be free first, as a queue
would do at run time. Workers then read the same keys at about the same time, and the last tiles are light.

    cost of a tile = its blocks of kv_tokens keys, at least one, + tile_cost

in KV tokens. A step with so few tiles that the slowest worker would take much longer than an equal share is not dealt.

Sources: list scheduling, Graham 1966; the scheduler of FlashAttention-3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import compiled
from quire.planning.split import Sequences, Tiles, count_parts, visible_range
from quire.planning.work_list import ITEM_COLUMNS, Item

# The slowest worker of a dealt step may take this many 64ths of an equal share. Beyond that, tiles are better split.
LATEST = 72
# KV tokens of a group of heads. Measured on an H200: all eight heads at once lose 3 % at 8k tokens, for the cache; one
# at a time loses 6 % at 2k, where there are too few tiles to even out.
GROUP_TOKENS = 1 << 14


@compiled
def give_to_first_free(free: Any, num_workers: int, cost: int) -> int:
    """The worker that is free first. It is then busy for ``cost`` more.

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
def deal_tiles(step: Sequences, tiles: Tiles, tile_cost: int) -> tuple[Any, Any, bool]:
    """Items and worker_indptr of ``work_list.WorkList``, none of them split, and whether they are evenly dealt."""
    seq_lens, starts, num_kv_heads = step.seq_lens, step.starts, step.num_kv_heads
    q_tokens, kv_tokens, num_workers = tiles.q_tokens, tiles.kv_tokens, tiles.num_workers
    most = count_parts(step, tiles, 0)[0] * num_kv_heads
    dealt = np.empty((most, len(ITEM_COLUMNS)), np.int64)
    owner = np.empty(most, np.int64)
    free = np.arange(num_workers)
    count = total = 0
    prefix = seq_lens - (starts[1:] - starts[:-1])
    for i in np.argsort(-(prefix << 32) - seq_lens, kind="mergesort"):
        q_len = starts[i + 1] - starts[i]
        if not tiles.least_q <= q_len <= tiles.most_q:
            continue
        group = min(num_kv_heads, max(1, GROUP_TOKENS // max(1, seq_lens[i])))
        for first_head in range(0, num_kv_heads, group):
            for first in range((q_len - 1) // q_tokens * q_tokens, -1, -q_tokens):
                rows = min(q_tokens, q_len - first)
                position = seq_lens[i] - q_len + first
                begin, end = visible_range(seq_lens[i], position, rows, step.causal, step.window_left)
                cost = max(1, -(-(end - begin) // kv_tokens)) * kv_tokens + tile_cost
                for head in range(first_head, min(first_head + group, num_kv_heads)):
                    dealt[count] = Item(i, head, starts[i] + first, rows, position, begin, end, -1)
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
