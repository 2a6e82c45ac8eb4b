"""The public operator: check → plan → dispatch.

``paged_attention`` does all three for one call. Where many layers share a step, ``plan`` does the host's part
once and ``AttentionPlan.run`` the rest per layer. Both go through operators registered with torch, so that
``torch.compile(fullgraph=True)`` keeps them whole.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch

from quire import checks, step_checks
from quire.custom_op import is_watched, register
from quire.debug import debug_enabled
from quire.errors import ArgumentError
from quire.explain import explain
from quire.kernels import load_backend, resolve_backend
from quire.plan import plan_step
from quire.spec import AttentionSpec
from quire.state import SoftmaxState
from quire.work import AttentionCall, StepPlan

_plan_numbers, _layout_numbers = itertools.count(), itertools.count()
_plans: weakref.WeakValueDictionary[int, AttentionPlan] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """One step's attention, planned on the host and run once per layer. Made by ``plan``."""

    spec: AttentionSpec
    backend: str
    device: torch.device
    step: StepPlan
    num_tokens: int
    _kernels: ModuleType = field(repr=False)
    _prepared: Any = field(repr=False)
    # A tensor, so that a compiled graph takes each step's plan as an input instead of being compiled anew.
    _number: torch.Tensor = field(repr=False)
    _layouts: dict[Hashable, int] = field(repr=False)  # of calls that were checked, numbered

    @property
    def max_q_len(self) -> int:
        """Query tokens of the sequence that has most."""
        return self.step.max_q_len

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
    ) -> Any:  # a tensor, or a SoftmaxState where asked for: a union would cost every caller a cast
        """Attend each query token to its own sequence's pages.

        Args:
            q: packed queries [tokens, num_qo_heads, head_dim]; planned dtype and device.
            k_pages, v_pages: one layer's pages [num_kv_heads, num_pages, page_size, head_dim].
            softmax_scale: 1/√head_dim when None.
            softcap: c > 0 bounds scores to c·tanh(score / c).
            alibi_slopes: float32 [num_qo_heads]; adds −slope·|distance|.
            sinks: float32 [num_qo_heads]; a logit that takes part in the softmax and has no value.
            tree_mask: bool [tokens, max_q_len]: may packed query i see the j-th of its sequence's tokens of
                this step? It only hides: the causal rule holds beside it, so a tree's parents come before
                their children, and earlier keys stay visible. Distances (window, ALiBi) count slots.
            k_scale, v_scale: float32 [num_kv_heads, num_pages, page_size] where pages are quantised.
            out: written instead of a new tensor.
            return_state: return a SoftmaxState. Its lse counts the sink, so of several states to be merged
                only one may have been given the sinks.
        Returns:
            Like q, or a SoftmaxState. Rows that see no key are zero, with lse −inf.
        Raises:
            ShapeError, DtypeError, DeviceError: an argument does not fit the plan.
        Cost: no host sync; no allocation when ``out`` is given.
        Source: PagedAttention, arXiv:2309.06180 §4.1; online softmax, arXiv:1805.02867.
        """
        _check_door(q, k_pages, v_pages, out, alibi_slopes, sinks, tree_mask, k_scale, v_scale)
        checks.check_numbers(softcap=softcap, softmax_scale=softmax_scale)
        out, lse = _outputs(q, out, return_state)
        call = (
            q, k_pages, v_pages, out, lse, softmax_scale, softcap, alibi_slopes, sinks, tree_mask, k_scale, v_scale,
        )  # fmt: skip
        if is_watched(q):
            torch.ops.quire.run_plan(self._number, *call)
        else:
            self.attend(*call)
        return out if lse is None else SoftmaxState(out, lse)

    def explain(self) -> str:
        """The plan in words: kernels, items, splits, bytes to read and balance, a line each."""
        return explain(self.spec, self.backend, self.step, getattr(self._prepared, "notes", ()))

    def attend(self, *arguments: Any) -> None:
        """Check one layer's arguments, those of an ``AttentionCall``, and dispatch them to the backend."""
        q, k_pages, v_pages, out, lse, softmax_scale, softcap, *optional = arguments
        records_gradient = q.requires_grad and torch.is_grad_enabled()
        tensors = checks.layout_of(q, k_pages, v_pages, out, lse, *optional)
        layout = tensors, softmax_scale, softcap, records_gradient
        number = self._layouts.get(layout)
        if number is None:
            self._check(AttentionCall(*arguments))
            number = self._layouts.setdefault(layout, next(_layout_numbers))
        self._kernels.attend(self._prepared, AttentionCall(*arguments, number))  # type: ignore[call-arg]

    def _check(self, call: AttentionCall) -> None:
        """All that can be wrong with a call, which its layout decides: one check serves all layers alike."""
        checks.check_call(self.spec, self.num_tokens, self.device, call)
        checks.check_tree_mask(call.tree_mask, self.num_tokens, self.max_q_len)
        if debug_enabled():
            step, num_pages = self.step, call.k_pages.shape[1]
            step_checks.check_page_ids(step.page_table, step.seq_lens, step.page_size, num_pages)


def plan(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    spec: AttentionSpec,
    *,
    causal: bool = True,
    window_left: int = -1,
    batch_invariant: bool = False,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """Plan one step on the host; run it once per layer.

    Args:
        page_table: int32 [batch, max_pages]; entries past a sequence's last page may hold anything.
        seq_lens: int32 [batch], KV tokens per sequence including this step's.
        cu_seqlens_q: int32 [batch + 1], where each sequence's queries start in the packed q; None for one
            query per sequence (decode).
        spec: the layers' shape.
        causal: each query sees keys up to its own position; query j of sequence i stands at
            ``seq_lens[i] − q_len[i] + j``.
        window_left: keys further back than this many positions are out of sight; −1 for no window.
        batch_invariant: a query's result has the same bits in every batch, on any number of workers, and
            however its sequence was divided into steps. Slower: see docs/numerics.md.
        backend: "auto", "cpu", "triton" or "reference".
        device: where q and the pages will be; page_table's device when None.
    Returns:
        An AttentionPlan, valid until a length or a page changes.
    Raises:
        ArgumentError: lengths and tables that do not fit together; a device that is not there.
        UnsupportedError: the backend asked for cannot serve this spec here, or not batch-invariantly.
    Cost: host only, tens of microseconds; tensors on a device are copied to the host once.
    Source: PagedAttention, arXiv:2309.06180 §4; Stream-K, arXiv:2301.03598.
    """
    step_checks.check_rules(causal, window_left, batch_invariant, backend)
    if not isinstance(spec, AttentionSpec):
        raise ArgumentError(
            f"spec must be an AttentionSpec; got {checks.describe(spec)}. Fix: quire.AttentionSpec(...)"
        )
    table, lens, starts = step_checks.check_step(page_table, seq_lens, cu_seqlens_q, spec.page_size)
    where = checks.resolve_device(device, page_table)
    name = resolve_backend(backend, where)
    kernels = load_backend(name, spec, where)
    tiling = kernels.tiling(spec, where)
    if batch_invariant:
        tiling = tiling.batch_invariant(name)
    step = plan_step(
        table,
        lens,
        starts,
        num_kv_heads=spec.num_kv_heads,
        page_size=spec.page_size,
        causal=causal,
        window_left=window_left,
        tiling=tiling,
    )
    number = next(_plan_numbers)
    made = AttentionPlan(
        spec,
        name,
        where,
        step,
        int(starts[-1]),
        kernels,
        kernels.prepare(spec, step, where),
        torch.from_numpy(np.array(number)),
        {},
    )
    _plans[number] = made
    return made


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_left: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_state: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Any:  # a tensor, or a SoftmaxState where asked for: a union would cost every caller a cast
    """Attend each query token to its own sequence's pages, planning on the way.

    Arguments, results and errors are those of ``plan`` and ``AttentionPlan.run``.

    Cost: one plan per call. Where several layers share a step, plan it once instead.
    Source: PagedAttention, arXiv:2309.06180 §4.1.
    """
    _check_door(q, k_pages, v_pages, out, alibi_slopes, sinks, tree_mask, k_scale, v_scale)
    checks.check_host(page_table=page_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    checks.check_numbers(softcap=softcap, softmax_scale=softmax_scale)
    step_checks.check_rules(causal, window_left, batch_invariant, backend)
    out, lse = _outputs(q, out, return_state)
    torch.ops.quire.paged_attention(
        q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, out, lse,
        causal, window_left, batch_invariant, backend,
        softmax_scale, softcap, alibi_slopes, sinks, tree_mask, k_scale, v_scale,
    )  # fmt: skip
    return out if lse is None else SoftmaxState(out, lse)


def _check_door(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None, tree_mask: torch.Tensor | None,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """What torch would take for something else than a call of the operator; the operator checks the rest."""
    if checks.hold_data((q, k_pages, v_pages), (out, alibi_slopes, sinks, tree_mask, k_scale, v_scale)):
        return
    checks.check_queries(q)
    checks.check_pages("k_pages", k_pages)
    checks.check_pages("v_pages", v_pages)
    checks.check_devices(
        "q", q.device, k_pages=k_pages, v_pages=v_pages, out=out, alibi_slopes=alibi_slopes, sinks=sinks,
        tree_mask=tree_mask, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def _outputs(
    q: torch.Tensor, out: torch.Tensor | None, return_state: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32) if return_state else None


def _paged_attention_op(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    causal: bool,
    window_left: int,
    batch_invariant: bool,
    backend: str,
    *scoring: Any,
) -> None:
    checks.check_queries(q)
    checks.check_pages("k_pages", k_pages)
    spec = checks.infer_spec(q, k_pages)
    step = plan(
        page_table, seq_lens, cu_seqlens_q, spec,
        causal=causal, window_left=window_left, batch_invariant=batch_invariant, backend=backend, device=q.device,
    )  # fmt: skip
    step.attend(q, k_pages, v_pages, out, lse, *scoring)


def _run_plan_op(plan_number: torch.Tensor, *call: Any) -> None:
    _plans[int(plan_number)].attend(*call)


_SCORING = (
    "float? softmax_scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? tree_mask, "
    "Tensor? k_scale, Tensor? v_scale"
)
register(
    "paged_attention",
    "Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, Tensor? cu_seqlens_q, "
    f"Tensor(a!) out, Tensor(b!)? lse, bool causal, int window_left, bool batch_invariant, "
    f"str backend, {_SCORING}",
    _paged_attention_op,
)
register(
    "run_plan",
    "Tensor plan_number, Tensor q, Tensor k_pages, Tensor v_pages, Tensor(a!) out, Tensor(b!)? lse, "
    f"{_SCORING}",
    _run_plan_op,
)
