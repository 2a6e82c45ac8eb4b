"""Softmax states: attention over one set of keys, ready to be merged with attention over another."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.errors import ArgumentError, ShapeError


class SoftmaxState(NamedTuple):
    """Attention over one set of keys, in a form that can be merged with attention over another.

    out: like the queries [tokens, num_qo_heads, head_dim], normalised over its own keys; 0 where there is none.
    lse: float32 [tokens, num_qo_heads], natural log of the sum of exponentiated scaled scores, the sink's among them;
        −inf without key or sink.
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
        A state with state_a's dtypes. Merging with a row of lse −inf changes nothing, bit for bit. A row that saw no
        key but has a sink has out 0 and a finite lse, and counts by the formula.
    Raises:
        ShapeError: states of different shapes.
        ArgumentError: what is not two tensors.
    Source: FlashDecoding; arXiv:2501.01005 §2.2.
    """
    for name, state in (("state_a", state_a), ("state_b", state_b)):
        if not isinstance(state, tuple) or len(state) != 2:
            raise ArgumentError(
                f"{name} must be a SoftmaxState; got {type(state).__name__}. Fix: return_state=True"
            )
        if not all(isinstance(tensor, torch.Tensor) for tensor in state):
            raise ArgumentError(
                f"{name} must be two tensors, out and lse; got {', '.join(type(part).__name__ for part in state)}. "
                "Fix: return_state=True"
            )
    state_a, state_b = SoftmaxState(*state_a), SoftmaxState(*state_b)
    shapes = [list(tensor.shape) for tensor in (*state_a, *state_b)]
    if not shapes[0] == shapes[2] or not shapes[0][:-1] == shapes[1] == shapes[3]:
        raise ShapeError(
            "state_a and state_b must both be [tokens, num_qo_heads, head_dim] and [tokens, num_qo_heads]; got "
            f"{shapes[0]} and {shapes[1]}, {shapes[2]} and {shapes[3]}. Fix: merge states of the same queries"
        )
    dtype = state_a.out.dtype
    empty_a, empty_b = torch.isneginf(state_a.lse), torch.isneginf(state_b.lse)
    lse = torch.logaddexp(state_a.lse, state_b.lse)
    weight_a = torch.exp(state_a.lse - lse)[..., None]
    weight_b = torch.exp(state_b.lse - lse)[..., None]
    blended = (state_a.out.float() * weight_a + state_b.out.float() * weight_b).to(dtype)
    out = torch.where(
        empty_b[..., None], state_a.out, torch.where(empty_a[..., None], state_b.out.to(dtype), blended)
    )
    lse = torch.where(empty_b, state_a.lse, torch.where(empty_a, state_b.lse, lse))
    return SoftmaxState(out, lse)
