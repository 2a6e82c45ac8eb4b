"""Whole tiles dealt out to workers, for kernels whose tiles cost much beside their keys. Compiled by Numba.

Tiles are taken sequence by sequence, those with the longest prefix first, in groups of heads whose keys fit a cache
together, the heaviest tiles of a group first. Each goes to the worker that is predicted to be free first, as a queue
would do at run time. Workers then read the same keys at about the same time, and the last tiles are light.

    cost of a tile = its blocks of kv_tokens keys, at least one, + tile_cost

in KV tokens. A step with so few tiles that the slowest worker would take much longer than an equal share is not dealt.

Sources: list scheduling, Graham 1966; the scheduler of FlashAttention-3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quire.kernels.compile import compiled
from quire.planning.split import Sequences, Tiles, count_parts, visible_range
from quire.planning.work_list import ITEM, ITEM_COLUMNS

# The slowest worker of a dealt step may take this many 64ths of an equal share. Beyond that, tiles are better split.
LATEST = 72
# KV tokens of a group of heads. Measured on an H200: all eight heads at once lose 3 % at 8k tokens, for the cache; one
# at a time loses 6 % at 2k, where there are too few tiles to even out.
GROUP_TOKENS = 1 << 14


WORKER_BITS = 16  # of a heap's entry; the others are its time


class Run(NamedTuple):
    """The tiles of the same queries for neighbouring KV heads; the other fields are those of an ``Item``."""

    sequence: int
    first_head: int
    end_head: int
    q_begin: int
    q_len: int
    q_position: int
    kv_begin: int
    kv_end: int


RUN = Run(*range(len(Run._fields)))  # the place of each in a row


@compiled
def give_to_first_free(free: Any, cost: int) -> int:
    """The worker that is free first. It is then busy for ``cost`` more.

    ``free`` is a heap of time << WORKER_BITS | worker.
    """
    first = free[0]
    value = first + (cost << WORKER_BITS)
    hole, child, size = 0, 1, len(free)
    while child < size:
        least = free[child]
        if child + 1 < size and free[child + 1] < least:
            child += 1
            least = free[child]
        if least >= value:
            break
        free[hole] = least
        hole, child = child, 2 * child + 1
    free[hole] = value
    return int(first & ((1 << WORKER_BITS) - 1))


@compiled
def deal_tiles(step: Sequences, tiles: Tiles, tile_cost: int) -> tuple[Any, Any, bool]:
    """Items and worker_indptr of ``work_list.WorkList``, none of them split, and whether they are evenly dealt."""
    kv_tokens, num_workers = tiles.kv_tokens, tiles.num_workers
    runs = list_runs(step, tiles)
    num_items = 0
    for j in range(len(runs)):
        num_items += runs[j, RUN.end_head] - runs[j, RUN.first_head]
    owner = np.empty(num_items, np.int64)
    free, place = np.arange(num_workers), np.zeros(num_workers + 1, np.int64)
    count = total = 0
    for j in range(len(runs)):
        blocks = -(-(runs[j, RUN.kv_end] - runs[j, RUN.kv_begin]) // kv_tokens)
        cost = max(1, blocks) * kv_tokens + tile_cost
        for _ in range(runs[j, RUN.first_head], runs[j, RUN.end_head]):
            worker = give_to_first_free(free, cost)
            owner[count] = worker
            place[worker + 1] += 1
            count += 1
            total += cost
    latest = free.max() >> WORKER_BITS
    evenly = latest * num_workers * 64 <= total * LATEST
    worker_indptr = np.cumsum(place)
    place[:] = worker_indptr
    items = np.empty((num_items, len(ITEM_COLUMNS)), np.int64)
    count = 0
    for j in range(len(runs)):
        for head in range(runs[j, RUN.first_head], runs[j, RUN.end_head]):
            at = place[owner[count]]
            place[owner[count]] += 1
            count += 1
            items[at, ITEM.sequence] = runs[j, RUN.sequence]
            items[at, ITEM.kv_head] = head
            items[at, ITEM.q_begin] = runs[j, RUN.q_begin]
            items[at, ITEM.q_len] = runs[j, RUN.q_len]
            items[at, ITEM.q_position] = runs[j, RUN.q_position]
            items[at, ITEM.kv_begin] = runs[j, RUN.kv_begin]
            items[at, ITEM.kv_end] = runs[j, RUN.kv_end]
            items[at, ITEM.partial] = -1
    return items, worker_indptr, evenly


@compiled
def list_runs(step: Sequences, tiles: Tiles) -> Any:
    """The tiles in the order in which they are dealt, a row for those of neighbouring heads: columns of ``Run``."""
    seq_lens, starts, num_kv_heads = step.seq_lens, step.starts, step.num_kv_heads
    q_tokens = tiles.q_tokens
    runs = np.empty((count_parts(step, tiles, 0)[0] * num_kv_heads, len(RUN)), np.int64)
    count = 0
    prefix = seq_lens - (starts[1:] - starts[:-1])
    for i in np.argsort(-(prefix << 32) - seq_lens, kind="mergesort"):
        q_len = starts[i + 1] - starts[i]
        if not tiles.least_q <= q_len <= tiles.most_q:
            continue
        group = min(num_kv_heads, max(1, GROUP_TOKENS // max(1, seq_lens[i])))
        for first_head in range(0, num_kv_heads, group):
            end_head = min(first_head + group, num_kv_heads)
            for first in range((q_len - 1) // q_tokens * q_tokens, -1, -q_tokens):
                rows = min(q_tokens, q_len - first)
                position = seq_lens[i] - q_len + first
                begin, end = visible_range(seq_lens[i], position, rows, step.causal, step.window_left)
                runs[count] = Run(i, first_head, end_head, starts[i] + first, rows, position, begin, end)
                count += 1
    return runs[:count]
