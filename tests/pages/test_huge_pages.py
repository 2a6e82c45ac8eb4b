"""Huge pages: asked for where tensors lie, neighbours together, and nothing but speed may change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from quire.pages.huge_pages import _ALLOCATOR_GAP_BYTES, _neighbours, collapse_to_huge_pages

MIB = 1 << 20


def test_neighbours_are_one_range_and_strangers_are_not():
    memory = torch.empty(8 * MIB, dtype=torch.uint8).untyped_storage()
    start = memory.data_ptr()

    class At:
        device = torch.device("cpu")

        def __init__(self, offset, size):
            self.offset, self.size = offset, size

        def untyped_storage(self):
            return self

        def data_ptr(self):
            return start + self.offset

        def nbytes(self):
            return self.size

    tensors = [At(3 * MIB, 100), At(0, MIB), At(MIB + _ALLOCATOR_GAP_BYTES, MIB), At(MIB // 2, 10)]
    ranges = [(begin - start, end - start) for begin, end in _neighbours(tensors)]
    assert ranges == [(0, 2 * MIB + _ALLOCATOR_GAP_BYTES), (3 * MIB, 3 * MIB + 100)]


def test_values_stay_and_tensors_elsewhere_are_left_alone():
    weights = [torch.randn(1100, 1000) for _ in range(3)]
    before = [weight.clone() for weight in weights]
    collapse_to_huge_pages([*weights, torch.empty(3, device="meta"), torch.empty(0)])
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, before, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="a wish that Linux alone grants")
def test_linux_grants_the_wish_where_it_can():
    if "never" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]:
        pytest.skip("this system has huge pages switched off")
    weight = torch.ones(8 * MIB)

    def huge_kib() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    before = huge_kib()
    collapse_to_huge_pages([weight])
    if huge_kib() == before:
        pytest.skip("this kernel has no MADV_COLLAPSE, or no memory in one piece")
    assert huge_kib() - before >= 16 * 1024
    assert bool((weight == 1).all())
