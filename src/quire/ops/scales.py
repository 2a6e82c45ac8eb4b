"""Scales of quantised pages in the forms that callers may give, and in the one form that kernels read.

``write_kv`` computes one scale per token and head, [num_kv_heads, num_pages, page_size]. A caller may instead give a
constant per head, [num_kv_heads], or one for all, [] or [1]. Kernels see it as one per token and head, with strides
of 0.
"""

from __future__ import annotations

from typing import Any

import torch

from quire.kernels.call import BoundCall


def are_given(scale: torch.Tensor | None) -> bool:
    """Whether scales are constants that the caller chose."""
    return scale is not None and scale.dim() < 3


def spread(scale: torch.Tensor, sizes: torch.Size) -> torch.Tensor:
    """A given scale as one per token and head: a view of ``sizes``."""
    return scale.view(-1, 1, 1).expand(sizes)


def taking_given(bound: BoundCall, sizes: torch.Size) -> BoundCall:
    """``bound``, whose last two tensors are k_scale and v_scale, for scales in the form they were given."""

    def call(*tensors: Any) -> None:
        *others, k_scale, v_scale = tensors
        bound(*others, spread(k_scale, sizes), spread(v_scale, sizes))

    return call
