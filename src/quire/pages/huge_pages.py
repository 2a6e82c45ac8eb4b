"""Memory in huge pages: reading it misses the TLB once per 2 MiB instead of once per 4 KiB.

Both functions are requests. Only speed changes, and where the system cannot grant them, nothing does.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch

_HUGE_PAGE_BYTES = 1 << 21
_ALLOCATOR_GAP_BYTES = 1 << 13  # what malloc leaves between two neighbours
_MADV_COLLAPSE = 25  # Linux 6.1; Python's mmap does not name it


def back_with_huge_pages(tensor: torch.Tensor) -> None:
    """Ask Linux to use 2 MiB pages where this tensor's memory is touched for the first time.

    Args:
        tensor: newly made; nothing happens if it is not in host memory.
    Cost: one system call.
    """
    if tensor.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        storage = tensor.untyped_storage()
        _advise(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), mmap.MADV_HUGEPAGE)


def collapse_to_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Ask Linux to move tensors that are in use already into 2 MiB pages, at the same addresses.

    Args:
        tensors: whatever is read often and whole; those not in host memory are left alone.
    Cost: moves the memory once, at about 1 GB/s.
    """
    if sys.platform == "linux":
        for begin, end in _neighbours(tensors):
            _advise(begin, end, _MADV_COLLAPSE)


def _advise(begin: int, end: int, advice: int) -> None:
    """madvise for the whole huge pages between two addresses, if there are any."""
    first = -(-begin // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    length = end // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - first
    if length > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(advice))


def _neighbours(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Address ranges of the tensors, those side by side as one: few begin where a huge page does."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        if ranges and begin - ranges[-1][1] <= _ALLOCATOR_GAP_BYTES:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges
