"""Where tiles are split along their keys. Compiled by Numba.

A tile of q query tokens against n KV tokens weighs ``q × (n + item_cost)``. Work that weighs less than
``least_shared`` is not shared at all. With ``kv_split``
every tile is split at multiples of kv_split, whatever else is in the batch. Where splitting has a price, ``own_parts``
finds the ``kv_split`` with which every part has a worker of its own: then no worker pays the price twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from quire.kernels.compile import compiled


class Sequences(NamedTuple):
    """A step's sequences, and what their queries may see."""

    seq_lens: Any  # int64 [batch]
    starts: Any  # int64 [batch + 1], cu_seqlens_q
    num_kv_heads: int
    causal: bool
    window_left: int


class Tiles(NamedTuple):
    """The tiles of one kernel, which takes the sequences with least_q to most_q queries; see ``TileShape``."""

    least_q: int
    most_q: int
    q_tokens: int
    kv_tokens: int
    part_cost: int
    item_cost: int
    num_workers: int
    kv_split: int
    whole: bool  # a tile weighs the same however few of its rows are filled
    least_shared: int = 0


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
def count_parts(step: Sequences, tiles: Tiles, kv_split: int) -> tuple[int, int, int, int]:
    """Tiles of one KV head, their parts, their weight, and the keys of the longest."""
    count = parts = weight = longest = 0
    for i in range(len(step.seq_lens)):
        seq_len, q_len = step.seq_lens[i], step.starts[i + 1] - step.starts[i]
        if tiles.least_q <= q_len <= tiles.most_q:
            for first in range(0, q_len, tiles.q_tokens):
                rows = min(tiles.q_tokens, q_len - first)
                begin, end = visible_range(
                    seq_len, seq_len - q_len + first, rows, step.causal, step.window_left
                )
                pieces = max(1, (end - 1) // kv_split - begin // kv_split + 1) if kv_split else 1
                count += 1
                parts += pieces
                weight += (tiles.q_tokens if tiles.whole else rows) * (end - begin + pieces * tiles.item_cost)
                longest = max(longest, end - begin)
    return count, parts, weight, longest


@compiled
def own_parts(step: Sequences, tiles: Tiles) -> int:
    """The kv_split by which every part has a worker of its own, or 0 where equal shares end earlier.

    The slowest worker's time, in KV tokens. A share that holds the end of one tile and the beginning of another takes
    total / W + 2 · part_cost, a part of its own kv_split + part_cost, a whole tile its length.
    """
    count, _, weight, longest = count_parts(step, tiles, 0)
    if count * step.num_kv_heads > tiles.num_workers:
        return 0
    end = 1
    for seq_len in step.seq_lens:
        end = max(end, seq_len)
    # Blocks to a part; a kv_split that reaches the longest sequence's end splits no tile.
    whole = -(-end // tiles.kv_tokens)
    fewest, most = 1, whole
    while fewest < most:
        middle = (fewest + most) // 2
        parts = count_parts(step, tiles, middle * tiles.kv_tokens)[1]
        if parts * step.num_kv_heads > tiles.num_workers:
            fewest = middle + 1
        else:
            most = middle
    straddled = weight * step.num_kv_heads // (tiles.q_tokens * tiles.num_workers) + 2 * tiles.part_cost
    own = fewest * tiles.kv_tokens + tiles.part_cost
    if longest <= min(own, straddled):
        return int(whole * tiles.kv_tokens)
    return int(fewest * tiles.kv_tokens) if own <= straddled else 0
