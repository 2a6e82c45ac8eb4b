"""Softmax states: attention over one set of keys, ready to be merged with attention over another."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.errors import ShapeError


class SoftmaxState(NamedTuple):
    """Attention over one set of keys, in a form that can be merged with attention over another.

    out: like the queries [tokens, num_qo_heads, head_dim], normalised over its own keys.
    lse: float32 [tokens, num_qo_heads], natural log of the sum of exponentiated scaled scores; −inf for none.
    """

    out: torch.Tensor
    lse: torch.Tensor


def merge(state_a: SoftmaxState, state_b: SoftmaxState) -> SoftmaxState:
    """Exact attention over the union of two disjoint key sets.

        lse = log(exp(lse_a) + exp(lse_b)),    out = out_a·exp(lse_a − lse) + out_b·exp(lse_b − lse)

    Args:
        state_a, state_b: states of the same queries, [tokens, num_qo_heads, head_dim] and
            [tokens, num_qo_heads] each.
    Returns:
        A state with state_a's dtypes. Merging with an empty row (lse −inf) changes nothing, bit for bit.
    Raises:
        ShapeError: states of different shapes.
    Source: FlashDecoding; arXiv:2501.01005 §2.2.
    """
    if state_a.out.shape != state_b.out.shape or state_a.lse.shape != state_b.lse.shape:
        raise ShapeError(
            f"state_b must have state_a's shapes {list(state_a.out.shape)} and {list(state_a.lse.shape)}; got "
            f"{list(state_b.out.shape)} and {list(state_b.lse.shape)}. Fix: merge states of the same queries"
        )
    empty_a, empty_b = torch.isneginf(state_a.lse), torch.isneginf(state_b.lse)
    lse = torch.logaddexp(state_a.lse, state_b.lse)
    weight_a = torch.exp(state_a.lse - lse)[..., None]
    weight_b = torch.exp(state_b.lse - lse)[..., None]
    blended = (state_a.out.float() * weight_a + state_b.out.float() * weight_b).to(state_a.out.dtype)
    out = torch.where(empty_b[..., None], state_a.out, torch.where(empty_a[..., None], state_b.out, blended))
    lse = torch.where(empty_b, state_a.lse, torch.where(empty_a, state_b.lse, lse))
    return SoftmaxState(out, lse)
