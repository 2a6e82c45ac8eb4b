"""The small batch of all kinds of sequences on which the public operator is tested."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import exact
from support import Batch, Shape, make_batch

import quire

SHAPE = Shape(torch.float32, head_dim=16, group=2)
PAGE = 4


def mixed(seed: int = 0, **how: Any) -> Batch:
    """Decode, prefill, a chunk behind a cached prefix, and an empty sequence."""
    return make_batch(SHAPE, [9, 6, 14, 0], [1, 6, 5, 1], page_size=PAGE, seed=seed, **how)


def paged(batch: Batch, **rules: Any) -> Any:
    return quire.paged_attention(*batch.pages, *batch.lengths, **rules)


def close(result: torch.Tensor, batch: Batch, **rules: Any) -> None:
    torch.testing.assert_close(result.double(), exact(batch, **rules).out, atol=2e-6, rtol=2e-6)


def untouched(batch: Batch) -> torch.Tensor:
    """An output that shows whether anything was written."""
    return torch.full(batch.q.shape, 7.0, dtype=batch.q.dtype)
