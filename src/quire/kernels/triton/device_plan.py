"""A step's plan on the device: every index list in one int32 buffer, moved by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quire.work import StepPlan, WorkList

SEGMENT = 4  # int32s: every list starts on 16 bytes


@dataclass(frozen=True)
class DeviceWork:
    """One kernel's work list and the room for its partial states; see ``work.WorkList`` for the columns."""

    items: torch.Tensor  # int32 [num_items, 8]
    worker_indptr: torch.Tensor  # int32 [num_workers + 1]
    parts: torch.Tensor  # int32 [num_partials, 2]: the first partial of this one's tile, and how many it has
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
    arrays = [step.page_table, step.cu_seqlens_q]
    for work, _, _ in lists:
        parts = np.repeat(work.merges[:, 3:5], work.merges[:, 4], axis=0)
        arrays += [work.items, work.worker_indptr, parts, np.zeros(work.num_partials, np.int32)]
    views = iter(_copy_packed(arrays, device))
    page_table, cu_seqlens_q = next(views), next(views)
    moved = []
    for work, rows, block_dim in lists:
        size = (work.num_partials, rows)
        partial_out = torch.empty((*size, block_dim), dtype=torch.float32, device=device)
        partial_lse = torch.empty(size, dtype=torch.float32, device=device)
        moved.append(
            DeviceWork(next(views), next(views), next(views), next(views), partial_out, partial_lse)
        )
    return DevicePlan(page_table, cu_seqlens_q, tuple(moved))


def _copy_packed(arrays: Sequence[NDArray[np.integer]], device: torch.device) -> list[torch.Tensor]:
    starts = np.cumsum([0] + [-(-array.size // SEGMENT) * SEGMENT for array in arrays]).tolist()
    # Pinned, so that the copy needs no host thread; torch keeps the memory until the copy is done.
    host = torch.empty(starts[-1] + SEGMENT, dtype=torch.int32, pin_memory=device.type == "cuda")
    packed = host.numpy()
    for array, start in zip(arrays, starts, strict=False):
        packed[start : start + array.size] = array.reshape(-1)
    moved = host.to(device, non_blocking=True)
    return [
        moved[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts, strict=False)
    ]
