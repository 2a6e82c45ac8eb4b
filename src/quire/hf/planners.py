"""The plans of a model's steps: one Planner per kind of layer, so that what a GPU reads keeps its address."""

from __future__ import annotations

import torch

from quire.hf.chunks import split_at_chunks
from quire.hf.step import Step
from quire.ops.attention_plan import AttentionPlan
from quire.ops.planner import Planner
from quire.planning.checks import Limits
from quire.spans import span
from quire.spec import AttentionSpec, Visibility


class Planners:
    """Plans steps of any size for layers of any kind: a kind is a spec and a visibility.

    Each page table has planners of its own.

    The limits of a kind's planner start with its first step, rounded up to powers of two. A larger step replaces the
    planner by one with room for both: on a GPU the addresses change then, between steps, and a few times only. Steps
    of one token per sequence have a planner of their own, whose launches serve decode alone.

    A plan can be run until the next one of its kind is made, so steps are planned and run one after the other.
    """

    def __init__(self, backend: str, device: torch.device, batch_invariant: bool = False) -> None:
        self.backend, self.device, self.batch_invariant = backend, device, batch_invariant
        self._planners: dict[tuple[AttentionSpec, Visibility, bool, int], Planner] = {}

    def plan(self, step: Step, spec: AttentionSpec, visibility: Visibility, group: int = 0) -> AttentionPlan:
        """Plan a step for the layers of one kind, that share a page table.

        Raises:
            As `Planner` and `Planner.plan`.
        Cost: host only, and on a GPU one copy that the host does not wait for.
        """
        with span("plan"):
            return self._plan(step, spec, visibility, group)

    def _plan(self, step: Step, spec: AttentionSpec, visibility: Visibility, group: int) -> AttentionPlan:
        tables = tables_of(step, spec, visibility, group)
        page_table, _, cu_seqlens_q = tables
        batch, max_pages = page_table.shape
        max_q_len = int(cu_seqlens_q.diff().max())
        sizes = Limits(batch, max_pages * spec.page_size, max_q_len, step.num_tokens)
        key = (spec, visibility, max_q_len == 1, group)
        planner = self._planners.get(key)
        if planner is None or any(size > limit for size, limit in zip(sizes, planner.limits, strict=True)):
            limits = sizes if planner is None else map(max, sizes, planner.limits)
            limits = Limits(*(1 << (size - 1).bit_length() for size in limits))
            planner = self._planners[key] = self.planner(limits, spec, visibility)
        return planner.plan(*tables)

    def planner(self, limits: Limits, spec: AttentionSpec, visibility: Visibility) -> Planner:
        """A planner for the layers of one kind, with limits that do not grow."""
        return Planner(
            spec,
            max_batch=limits.max_batch,
            max_seq_len=limits.max_seq_len,
            max_q_len=limits.max_q_len,
            max_tokens=limits.max_tokens,
            window_left=visibility.window_left,
            batch_invariant=self.batch_invariant,
            backend=self.backend,
            device=self.device,
        )


def tables_of(
    step: Step, spec: AttentionSpec, visibility: Visibility, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page table, seq_lens and cu_seqlens_q of a step, as layers of one kind see them."""
    tables = step.table_of(group), step.seq_lens, step.cu_seqlens_q
    if not visibility.chunk_size:
        return tables
    return split_at_chunks(*tables, chunk_size=visibility.chunk_size, page_size=spec.page_size)
