"""A step's plan on the device: every index list in one int32 buffer, moved by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quire import work
from quire.work import StepPlan, WorkList

SEGMENT = 4  # int32s: every list starts on 16 bytes
# Columns of an item on the device: those of the host, and where its tile's parts are; num_parts is 1 for a whole tile.
ITEM_COLUMNS = (*work.ITEM_COLUMNS, "first_partial", "num_parts")


@dataclass(frozen=True)
class DeviceWork:
    """One kernel's work list and the room for its partial states; see ``work.WorkList`` for the columns."""

    items: torch.Tensor  # int32 [num_workers + num_items, 10], see ITEM_COLUMNS: each worker's first, then all
    worker_indptr: torch.Tensor  # int32 [num_workers + 1] into items
    arrivals: torch.Tensor  # int32 [num_partials]: parts finished so far, counted at the first one's place
    partial_out: torch.Tensor  # float32 [num_partials, rows, block_dim]
    partial_lse: torch.Tensor  # float32 [num_partials, rows], base 2

    @property
    def num_workers(self) -> int:
        return len(self.worker_indptr) - 1


@dataclass(frozen=True)
class DevicePlan:
    """What both kernels read of a step."""

    page_table: torch.Tensor  # int32 [batch, max_pages]
    cu_seqlens_q: torch.Tensor  # int32 [batch + 1]
    work: tuple[DeviceWork, ...]


def move_to_device(
    step: StepPlan, lists: Sequence[tuple[WorkList, int, int]], device: torch.device
) -> DevicePlan:
    """Pack a step and its work lists, each with its tile's rows and block_dim, and copy them over.

    Cost: one host-to-device copy, which the host does not wait for.
    """
    arrays: list[NDArray[np.integer]] = [step.page_table, step.cu_seqlens_q]
    for shares, _, _ in lists:
        arrays += [*device_items(shares), np.zeros(shares.num_partials, np.int32)]
    views = iter(_copy_packed(arrays, device))
    page_table, cu_seqlens_q = next(views), next(views)
    moved = []
    for shares, rows, block_dim in lists:
        size = (shares.num_partials, rows)
        partial_out = torch.empty((*size, block_dim), dtype=torch.float32, device=device)
        partial_lse = torch.empty(size, dtype=torch.float32, device=device)
        moved.append(DeviceWork(next(views), next(views), next(views), partial_out, partial_lse))
    return DevicePlan(page_table, cu_seqlens_q, tuple(moved))


def device_items(shares: WorkList) -> tuple[NDArray[np.int32], NDArray[np.integer]]:
    """A work list's items with the columns ITEM_COLUMNS behind a copy of each worker's first, and worker_indptr."""
    num_workers = len(shares.worker_indptr) - 1
    items = np.empty((num_workers + len(shares.items), len(ITEM_COLUMNS)), np.int32)
    listed = items[num_workers:]
    listed[:, :8] = shares.items
    listed[:, 8], listed[:, 9] = 0, 1
    split = shares.items[:, 7] >= 0  # in the order of their partials
    first, count = shares.merges[:, 3], shares.merges[:, 4]
    listed[split, 8] = np.repeat(first, count)
    listed[split, 9] = np.repeat(count, count)
    # Who has no items gets somebody's, and does not look at it.
    items[:num_workers] = listed[np.minimum(shares.worker_indptr[:-1], len(listed) - 1)]
    return items, shares.worker_indptr + num_workers


def _copy_packed(arrays: Sequence[NDArray[np.integer]], device: torch.device) -> list[torch.Tensor]:
    starts = np.cumsum([0] + [-(-array.size // SEGMENT) * SEGMENT for array in arrays]).tolist()
    # Pinned, so that the copy needs no host thread; torch keeps the memory until the copy is done.
    host = torch.empty(starts[-1] + SEGMENT, dtype=torch.int32, pin_memory=device.type == "cuda")
    packed = host.numpy()
    for array, start in zip(arrays, starts, strict=False):
        packed[start : start + array.size] = array.reshape(-1)
    moved = host.to(device, non_blocking=True)
    return [
        moved[start : start + array.size].view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]
