"""The plan's arithmetic: tiles laid on a line of work, and the line cut into equal shares. Compiled by Numba.

A tile of q query tokens against n KV tokens weighs ``q × (n + ITEM_OVERHEAD)``. Ideal cut w of W lies at w/W of the
whole weight. A cut inside a tile splits its KV range between blocks; one that would leave a sliver below two
blocks moves to the nearer end of the tile instead.

With ``kv_split`` every tile comes as parts between multiples of it, the same whatever else is in the batch, and
each cut moves to the nearer end of a part. Where splitting has a price, ``own_parts`` finds the ``kv_split``
with which every part has a worker of its own: then no worker pays the price twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import compiled, load_i32, load_i64

# What loading the queries and writing the result of an item costs, in KV tokens; it keeps a share of many
# short sequences from being taken for a cheap one.
ITEM_OVERHEAD = 16


@compiled
def copy_ints(address: int, nbytes: int, target: Any) -> None:
    """Fill ``target`` with the integers of 4 or 8 bytes that lie at an address; with 0, 1, … if that is 0."""
    for i in range(len(target)):
        if address == 0:
            target[i] = i
        elif nbytes == 8:
            target[i] = load_i64(address + i * 8)
        else:
            target[i] = load_i32(address + i * 4)


@compiled
def is_step(seq_lens: Any, starts: Any, capacity: int) -> bool:
    """Whether lengths lie in 0 … capacity, and starts begin with 0 and never decrease."""
    fits = starts[0] == 0
    for i in range(len(seq_lens)):
        fits = fits and 0 <= seq_lens[i] <= capacity and starts[i] <= starts[i + 1]
    return bool(fits)


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
    seq_lens: Any, starts: Any, least_q: int, most_q: int, q_tokens: int, kv_split: int, whole_tiles: bool,
    causal: bool, window_left: int,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Tiles of one KV head, their parts, their weight, and the keys of the longest."""
    tiles = parts = weight = longest = 0
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
                weight += (q_tokens if whole_tiles else rows) * (end - begin + count * ITEM_OVERHEAD)
                longest = max(longest, end - begin)
    return tiles, parts, weight, longest


@compiled
def own_parts(
    seq_lens: Any, starts: Any, least_q: int, most_q: int, q_tokens: int, kv_tokens: int, part_cost: int,
    num_kv_heads: int, causal: bool, window_left: int, num_workers: int,
) -> int:  # fmt: skip
    """The kv_split by which every part has a worker of its own, or 0 where straddling tiles are done sooner.

    The slowest worker's time, in KV tokens: a straddled share has a tile's end and another's beginning, so it is
    total / W + 2 · part_cost; a part of its own kv_split + part_cost; a whole tile its length.
    """
    tiles, _, weight, longest = count_parts(
        seq_lens, starts, least_q, most_q, q_tokens, 0, True, causal, window_left
    )
    if tiles * num_kv_heads > num_workers:
        return 0
    end = 1
    for seq_len in seq_lens:
        end = max(end, seq_len)
    # Blocks to a part. Parts end at multiples of it, so that which leaves every tile whole must reach their ends.
    whole = -(-end // kv_tokens)
    fewest, most = 1, whole
    while fewest < most:
        middle = (fewest + most) // 2
        parts = count_parts(
            seq_lens, starts, least_q, most_q, q_tokens, middle * kv_tokens, True, causal, window_left
        )[1]
        if parts * num_kv_heads > num_workers:
            fewest = middle + 1
        else:
            most = middle
    straddled = weight * num_kv_heads // (q_tokens * num_workers) + 2 * part_cost
    own = fewest * kv_tokens + part_cost
    if longest <= min(own, straddled):
        return int(whole * kv_tokens)
    return int(fewest * kv_tokens) if own <= straddled else 0


@compiled
def cut_step(
    lens_at: int, lens_bytes: int, starts_at: int, starts_bytes: int, table_at: int, table_len: int,
    batch: int, capacity: int, tiling: Any, num_kv_heads: int, causal: bool, window_left: int,
) -> tuple[Any, bool, int, int, int, Any, Any]:  # fmt: skip
    """Copy a step's lengths and page table, and cut the copy by ``share_step``.

    Lengths come as the addresses of integers of 4 or 8 bytes, the table as that of ``table_len`` of 4 bytes, because
    torch takes 0.7 µs to make an array of a tensor; ``starts_at`` is 0 where every sequence has one query. All is one
    call that hands one array to Python, because each call and each array costs half a microsecond.

    Args:
        capacity: the most keys that a row of the table has pages for.
        tiling: a ``work.Tiling``.
    Returns:
        The array: seq_lens, starts, the table in halves of integers, and the two work lists. Whether the lengths are a
        step's; if not, nothing follows starts. Then the number of query tokens, the longest q_len, the most keys, and
        of each work list the fields of ``work.WorkList`` but the array.
    """
    lengths = np.empty(2 * batch + 1, np.int64)
    seq_lens, starts = lengths[:batch], lengths[batch:]
    copy_ints(lens_at, lens_bytes, seq_lens)
    copy_ints(starts_at, starts_bytes, starts)
    if not is_step(seq_lens, starts, capacity):
        return lengths, False, 0, 0, 0, (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)
    at = len(lengths) + -(-table_len // 2)
    numbers, max_q_len, few, many = share_step(
        at, seq_lens, starts, tiling, num_kv_heads, causal, window_left
    )
    numbers[: len(lengths)] = lengths
    copy_ints(table_at, 4, numbers[len(lengths) : at].view(np.int32)[:table_len])
    max_seq_len = 0
    for seq_len in seq_lens:
        max_seq_len = max(max_seq_len, seq_len)
    return numbers, True, starts[batch], max_q_len, max_seq_len, few, many


@compiled
def share_step(
    at: int, seq_lens: Any, starts: Any, tiling: Any, num_kv_heads: int, causal: bool, window_left: int
) -> tuple[Any, int, Any, Any]:  # fmt: skip
    """The work of a step's decode and that of its prefill, in an array with room for ``at`` numbers before them.

    Returns:
        The array, the step's longest q_len, and of each work list the fields of ``work.WorkList`` but the array.
    """
    decode, prefill, kv_split, whole_tiles = (
        tiling.decode,
        tiling.prefill,
        tiling.kv_split,
        tiling.whole_tiles,
    )
    few_workers = decode.num_workers or tiling.num_workers
    many_workers = prefill.num_workers or tiling.num_workers
    longest = 0
    for i in range(len(seq_lens)):
        longest = max(longest, starts[i + 1] - starts[i])
    few = measure_work(
        seq_lens, starts, 1, tiling.decode_max_q_len, decode.q_tokens, decode.kv_tokens, kv_split, decode.part_cost,
        whole_tiles, num_kv_heads, causal, window_left, few_workers,
    )  # fmt: skip
    many = measure_work(
        seq_lens, starts, tiling.decode_max_q_len + 1, longest, prefill.q_tokens, prefill.kv_tokens, kv_split,
        prefill.part_cost, whole_tiles, num_kv_heads, causal, window_left, many_workers,
    )  # fmt: skip
    between = at + few[0]
    numbers = np.empty(between + many[0], np.int64)
    few_counts = share_work(
        numbers, at, few, seq_lens, starts, 1, tiling.decode_max_q_len, decode.q_tokens, decode.kv_tokens, whole_tiles,
        num_kv_heads, causal, window_left, few_workers,
    )  # fmt: skip
    many_counts = share_work(
        numbers, between, many, seq_lens, starts, tiling.decode_max_q_len + 1, longest, prefill.q_tokens,
        prefill.kv_tokens, whole_tiles, num_kv_heads, causal, window_left, many_workers,
    )  # fmt: skip
    return numbers, longest, few_counts, many_counts


@compiled
def measure_work(
    seq_lens: Any, starts: Any, least_q: int, most_q: int, q_tokens: int, kv_tokens: int, kv_split: int,
    part_cost: int, whole_tiles: bool, num_kv_heads: int, causal: bool, window_left: int, num_workers: int,
) -> tuple[int, int, int, int, int, bool]:  # fmt: skip
    """What ``share_work`` has to know before it begins.

    Returns:
        Room for its lists, and in it for how many items and merges; the weight of all work; the kv_split, and whether
        that gives every part a worker of its own.
    """
    own_split = 0
    if part_cost and not kv_split:
        kv_split = own_split = own_parts(
            seq_lens, starts, least_q, most_q, q_tokens, kv_tokens, part_cost, num_kv_heads, causal,
            window_left, num_workers,
        )  # fmt: skip
    tiles, parts, weight, _ = count_parts(
        seq_lens, starts, least_q, most_q, q_tokens, kv_split, whole_tiles, causal, window_left
    )
    most_items = parts * num_kv_heads + num_workers
    most_merges = tiles * num_kv_heads if kv_split else num_workers
    room = most_items * 8 + num_workers + 1 + most_merges * 5
    return room, most_items, most_merges, weight * num_kv_heads, kv_split, own_split > 0


@compiled
def share_work(
    numbers: Any, at: int, measured: Any, seq_lens: Any, starts: Any, least_q: int, most_q: int,
    q_tokens: int, kv_tokens: int, whole_tiles: bool, num_kv_heads: int, causal: bool, window_left: int,
    num_workers: int,
) -> tuple[int, int, int, int, int]:  # fmt: skip
    """Write one kernel's work into ``numbers`` from ``at`` on; the other fields of ``work.WorkList``.

    Takes the sequences with least_q to most_q queries; ``starts`` is cu_seqlens_q, ``measured`` of ``measure_work``.
    """
    _, most_items, most_merges, total, kv_split, each_its_own = measured
    items_at = at + num_workers + 1
    worker_indptr = numbers[at:items_at]
    items = numbers[items_at : items_at + most_items * 8].reshape(most_items, 8)
    worker_indptr[:] = 0
    if total == 0:
        return at, num_workers, 0, 0, 0
    merges = np.empty((most_merges, 5), np.int64)
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
                lines = q_tokens if whole_tiles else rows  # what a KV token of this tile weighs
                first_item, last = num_items, begin
                while last < end or num_items == first_item:
                    last = part_end(begin, end, kv_split)
                    line_end = line + lines * (last - begin + ITEM_OVERHEAD)
                    at_end = 0
                    while worker + 1 < num_workers and total * (worker + 1) // num_workers < line_end:
                        ahead = (total * (worker + 1) // num_workers - line) // lines
                        cut = max(begin, (begin + ahead) // kv_tokens * kv_tokens)
                        worker += 1
                        if not kv_split and min(cut - begin, last - cut) >= 2 * kv_tokens:
                            items[num_items] = (i, head, starts[i] + first, rows, position, begin, cut, -1)
                            num_items += 1
                            line += lines * (cut - begin)
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
    if each_its_own:
        for worker in range(num_workers):
            worker_indptr[worker] = min(worker, num_items)
    behind = at + num_workers + 1 + num_items * 8
    numbers[behind : behind + num_merges * 5] = merges[:num_merges].reshape(-1)
    return at, num_workers, num_items, num_merges, num_partials
