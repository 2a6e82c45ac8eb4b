"""A step's plan on the device: every index list in one int32 buffer, moved by one copy.

The buffer's sections have fixed places for a capacity. For a plan of its own that is what the step needs; where
addresses must not change, for CUDA graphs, it is what the largest step needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from quire.kernels.compile import compiled
from quire.kernels.triton.streams import StreamOrder
from quire.planning.work_list import ITEM, MERGE, Capacity, StepPlan
from quire.planning.work_list import ITEM_COLUMNS as HOST_COLUMNS

SEGMENT = 4  # int32s: every list starts on 16 bytes
# Columns of an item on the device: those of the host, and where its tile's parts are; num_parts is 1 for a whole tile.
ITEM_COLUMNS = (*HOST_COLUMNS, "first_partial", "num_parts")
COLUMNS = len(ITEM_COLUMNS)


class Section(NamedTuple):
    """A list's place in the buffer. A view is only made where one is asked for: each costs a microsecond."""

    buffer: torch.Tensor
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def address(self) -> int:
        return self.buffer.data_ptr() + self.start * 4

    @property
    def tensor(self) -> torch.Tensor:
        flat = self.buffer[self.start : self.start + math.prod(self.shape)]
        return flat.view(self.dtype).view(self.shape)


class PartialShape(NamedTuple):
    """A partial state: its rows, and the elements of each."""

    rows: int
    block_dim: int


@dataclass(frozen=True)
class DeviceWork:
    """One kernel's work list and the room for its partial states; see ``WorkList`` for the columns."""

    num_workers: int
    worker_indptr: Section  # int32 [num_workers + 1] into items
    arrivals: Section  # int32 [num_partials]: parts finished so far, counted at the first one's place
    items: Section  # int32 [num_workers + num_items, 10], see ITEM_COLUMNS: each worker's first, then all
    partial_out: Section  # float32 [num_partials, rows, block_dim]
    partial_lse: Section  # float32 [num_partials, rows], base 2


@dataclass(frozen=True)
class DevicePlan:
    """Memory on the device for the plans of a capacity, one at a time, and what kernels read of it."""

    cu_seqlens_q: Section  # int32 [batch + 1]
    page_table: Section  # int32 [batch, max_pages]
    order: StreamOrder  # of the streams that use the buffer
    decode: DeviceWork | None  # None where no item may be
    prefill: DeviceWork | None

    @classmethod
    def reserve(
        cls, capacity: Capacity, partials: tuple[PartialShape, PartialShape], device: torch.device
    ) -> DevicePlan:
        """Room for a capacity; ``partials`` are those of decode and of prefill."""
        bounds = capacity.decode, capacity.prefill
        # What is copied comes first, and of that the page table last: its rows past the step's batch are not copied.
        shapes: list[tuple[int, ...]] = [(capacity.batch + 1,)]
        for workers, items, parts in bounds:
            shapes += [(workers + 1,), (parts,), (workers + items, COLUMNS)] if items else [(0,)] * 3
        shapes.append((capacity.batch, capacity.max_pages))
        copied = len(shapes)
        for (_, _, parts), (rows, block_dim) in zip(bounds, partials, strict=True):
            shapes += [(parts, rows, block_dim), (parts, rows)]
        starts = _starts(shapes)
        buffer = torch.empty(starts[-1], dtype=torch.int32, device=device)
        sections = [
            Section(buffer, start, shape, torch.int32 if i < copied else torch.float32)
            for i, (start, shape) in enumerate(zip(starts, shapes, strict=False))
        ]
        works = [
            DeviceWork(bound.num_workers, *sections[3 * i + 1 : 3 * i + 4], *sections[2 * i + 8 : 2 * i + 10])
            if bound.items
            else None
            for i, bound in enumerate(bounds)
        ]
        return cls(sections[0], sections[7], StreamOrder(buffer), *works)

    def fill(self, step: StepPlan) -> None:
        """Pack a step that fits and copy it over, on the current stream.

        The last operation must be the copy from the host. A kernel that OVERLAPS begins before the kernel ahead of it
        in the stream has ended, and reads the plan before it waits for that kernel. So no kernel may write the plan
        right ahead of it. A copy from the host begins when everything ahead of it has ended, also the kernel that
        copies a table on the device, and no kernel behind it begins before it has ended.

        Raises:
            ArgumentError: the stream is being captured.
        Cost: one host-to-device copy, which the host does not wait for, and a copy of a table on the device.
        """
        table, buffer = self.page_table, self.page_table.buffer
        columns = table.shape[1]
        self.order.before_copy()
        if step.device_table is None:
            pages, end = step.page_table[:, :columns], table.start + step.batch * columns
        else:
            pages, end = np.empty((step.batch, 0), np.int32), table.start
            used = -(-step.max_seq_len // step.page_size)
            table.tensor[: step.batch, :used].copy_(step.device_table[:, :used])
            step.device_table = table.tensor[: step.batch]  # what kernels read: the caller may refill its own
        # Pinned, so that the copy needs no host thread; torch keeps the memory until the copy is done.
        host = torch.empty(end, dtype=torch.int32, device="cpu", pin_memory=buffer.is_cuda)
        packed = host.numpy()
        _pack_step(pages, step.seq_lens, step.page_size, step.cu_seqlens_q, packed, table.start, columns)
        for room, shares in ((self.decode, step.decode), (self.prefill, step.prefill)):
            if room is not None:
                _pack_work(shares.items, shares.worker_indptr, shares.merges, packed, room.worker_indptr.start,
                           room.arrivals.start, room.items.start)  # fmt: skip
        buffer[:end].copy_(host, non_blocking=True)


def _starts(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Where lists of these shapes begin in a buffer, and how long it is: at least one segment."""
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + -(-math.prod(shape) // SEGMENT) * SEGMENT)
    return [*starts[:-1], starts[-1] + SEGMENT]


@compiled
def _pack_step(
    page_table: Any,
    seq_lens: Any,
    page_size: int,
    cu_seqlens_q: Any,
    packed: Any,
    table_at: int,
    columns: int,
) -> None:
    """Pages in use, row by row, and cu_seqlens_q ahead of all else."""
    for i in range(len(seq_lens)):
        for j in range(min(page_table.shape[1], (seq_lens[i] + page_size - 1) // page_size)):
            packed[table_at + i * columns + j] = page_table[i, j]
    for i in range(len(cu_seqlens_q)):
        packed[i] = cu_seqlens_q[i]


@compiled
def _pack_work(
    items: Any, worker_indptr: Any, merges: Any, packed: Any, indptr_at: int, arrivals_at: int, items_at: int
) -> None:
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
        if items[i, ITEM.partial] >= 0:
            while (
                items[i, ITEM.partial]
                >= merges[merge, MERGE.first_partial] + merges[merge, MERGE.num_partials]
            ):
                merge += 1
            packed[listed + i * COLUMNS + COLUMNS - 2] = merges[merge, MERGE.first_partial]
            packed[listed + i * COLUMNS + COLUMNS - 1] = merges[merge, MERGE.num_partials]
    for worker in range(num_workers):
        # A worker without items does not use this one: it may be another's, or zeros.
        first = listed + min(worker_indptr[worker], len(items) - 1) * COLUMNS
        for column in range(COLUMNS):
            packed[items_at + worker * COLUMNS + column] = packed[first + column] if len(items) else 0
    for worker in range(num_workers + 1):
        packed[indptr_at + worker] = worker_indptr[worker] + num_workers
    packed[arrivals_at:items_at] = 0
