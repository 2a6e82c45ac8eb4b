"""A step's attention, planned: what every layer of the step runs.

A call's *layout* is everything but addresses and values: shapes, strides, dtypes, devices, numbers, and which optional
tensors are given. The layout decides whether a call is right and how its kernels are launched. A call is therefore
checked and bound to its kernels once per layout; every layer after that only hands its tensors over.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Hashable
from functools import partial
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np
import torch

from quire.debug import debug_enabled
from quire.errors import ArgumentError
from quire.kernels.call import AttentionCall, BoundCall, Scoring
from quire.ops import checks
from quire.ops.scales import are_given, spread, taking_given
from quire.ops.torch_op import SCORING, is_watched, register
from quire.planning import checks as step_checks
from quire.planning.explain import explain
from quire.planning.step import on_other_pages
from quire.planning.work_list import StepPlan
from quire.spec import AttentionSpec
from quire.state import SoftmaxState

_plan_numbers = itertools.count()
# Living plans by number. A WeakValueDictionary would take half a microsecond more of every plan.
_plans: dict[int, weakref.ref[AttentionPlan]] = {}


class AttentionPlan:
    """One step's attention, planned on the host and run once per layer. Made by ``plan`` or by a ``Planner``."""

    def __init__(
        self,
        spec: AttentionSpec,
        backend: str,
        device: torch.device,
        step: StepPlan,
        max_q_len: int,
        kernels: ModuleType,
        prepared: Any,
        bound: dict[Hashable, BoundCall],
    ) -> None:
        self.spec, self.backend, self.device, self.step = spec, backend, device, step
        self.num_tokens, self.max_q_len = step.num_tokens, max_q_len
        self._kernels, self._prepared, self._bound = kernels, prepared, bound
        self._replaced = False
        self._last: tuple[Hashable, BoundCall | None] = None, None
        # A tensor, so that a compiled graph takes each step's plan as an input instead of being compiled anew.
        number = next(_plan_numbers)
        self._number = torch.from_numpy(np.array(number))
        _plans[number] = weakref.ref(self, partial(_plans.pop, number))

    def __repr__(self) -> str:
        return f"AttentionPlan({self.backend}, {self.step.batch} sequences, {self.num_tokens} query tokens)"

    @property
    def page_indptr(self) -> torch.Tensor:
        """int32 [batch + 1]: where each sequence's pages start in ``page_indices``."""
        return torch.from_numpy(self.step.page_indptr)

    @property
    def page_indices(self) -> torch.Tensor:
        """int32 [pages]: physical pages of all sequences end to end."""
        return torch.from_numpy(self.step.page_indices)

    @property
    def page_offsets(self) -> torch.Tensor:
        """int32 [pages]: the logical token at which each page starts."""
        return torch.from_numpy(self.step.page_offsets)

    @property
    def page_valid_lengths(self) -> torch.Tensor:
        """int32 [pages]: tokens of each page that hold keys."""
        return torch.from_numpy(self.step.page_valid_lengths)

    @overload
    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, softmax_scale: float | None = None,
        softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None, return_state: Literal[False] = False,
    ) -> torch.Tensor: ...  # fmt: skip

    @overload
    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, softmax_scale: float | None = None,
        softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None, return_state: Literal[True],
    ) -> SoftmaxState: ...  # fmt: skip

    @overload
    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, softmax_scale: float | None = None,
        softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None, return_state: bool,
    ) -> torch.Tensor | SoftmaxState: ...  # fmt: skip

    def run(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | SoftmaxState:
        """Attend each query token to its own sequence's pages.

        Args:
            q: packed queries [tokens, num_qo_heads, head_dim]; planned dtype and device. Rows past the planned tokens
                are padding: they are not read.
            k_pages, v_pages: one layer's pages [num_kv_heads, num_pages, page_size, head_dim].
            softmax_scale: 1/√head_dim when None.
            softcap: c > 0 bounds scores to c·tanh(score / c).
            alibi_slopes: float32 [num_qo_heads]; adds −slope·|distance|.
            sinks: float32 [num_qo_heads], each finite or −inf; a logit in the softmax that has no value.
                Values are not checked: with another the rows of its head mean nothing.
            tree_mask: bool [tokens, max_q_len]: may packed query i see the j-th of its sequence's tokens of
                this step? It only hides: the causal rule holds beside it, so a tree's parents come before
                their children, and earlier keys stay visible. Distances (window, ALiBi) count slots.
            k_scale, v_scale: where pages are quantised, float32 [num_kv_heads, num_pages, page_size] as ``write_kv``
                writes them, or the [num_kv_heads] or [] that it was given. None is negative; a given one is finite.
                Values are not checked: with others the rows that read them mean nothing.
            out: [tokens, num_qo_heads, head_dim], written instead of a new tensor; value_dim where the spec has one.
                Its rows past the planned tokens stay as they are.
            return_state: return a SoftmaxState. Its lse counts the sink, so of several states to be merged
                only one may have been given the sinks.
        Returns:
            Like q, or a SoftmaxState. Rows that see no key are zero; their lse is the sink's logit, or −inf without.
            Rows of padding are zero where ``out`` is not given, and their lse is −inf.
        Raises:
            ShapeError, DtypeError, DeviceError: an argument does not fit the plan.
            ArgumentError: a page id of the plan is outside these pages; a number or an optional tensor that is none.
        Cost: no host sync; no allocation when ``out`` is given.
        Source: PagedAttention, arXiv:2309.06180 §4.1; online softmax, arXiv:1805.02867.
        """
        watched = is_watched(q)
        scoring = softmax_scale, softcap, alibi_slopes, sinks, tree_mask, k_scale, v_scale
        if watched:
            checks.check_door(q, k_pages, v_pages, out, Scoring(*scoring))
        # A compiled graph would be compiled anew for each number of tokens if it compared them.
        padded = watched or q.shape[:1] != (self.num_tokens,)
        out, lse = make_outputs(q, self.spec.value_dim, out, return_state, padded)
        if watched:
            torch.ops.quire.run_plan(self._number, q, k_pages, v_pages, out, lse, *scoring)
        else:
            self.attend(q, k_pages, v_pages, out, lse, scoring)
        return out if lse is None else SoftmaxState(out, lse)

    def with_page_table(self, page_table: torch.Tensor) -> AttentionPlan:
        """The same step over other pages: for layers that keep their keys and values under another page table.

        Args:
            page_table: int32 [batch, max_pages], of this plan's sequences; copied.
        Returns:
            A plan of its own, which does not end with this one.
        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: as in ``plan``.
        Cost: less than ``plan``: the work is divided already.
        """
        step_checks.check_step(page_table, torch.from_numpy(self.step.seq_lens), None)
        table = page_table if page_table.is_cpu else within_reach(page_table, self._kernels, self.device)
        step = on_other_pages(self.step, table)
        prepared = self._kernels.prepare(self.spec, step, self.device)
        return AttentionPlan(
            self.spec, self.backend, self.device, step, self.max_q_len, self._kernels, prepared, {}
        )

    def explain(self) -> str:
        """The plan in words: kernels, items, splits, bytes to read and balance, a line each."""
        return explain(self.spec, self.backend, self.step, getattr(self._prepared, "notes", ()))

    def attend(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor | None, scoring: tuple[Any, ...], layer_checked: bool = False,
    ) -> None:  # fmt: skip
        """Run the kernels on one layer's tensors, checked and bound if none of this layout came before.

        ``scoring`` holds the fields of ``Scoring``: a plain tuple, because a NamedTuple takes longer to make.
        ``layer_checked``: ``checks.check_layer`` made the plan's spec of these q and pages.
        """
        # Name by name: a loop over the tuple would take half a microsecond more.
        softmax_scale, softcap, alibi_slopes, sinks, tree_mask, k_scale, v_scale = scoring
        layout_of = checks.layout_of
        try:
            layout: Hashable = (
                q.shape, q.stride(), q.dtype, q.device, q.requires_grad and torch.is_grad_enabled(),
                k_pages.shape, k_pages.stride(), k_pages.dtype, k_pages.device,
                v_pages.shape, v_pages.stride(), v_pages.dtype, v_pages.device,
                out.shape, out.stride(), out.dtype, out.device,
                lse if lse is None else lse.stride(),
                type(softmax_scale), softmax_scale, type(softcap), softcap,  # True is no number, and equal to 1.0
                alibi_slopes if alibi_slopes is None else layout_of(alibi_slopes),
                sinks if sinks is None else layout_of(sinks),
                tree_mask if tree_mask is None else layout_of(tree_mask),
                k_scale if k_scale is None else layout_of(k_scale),
                v_scale if v_scale is None else layout_of(v_scale),
            )  # fmt: skip
            # The layers of a step are mostly alike, and tuples are compared faster than they are hashed.
            last, bound = self._last
            if layout != last:
                bound = self._bound.get(layout)
                if bound is not None and self.step.highest_page >= k_pages.shape[1]:
                    bound = None  # bound by another plan, whose page ids are in the pool
                elif bound is not None:
                    self._keep(layout, bound)
        except (AttributeError, TypeError, RuntimeError):
            layout, bound = None, None  # an argument is no tensor or no number: the checks say which
        if bound is None:
            bound = self._bind(
                layout, AttentionCall(q, k_pages, v_pages, out, lse, Scoring(*scoring)), layer_checked
            )
        bound(q, k_pages, v_pages, out, lse, alibi_slopes, sinks, tree_mask, k_scale, v_scale)

    def check_pages(self, num_pages: int) -> None:
        """Refuse page ids outside a pool, of a table that came from the host; in debug mode of any table.

        Raises:
            ArgumentError: such an id.
        """
        step = self.step
        if step.highest_page >= num_pages or (step.device_table is not None and debug_enabled()):
            step_checks.check_page_ids(step.page_table, step.seq_lens, step.page_size, num_pages)

    def _bind(self, layout: Hashable, call: AttentionCall, layer_checked: bool) -> BoundCall:
        """Check a call, then bind its kernels."""
        if self._replaced:
            raise ArgumentError(
                "a plan must be the latest of its Planner to be run; got one whose memory a later step took. "
                "Fix: plan and run one step after the other, or plan this one with quire.plan"
            )
        if layer_checked:
            checks.check_beside_layer(self.spec, call)
        else:
            checks.check_call(self.spec, self.num_tokens, self.device, call)
        checks.check_tree_mask(call.scoring.tree_mask, self.num_tokens, self.max_q_len)
        self.check_pages(call.k_pages.shape[1])
        scoring, sizes, bind = call.scoring, call.k_pages.shape[:3], self._kernels.bind
        bound: BoundCall
        if scoring.k_scale is not None and scoring.v_scale is not None and are_given(scoring.k_scale):
            k_scale, v_scale = spread(scoring.k_scale, scoring.v_scale, sizes)
            scoring = scoring._replace(k_scale=k_scale, v_scale=v_scale)
            bound = taking_given(bind(self._prepared, call._replace(scoring=scoring)), sizes)
        else:
            bound = bind(self._prepared, call)
        self._keep(layout, bound)
        return bound

    def _keep(self, layout: Hashable, bound: BoundCall) -> None:
        """For calls of this layout, unless another thread has replaced this plan meanwhile."""
        self._bound[layout], self._last = bound, (layout, bound)
        if self._replaced:
            self.replace()

    def replace(self) -> None:
        """A later plan has taken this one's memory."""
        self._replaced = True  # first: ``_keep`` looks at it last
        self._bound, self._last = {}, (None, None)


def within_reach(page_table: torch.Tensor, kernels: ModuleType, where: torch.device) -> torch.Tensor:
    """A table on a device, or a copy on the host where the kernels do not read it there."""
    step_checks.check_host(page_table=page_table)
    stays = page_table.device == where and getattr(kernels, "TAKES_DEVICE_TABLES", False)
    return page_table if stays else page_table.cpu()


def make_outputs(
    q: torch.Tensor, value_dim: int | None, out: torch.Tensor | None, return_state: bool, padded: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result where the caller gave none, and lse where it is asked for.

    ``padded``: q may have rows that no kernel writes; new tensors then hold the result of a row that sees no key.
    """
    if out is None:
        out = q.new_empty(*q.shape[:2], value_dim) if value_dim is not None else _empty_like(q)
        if padded:
            out.zero_()
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if return_state else None
    if lse is not None and padded:
        lse.fill_(-math.inf)
    return out, lse


def _empty_like(q: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _run_plan(
    plan_number: torch.Tensor, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor | None, *scoring: Any,
) -> None:  # fmt: skip
    plan: Any = _plans[int(plan_number)]()  # its caller holds it
    plan.attend(q, k_pages, v_pages, out, lse, scoring)


register(
    "run_plan",
    f"Tensor plan_number, Tensor q, Tensor k_pages, Tensor v_pages, Tensor(a!) out, Tensor(b!)? lse, {SCORING}",
    _run_plan,
)
