"""The arguments of one layer's attention, as every backend takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Tensors = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None,
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None,
]  # fmt: skip
# Runs a plan on one layer's tensors, given one by one in the order of AttentionCall.tensors.
BoundCall = Callable[..., None]


class AttentionCall(NamedTuple):
    """Checked arguments of one layer's attention, in the shapes of ``quire.paged_attention``.

    ``out`` is written whole. ``lse``, fp32 [tokens, num_qo_heads], is written where it is not None.
    A backend binds to one call (``kernels.bind``) and then serves every call of the same layout: with every shape,
    stride, dtype, device and number in common, and the same of the optional tensors given.
    """

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    softmax_scale: float | None = None  # 1/√head_dim
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def tensors(self) -> Tensors:
        """All that differs between calls of one layout, in the order in which a bound call takes them."""
        return (
            self.q, self.k_pages, self.v_pages, self.out, self.lse, self.k_scale, self.v_scale,
            self.alibi_slopes, self.sinks, self.tree_mask,
        )  # fmt: skip

    def on(self, tensors: Sequence[Any]) -> AttentionCall:
        """The same call on other tensors."""
        q, k_pages, v_pages, out, lse, k_scale, v_scale, alibi_slopes, sinks, tree_mask = tensors
        return AttentionCall(
            q, k_pages, v_pages, out, lse, self.softmax_scale, self.softcap, alibi_slopes, sinks, tree_mask,
            k_scale, v_scale,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """What q·k is multiplied with."""
        return self.q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
