"""Tile shapes per chip and kernel: measured ahead and shipped, so that no request ever waits for a search.

A stage of the pipeline holds one block of K and V. What bounds the choice: a chip needs about 30 KB per
multiprocessor in flight to reach its bandwidth (Little's law: 4.8 TB/s × 0.8 µs / 132), shared memory holds the
stages of all workers of a multiprocessor, and registers the accumulator, BLOCK_M × BLOCK_D floats over all threads.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from quire.spec import AttentionSpec

MAX_HEAD_DIM = 256
MAX_GROUP = 128
MIN_ROWS, MIN_COLUMNS = 16, 8  # the sides of the matrix units' smallest tile
KIB = 1024
# Shares per multiprocessor: tiles take unequal times, and a multiprocessor that is free takes the next share.
PREFILL_WAVES = 4
# Costs are in KV tokens: those that a decode worker reads in the same time, as measured on an H100.
PART_COST = 384  # folding the parts of a split tile, about 5 µs
ITEM_COST = 256  # waiting for an item's first keys, and writing its result
MANY_ITEMS = 2  # items per multiprocessor from which two workers share it


class Tile(NamedTuple):
    """What one worker works on at a time, and how its kernel is compiled."""

    rows: int  # query tokens × query heads of a KV head
    kv_tokens: int
    num_warps: int
    num_stages: int
    workers_per_sm: int
    transposed: bool = False  # scores lie [keys, rows], see ``layout``


class Chip(NamedTuple):
    """What the choice of tiles asks about a chip."""

    name: str  # "cuda", "hip" or "cpu" (the interpreter)
    capability: int  # 80, 89, 90, 100 … ; 0 for others
    shared_bytes: int  # shared memory a multiprocessor can give to its workers
    multiprocessors: int

    @property
    def overlaps_launches(self) -> bool:
        """Whether a kernel may begin before the one ahead of it has ended (programmatic dependent launch)."""
        return self.name == "cuda" and self.capability >= 90


_SHARED_BYTES = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}


def known_chip(name: str, capability: int, multiprocessors: int) -> Chip:
    """A chip by its architecture, present or not."""
    shared = 64 * KIB if name == "hip" else _SHARED_BYTES.get(capability, 99 * KIB)
    return Chip(name, capability, shared, multiprocessors)


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a device; a CPU stands for the interpreter, with few workers so that work is still split."""
    if device.type != "cuda":
        return Chip("cpu", 0, 227 * KIB, 3)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return known_chip("hip", 0, found.multi_processor_count)
    return known_chip("cuda", 10 * found.major + found.minor, found.multi_processor_count)


def block_dim(head_dim: int) -> int:
    """head_dim in the power of two that tiles are made of."""
    return max(16, power_of_two(head_dim))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def query_bytes(spec: AttentionSpec, rows: int) -> int:
    """A tile's queries in shared memory."""
    return rows * block_dim(spec.head_dim) * spec.dtype.itemsize


def fits(spec: AttentionSpec, chip: Chip) -> bool:
    """Whether shared memory holds the smallest tiles, by what compiled kernels need: prefill three copies of its
    queries (as loaded, split for float32's products, and as results), decode two and an eighth beside two blocks."""
    queries = query_bytes(spec, max(MIN_ROWS, power_of_two(spec.group_size)))
    blocks = 2 * MIN_ROWS * token_bytes(spec)
    return chip.name == "hip" or max(3 * queries, blocks + queries * 17 // 8) <= chip.shared_bytes


def token_bytes(spec: AttentionSpec) -> int:
    """A key and its value in shared memory."""
    return 2 * block_dim(spec.head_dim) * spec.storage_dtype.itemsize


@functools.lru_cache
def decode_tile(spec: AttentionSpec, chip: Chip, few_rows: bool, many_items: bool) -> Tile:
    """Few rows, bound by memory: enough bytes in flight, and on Hopper as measured (docs/experiments.md).

    One worker of large blocks per multiprocessor splits tiles half as often as two of small ones. With ``many_items``
    few are split, and one of two workers reads while the other's item ends and begins. Quantised blocks cost arithmetic
    instead: there many workers of few warps wait for one another least.
    ``few_rows``: no sequence of the step has more than MIN_COLUMNS. That may only change the tile's rows,
    as the step is already cut.
    """
    rows = max(MIN_ROWS, power_of_two(spec.group_size))
    if chip.name == "hip":
        kv_tokens = min(64, max(16, 16 * KIB // token_bytes(spec)))
        return Tile(rows, kv_tokens, num_warps=4, num_stages=2, workers_per_sm=2)
    narrow = spec.dtype != torch.float32
    if spec.quantized:
        if narrow:
            rows = max(MIN_COLUMNS, power_of_two(spec.group_size))
        if rows == MIN_COLUMNS and block_dim(spec.head_dim) <= 128:
            kv_tokens, num_warps, most_workers = 32, 1, 8  # as many as registers hold, two for each scheduler
        else:
            kv_tokens = 64 if _resident(spec, rows, 64, 3, chip) >= 4 else 32
            num_warps, most_workers = 2 if rows <= MIN_ROWS else 4, 4
        num_stages = 3
        if _resident(spec, rows, kv_tokens, num_stages, chip) < 4:
            num_stages = 2
        workers = min(most_workers, _resident(spec, rows, kv_tokens, num_stages, chip))
        workers = power_of_two(workers + 1) // 2  # schedulers share evenly
        return Tile(rows, kv_tokens, num_warps, num_stages, workers, transposed=narrow)
    # Of three stages two are in shared memory at a time. float32 takes three products' registers, so half the keys.
    large = chip.shared_bytes > 2 * 64 * KIB and narrow
    stage_bytes = 64 * KIB if large else 32 * KIB
    room = chip.shared_bytes - 2 * query_bytes(spec, rows)
    stage_bytes = min(stage_bytes, room // 5 * 2)  # two of them, and a fifth for what else there is
    kv_tokens = min(128, max(16, power_of_two(stage_bytes // token_bytes(spec) + 1) // 2))
    tile = Tile(rows, kv_tokens, num_warps=4, num_stages=3, workers_per_sm=1)
    if many_items and narrow and chip.capability == 90 and block_dim(spec.head_dim) in (64, 128):
        needed = 2 * 64 * token_bytes(spec) + 2 * query_bytes(spec, rows)
        if 2 * needed <= chip.shared_bytes:
            tile = tile._replace(kv_tokens=64, workers_per_sm=2)
    return tile._replace(rows=MIN_COLUMNS, transposed=True) if few_rows and narrow else tile


def _resident(spec: AttentionSpec, rows: int, kv_tokens: int, num_stages: int, chip: Chip) -> int:
    """Workers of quantised decode whose shared memory a multiprocessor holds at once; one at least."""
    stage = kv_tokens * (token_bytes(spec) + 2 * torch.float32.itemsize)  # keys, values and their scales
    # What else there is, and what the hardware keeps for itself.
    beside = query_bytes(spec, rows) + KIB // 4 + KIB
    return max(1, (chip.shared_bytes + KIB) // (num_stages * stage + beside))


@functools.lru_cache
def prefill_tile(spec: AttentionSpec, chip: Chip) -> Tile:
    """Many rows, bound by the matrix units: as large a tile as registers and shared memory hold."""
    wide, slow = block_dim(spec.head_dim) > 128, spec.dtype == torch.float32
    group = power_of_two(spec.group_size)
    if slow:  # three products a step: it spills on every chip but AMD's, with fewer rows less
        num_stages = 2 if chip.shared_bytes > 128 * KIB else 1
        return Tile(max(32, group), 16 if wide else 32, num_warps=4, num_stages=num_stages, workers_per_sm=1)
    if chip.name == "hip":
        return Tile(max(64, group), 32 if wide else 64, num_warps=4, num_stages=1, workers_per_sm=1)
    if wide and chip.capability == 90 and not spec.quantized:
        return Tile(max(128, group), 64, num_warps=8, num_stages=2, workers_per_sm=1)
    rows = max(64 if wide else 128, group)
    small = chip.shared_bytes < 128 * KIB
    kv_tokens = 32 if wide or small else 64
    num_stages = 2 if small or chip.capability < 90 else 3
    return Tile(rows, kv_tokens, num_warps=8 if rows >= 128 else 4, num_stages=num_stages, workers_per_sm=1)
