"""Slots against the pool, before anything is written. Compiled by Numba."""

from __future__ import annotations

from quire.kernels.compile import compiled, load_i64


@compiled
def any_outside(address: int, count: int, stride: int, num_slots: int) -> bool:
    """Whether any of ``count`` int64 slots, ``stride`` bytes apart, is below −1 or no slot of the pool."""
    lowest = highest = 0
    if stride == 8:  # known to the compiler, which then makes vectors of the loop
        for i in range(count):
            slot = load_i64(address + i * 8)
            lowest, highest = min(lowest, slot), max(highest, slot)
    else:
        for i in range(count):
            slot = load_i64(address + i * stride)
            lowest, highest = min(lowest, slot), max(highest, slot)
    return lowest < -1 or highest >= num_slots
