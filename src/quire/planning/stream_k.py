"""Equal shares: tiles laid on a line of work, and the line cut between the workers. Compiled by Numba.

Ideal cut w of W lies at w/W of the whole weight (``split`` says what a tile weighs). A cut inside a tile splits its KV
range between blocks; one that would leave a sliver below two blocks moves to the nearer end of the tile instead. With
``kv_split`` each cut moves to the nearer end of a part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import compiled
from quire.planning.copying import copy_ints, copy_pages, is_step
from quire.planning.split import (
    Sequences,
    Tiles,
    count_parts,
    own_parts,
    part_end,
    visible_range,
)
from quire.planning.work_list import ITEM, ITEM_COLUMNS, MERGE_COLUMNS, Item, Merge

MAX_PAGE = 2**31 - 1  # an id above it was negative
ITEM_WIDTH, MERGE_WIDTH = len(ITEM_COLUMNS), len(MERGE_COLUMNS)


@compiled
def cut_step(
    lens_at: int, lens_bytes: int, starts_at: int, starts_bytes: int, table_at: int, row_bytes: int, column_bytes: int,
    batch: int, max_pages: int, page_size: int, tiling: Any, num_kv_heads: int, causal: bool, window_left: int,
    most_tokens: int, leaves_prefill: bool,
) -> tuple[Any, bool, int, int, int, int, Any, Any]:  # fmt: skip
    """Copy a step's lengths and page ids, and cut the copy by ``share_step``.

    One call returns one array, because each call and each array costs half a microsecond.

    Args:
        lens_at, starts_at: addresses of integers of ``lens_bytes`` and ``starts_bytes``, which are 4 or 8;
            ``starts_at`` is 0 where every sequence has one query.
        table_at: address of the page table, int32 [batch, max_pages], whose strides follow; 0 where it is not here.
        tiling: a ``work_list.Tiling``.
        most_tokens: the query tokens that a step may have.
        leaves_prefill: whether prefill is not cut, as its whole tiles will be dealt (``deal``).
    Returns:
        The array: seq_lens, starts, the page ids in use in a table, and the two work lists.
        Whether the step is valid; if not, the array ends after starts. Then the number of query tokens, the longest
        q_len, the most keys, the highest page id in use or −1, and of each work list the fields of
        ``work_list.WorkList`` but the array.
    """
    lengths = np.empty(2 * batch + 1, np.int64)
    seq_lens, starts = lengths[:batch], lengths[batch:]
    copy_ints(lens_at, lens_bytes, seq_lens)
    copy_ints(starts_at, starts_bytes, starts)
    nothing = 0, 0, 0, 0, 0, 0
    if not is_step(seq_lens, starts, max_pages * page_size, most_tokens):
        return lengths, False, 0, 0, 0, -1, nothing, nothing
    table_len = batch * max_pages if table_at else 0
    at = len(lengths) + -(-table_len // 2)
    step = Sequences(seq_lens, starts, num_kv_heads, causal, window_left)
    numbers, max_q_len, few, many = share_step(at, step, tiling, leaves_prefill)
    copy_into(numbers, 0, lengths)
    highest_page = -1
    if table_len:
        table = numbers[len(lengths) : at].view(np.uint32)[:table_len].reshape(batch, max_pages)
        highest_page = copy_pages(table_at, row_bytes, column_bytes, seq_lens, page_size, table)
        if highest_page > MAX_PAGE:
            return lengths, False, 0, 0, 0, -1, nothing, nothing
    max_seq_len = 0
    for seq_len in seq_lens:
        max_seq_len = max(max_seq_len, seq_len)
    return numbers, True, starts[batch], max_q_len, max_seq_len, highest_page, few, many


@compiled
def share_step(
    at: int, step: Sequences, tiling: Any, leaves_prefill: bool = False
) -> tuple[Any, int, Any, Any]:
    """The work of a step's decode and that of its prefill, in an array with room for ``at`` numbers before them.

    Returns:
        The array, the step's longest q_len, and of each work list the fields of ``work_list.WorkList`` but the array.
    """
    longest = 0
    for i in range(len(step.seq_lens)):
        longest = max(longest, step.starts[i + 1] - step.starts[i])
    short = tiling.decode_max_q_len
    few = measure_work(step, tiles_of(tiling, tiling.decode, 1, short))
    many = measure_work(
        step, tiles_of(tiling, tiling.prefill, short + 1, short if leaves_prefill else longest)
    )
    between = at + few[0]
    numbers = np.empty(between + many[0], np.int64)
    return numbers, longest, share_work(numbers, at, few, step), share_work(numbers, between, many, step)


# Numba makes an error message of every slice that is assigned to: a second of compiling each. Loops have none.


@compiled
def fill(array: Any, first: int, end: int, value: int) -> None:
    """array[first:end] = value."""
    for i in range(first, end):
        array[i] = value


@compiled
def copy_into(target: Any, at: int, source: Any) -> None:
    """target[at : at + len(source)] = source."""
    for i in range(len(source)):
        target[at + i] = source[i]


@compiled
def write_row(rows: Any, place: int, row: Any) -> None:
    """rows[place] = row, of a tuple of numbers."""
    for i in range(len(row)):
        rows[place, i] = row[i]


@compiled
def tiles_of(tiling: Any, shape: Any, least_q: int, most_q: int) -> Tiles:
    """One kernel's tiles in a tiling."""
    workers = shape.num_workers or tiling.num_workers
    return Tiles(
        least_q, most_q, shape.q_tokens, shape.kv_tokens, shape.part_cost, shape.item_cost, workers, tiling.kv_split,
        tiling.whole_tiles, shape.least_shared,
    )  # fmt: skip


@compiled
def measure_work(step: Sequences, tiles: Tiles) -> tuple[int, int, int, int, bool, Tiles]:
    """What ``share_work`` has to know before it begins.

    Returns:
        Room for its lists, and in it for how many items and merges; the weight of all work; whether every part has a
        worker of its own; the tiles with the kv_split and the number of workers that were chosen.
    """
    kv_split, own_split = tiles.kv_split, 0
    if tiles.part_cost and not kv_split:
        kv_split = own_split = own_parts(step, tiles)
    count, parts, weight, _ = count_parts(step, tiles, kv_split)
    total = weight * step.num_kv_heads
    num_workers = 1 if total < tiles.least_shared else tiles.num_workers
    most_items = parts * step.num_kv_heads + num_workers
    most_merges = count * step.num_kv_heads if kv_split else num_workers
    room = most_items * ITEM_WIDTH + num_workers + 1 + most_merges * MERGE_WIDTH
    chosen = Tiles(
        tiles.least_q, tiles.most_q, tiles.q_tokens, tiles.kv_tokens, tiles.part_cost, tiles.item_cost, num_workers,
        kv_split, tiles.whole, tiles.least_shared,
    )  # fmt: skip
    return room, most_items, most_merges, total, own_split > 0, chosen


@compiled
def share_work(numbers: Any, at: int, measured: Any, step: Sequences) -> tuple[int, int, int, int, int, int]:
    """Write one kernel's work into ``numbers`` from ``at`` on; the other fields of ``work_list.WorkList``.

    ``measured`` is what ``measure_work`` says of the step and its tiles.
    """
    _, most_items, most_merges, total, each_its_own, tiles = measured
    num_workers, kv_tokens, kv_split = tiles.num_workers, tiles.kv_tokens, tiles.kv_split
    items_at = at + num_workers + 1
    worker_indptr = numbers[at:items_at]
    items = numbers[items_at : items_at + most_items * ITEM_WIDTH].reshape(most_items, ITEM_WIDTH)
    fill(worker_indptr, 0, num_workers + 1, 0)
    if total == 0:
        return at, num_workers, 0, 0, 0, 0
    merges = np.empty((most_merges, MERGE_WIDTH), np.int64)
    num_items = num_merges = num_partials = worker = line = 0
    for i in range(len(step.seq_lens)):
        q_len = step.starts[i + 1] - step.starts[i]
        if not tiles.least_q <= q_len <= tiles.most_q:
            continue
        for head in range(step.num_kv_heads):
            for first in range(0, q_len, tiles.q_tokens):
                rows, token = min(tiles.q_tokens, q_len - first), step.starts[i] + first
                position = step.seq_lens[i] - q_len + first
                begin, end = visible_range(step.seq_lens[i], position, rows, step.causal, step.window_left)
                lines = tiles.q_tokens if tiles.whole else rows  # what a KV token of this tile weighs
                first_item, last = num_items, begin
                while last < end or num_items == first_item:
                    last = part_end(begin, end, kv_split)
                    line_end = line + lines * (last - begin + tiles.item_cost)
                    at_end = 0
                    while worker + 1 < num_workers and total * (worker + 1) // num_workers < line_end:
                        ahead = (total * (worker + 1) // num_workers - line) // lines
                        cut = max(begin, (begin + ahead) // kv_tokens * kv_tokens)
                        worker += 1
                        if not kv_split and min(cut - begin, last - cut) >= 2 * kv_tokens:
                            write_row(items, num_items, Item(i, head, token, rows, position, begin, cut, -1))
                            num_items += 1
                            line += lines * (cut - begin)
                            begin = cut
                            worker_indptr[worker] = num_items
                        elif cut - begin < last - cut:
                            worker_indptr[worker] = num_items
                        else:
                            at_end += 1
                    write_row(items, num_items, Item(i, head, token, rows, position, begin, last, -1))
                    num_items += 1
                    line, begin = line_end, last
                    fill(worker_indptr, worker - at_end + 1, worker + 1, num_items)
                parts = num_items - first_item
                if parts > 1:
                    for j in range(parts):
                        items[first_item + j, ITEM.partial] = num_partials + j
                    write_row(merges, num_merges, Merge(head, token, rows, num_partials, parts))
                    num_partials += parts
                    num_merges += 1
    worker_indptr[num_workers] = num_items
    if each_its_own:
        for worker in range(num_workers):
            worker_indptr[worker] = min(worker, num_items)
    behind = items_at + num_items * ITEM_WIDTH
    copy_into(numbers, behind, merges.reshape(most_merges * MERGE_WIDTH)[: num_merges * MERGE_WIDTH])
    return at, num_workers, num_items, num_merges, num_partials, total
