"""The arguments of one layer's attention, as every backend takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from quire.errors import ArgumentError

# Runs a plan on one layer's tensors, given one by one in the order of AttentionCall.tensors.
BoundCall = Callable[..., None]


class Scoring(NamedTuple):
    """How scores are made of queries and keys: the arguments of ``AttentionPlan.run`` behind its tensors.

    Numbers come first. The operators' schemas, the checks and the order of a bound call's tensors follow these fields.
    """

    softmax_scale: float | None = None  # 1/√head_dim
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def numbers(self) -> tuple[float | None, float]:
        """softmax_scale and softcap."""
        return self[:2]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The other arguments: None where one is not given."""
        return self[2:]


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
    scoring: Scoring = Scoring()

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All that differs between calls of one layout, in the order in which a bound call takes them."""
        return *self[:5], *self.scoring.tensors

    @classmethod
    def of(cls, tensors: Sequence[Any], numbers: tuple[float | None, float]) -> AttentionCall:
        """The call with these ``tensors``, and with ``scoring.numbers``."""
        q, k_pages, v_pages, out, lse, *optional = tensors
        return cls(q, k_pages, v_pages, out, lse, Scoring(*numbers, *optional))

    @property
    def scale(self) -> float:
        """What q·k is multiplied with."""
        scale = self.scoring.softmax_scale
        return self.q.shape[-1] ** -0.5 if scale is None else scale


def outside_the_pool(slots: torch.Tensor, num_slots: int) -> ArgumentError:
    """The error of a write to slots of which some are neither in the pool nor −1."""
    return ArgumentError(
        f"slot_mapping must lie between −1 and {num_slots - 1}; got values from {int(slots.min())} to "
        f"{int(slots.max())}. Fix: use the slots that PageTable.append returned for this pool"
    )
