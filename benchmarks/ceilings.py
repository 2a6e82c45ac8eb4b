"""What this machine can do at most, measured beside what is compared with it, on as many bytes.

Reading: the faster of two PyTorch reductions that do next to nothing with what they read, on memory that lies as a
pool's does. Multiplying: a matrix product in the case's dtype, and one in float32, whose three matrices together are
as large as the case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import quire
from benchmarks.cases import Case
from benchmarks.turns import Spread, Turn, stopwatch

READ, GEMM, SGEMM = "ceiling: read", "ceiling: gemm", "ceiling: sgemm"
NAMES = (READ, GEMM, SGEMM)
SMALLEST, LARGEST = 256, 4096  # rows of a matrix: smaller ones measure the call, larger ones take seconds


@dataclass(frozen=True)
class Ceilings:
    """Bytes and FLOPs of one turn of each ceiling of a case, and the turns themselves."""

    turns: dict[str, Turn]
    bytes_read: int
    flops: dict[str, int]

    def rates(self, spreads: Mapping[str, Spread]) -> dict[str, float]:
        """Bytes per second read, FLOPs per second multiplied, from the medians of this run."""
        read = min(spread.median for name, spread in spreads.items() if name.startswith(READ))
        rates = {name: flops / spreads[name].median for name, flops in self.flops.items()}
        return {READ: self.bytes_read / read} | rates


def make_ceilings(case: Case) -> Ceilings:
    """Arrays of the case's size, and what to do with them."""
    numbers = _ones(max(case.kv_bytes, 1 << 16) // 4)
    turns = {
        f"{READ} sum": stopwatch(numbers.sum),
        f"{READ} dot": stopwatch(lambda: torch.dot(numbers, numbers)),
    }
    flops = {}
    for name, dtype in ((GEMM, case.spec.dtype), (SGEMM, torch.float32)):
        size = gemm_size(case.working_set, dtype)
        turns[name] = stopwatch(_product(size, dtype))
        flops[name] = 2 * size**3
    return Ceilings(turns, numbers.numel() * 4, flops)


def _ones(count: int) -> torch.Tensor:
    """Numbers of a pool's memory: on huge pages, where the system has them, or the yardstick would flatter.

    The pool's other half, its values, is never touched and so takes no memory.
    """
    spec = quire.AttentionSpec(1, 1, head_dim=16, page_size=1, dtype=torch.float32)
    return quire.KVPool(spec, num_layers=1, num_pages=-(-count // spec.head_dim)).k.view(-1)[:count].fill_(1)


def gemm_size(nbytes: int, dtype: torch.dtype) -> int:
    """Rows of three square matrices that are so many bytes together, in whole tiles of 64.

    The smallest for float16, which PyTorch multiplies number by number where the CPU has no instructions for it: as
    large as a case, one product takes minutes.
    """
    if dtype == torch.float16:
        return SMALLEST
    size = math.isqrt(nbytes // (3 * dtype.itemsize)) // 64 * 64
    return min(max(size, SMALLEST), LARGEST)


def _product(size: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)
