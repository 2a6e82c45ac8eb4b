"""A step's plan on the device: every index list in one int32 buffer, moved by one copy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from quire import work
from quire.compiled import compiled
from quire.work import StepPlan, WorkList

SEGMENT = 4  # int32s: every list starts on 16 bytes
# Columns of an item on the device: those of the host, and where its tile's parts are; num_parts is 1 for a whole tile.
ITEM_COLUMNS = (*work.ITEM_COLUMNS, "first_partial", "num_parts")
COLUMNS = len(ITEM_COLUMNS)


class Section(NamedTuple):
    """A list's place in a buffer that several share. Viewed as a tensor only where someone asks for one."""

    buffer: torch.Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        return self.buffer.data_ptr() + self.start * 4

    @property
    def tensor(self) -> torch.Tensor:
        return self.buffer[self.start : self.start + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class DeviceWork:
    """One kernel's work list and the room for its partial states; see ``work.WorkList`` for the columns."""

    num_workers: int
    items: Section  # int32 [num_workers + num_items, 10], see ITEM_COLUMNS: each worker's first, then all
    worker_indptr: Section  # int32 [num_workers + 1] into items
    arrivals: Section  # int32 [num_partials]: parts finished so far, counted at the first one's place
    partial_out: Section  # float32 [num_partials, rows, block_dim]
    partial_lse: Section  # float32 [num_partials, rows], base 2


@dataclass(frozen=True)
class DevicePlan:
    """What both kernels read of a step."""

    page_table: Section  # int32 [batch, max_pages]
    cu_seqlens_q: Section  # int32 [batch + 1]
    work: tuple[DeviceWork, ...]


def move_to_device(
    step: StepPlan, lists: Sequence[tuple[WorkList, int, int]], device: torch.device
) -> DevicePlan:
    """Pack a step and its work lists, each with its tile's rows and block_dim, and copy them over.

    Cost: one host-to-device copy, which the host does not wait for. It must stay a copy: a kernel that OVERLAPS reads
    the plan before it waits for the kernel ahead of it, which therefore must not be what writes it.
    """
    counts = [(len(shares.worker_indptr) - 1, len(shares.items), shares.num_partials) for shares, *_ in lists]
    shapes = [step.page_table.shape, step.cu_seqlens_q.shape]
    for workers, items, partials in counts:
        shapes += [(workers + items, COLUMNS), (workers + 1,), (partials,)]
    starts = _starts(shapes)
    # Pinned, so that the copy needs no host thread; torch keeps the memory until the copy is done.
    host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    packed = host.numpy()
    _pack_step(step.page_table, step.cu_seqlens_q, packed, starts[1])
    for i, (shares, *_) in enumerate(lists):
        _pack_work(shares.items, shares.worker_indptr, shares.merges, packed, starts[2 + 3 * i], starts[3 + 3 * i],
                   starts[4 + 3 * i], starts[5 + 3 * i])  # fmt: skip
    moved = _sections(host.to(device, non_blocking=True), starts, shapes)
    rooms: list[tuple[int, ...]] = []
    for (_, _, partials), (_, rows, block_dim) in zip(counts, lists, strict=True):
        rooms += [(partials, rows, block_dim), (partials, rows)]
    room_starts = _starts(rooms)
    room = _sections(torch.empty(room_starts[-1], dtype=torch.float32, device=device), room_starts, rooms)
    return DevicePlan(
        next(moved),
        next(moved),
        tuple(
            DeviceWork(workers, next(moved), next(moved), next(moved), next(room), next(room))
            for workers, _, _ in counts
        ),
    )


def _starts(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Where lists of these shapes begin in a buffer, and how long it is: at least one segment."""
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + -(-math.prod(shape) // SEGMENT) * SEGMENT)
    return [*starts[:-1], starts[-1] + SEGMENT]


def _sections(
    buffer: torch.Tensor, starts: Sequence[int], shapes: Sequence[tuple[int, ...]]
) -> Iterator[Section]:
    return (Section(buffer, start, tuple(shape)) for start, shape in zip(starts, shapes, strict=False))


@compiled
def _pack_step(page_table: Any, cu_seqlens_q: Any, packed: Any, starts_at: int) -> None:
    rows, columns = page_table.shape
    for i in range(rows):
        for j in range(columns):
            packed[i * columns + j] = page_table[i, j]
    for i in range(len(cu_seqlens_q)):
        packed[starts_at + i] = cu_seqlens_q[i]


@compiled
def _pack_work(
    items: Any, worker_indptr: Any, merges: Any, packed: Any, items_at: int, indptr_at: int, arrivals_at: int,
    end: int,
) -> None:  # fmt: skip
    """A work list as ``DeviceWork`` lays it out, its counters at zero."""
    num_workers = len(worker_indptr) - 1
    listed = items_at + num_workers * COLUMNS
    for i in range(len(items)):
        for column in range(COLUMNS - 2):
            packed[listed + i * COLUMNS + column] = items[i, column]
        packed[listed + i * COLUMNS + COLUMNS - 2] = 0
        packed[listed + i * COLUMNS + COLUMNS - 1] = 1
    merge = 0
    for i in range(len(items)):  # split items stand in the order of their partials
        if items[i, COLUMNS - 3] >= 0:
            while items[i, COLUMNS - 3] >= merges[merge, 3] + merges[merge, 4]:
                merge += 1
            packed[listed + i * COLUMNS + COLUMNS - 2] = merges[merge, 3]
            packed[listed + i * COLUMNS + COLUMNS - 1] = merges[merge, 4]
    for worker in range(num_workers):
        # Who has no items gets somebody's, and does not look at it.
        first = listed + min(worker_indptr[worker], len(items) - 1) * COLUMNS
        for column in range(COLUMNS):
            packed[items_at + worker * COLUMNS + column] = packed[first + column]
    for worker in range(num_workers + 1):
        packed[indptr_at + worker] = worker_indptr[worker] + num_workers
    packed[arrivals_at:end] = 0
