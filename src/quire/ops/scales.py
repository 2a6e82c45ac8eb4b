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


def spread(
    k_scale: torch.Tensor, v_scale: torch.Tensor, sizes: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Given scales as one per token and head: views of ``sizes``, alike in their strides."""
    if k_scale.shape != v_scale.shape or k_scale.stride() != v_scale.stride():
        k_scale, v_scale = (scale.expand(sizes[:1]).contiguous() for scale in (k_scale, v_scale))
    return k_scale.view(-1, 1, 1).expand(sizes), v_scale.view(-1, 1, 1).expand(sizes)


def taking_given(bound: BoundCall, sizes: torch.Size) -> BoundCall:
    """Wrap a bound call so that it takes given scales and spreads them."""

    def call(*tensors: Any) -> None:
        *others, k_scale, v_scale = tensors
        bound(*others, *spread(k_scale, v_scale, sizes))

    return call
