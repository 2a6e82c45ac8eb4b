"""The public operator, in one call: check → plan → dispatch.

Where many layers share a step, ``plan`` does the host's part once and ``AttentionPlan.run`` the rest per layer. Both
ways are operators registered with torch, so that ``torch.compile(fullgraph=True)`` keeps them whole.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from quire.kernels.call import AttentionCall, Scoring
from quire.ops import checks
from quire.ops.attention_plan import make_outputs
from quire.ops.planner import plan_within
from quire.ops.torch_op import SCORING, is_watched, register
from quire.planning import checks as step_checks
from quire.planning.checks import check_host
from quire.planning.work_list import Ints
from quire.spec import AttentionSpec
from quire.state import SoftmaxState


@overload
def paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None, *, causal: bool = True, softmax_scale: float | None = None,
    window_left: int = -1, softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None, out: torch.Tensor | None = None, return_state: Literal[False] = False,
    batch_invariant: bool = False, backend: str = "auto",
) -> torch.Tensor: ...  # fmt: skip


@overload
def paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None, *, causal: bool = True, softmax_scale: float | None = None,
    window_left: int = -1, softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None, out: torch.Tensor | None = None, return_state: Literal[True],
    batch_invariant: bool = False, backend: str = "auto",
) -> SoftmaxState: ...  # fmt: skip


@overload
def paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None, *, causal: bool = True, softmax_scale: float | None = None,
    window_left: int = -1, softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, tree_mask: torch.Tensor | None = None, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None, out: torch.Tensor | None = None, return_state: bool,
    batch_invariant: bool = False, backend: str = "auto",
) -> torch.Tensor | SoftmaxState: ...  # fmt: skip


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
) -> torch.Tensor | SoftmaxState:
    """Attend each query token to its own sequence's pages, planning on the way.

    Arguments, results and errors are those of ``plan`` and ``AttentionPlan.run``.

    Cost: one plan per call. Where several layers share a step, plan it once instead.
    Source: PagedAttention, arXiv:2309.06180 §4.1.
    """
    scoring = Scoring(softmax_scale, softcap, alibi_slopes, sinks, tree_mask, k_scale, v_scale)
    rules = causal, window_left, batch_invariant, backend
    if is_watched(q):
        checks.check_door(q, k_pages, v_pages, out, scoring)
        check_host(page_table=page_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
        step_checks.check_rules(*rules)
        out, lse = make_outputs(q, _value_dim(q, v_pages), out, return_state)
        torch.ops.quire.paged_attention(
            q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, out, lse, *rules, *scoring
        )
    else:
        spec = checks.check_layer(q, k_pages, v_pages)
        out, lse = make_outputs(q, spec.value_dim, out, return_state)
        call = AttentionCall(q, k_pages, v_pages, out, lse, scoring)
        _attend(spec, call, (page_table, seq_lens, cu_seqlens_q), rules)
    return out if lse is None else SoftmaxState(out, lse)


def _value_dim(q: torch.Tensor, v_pages: torch.Tensor) -> int | None:
    """That of the spec, for tensors whose shapes the operator has not checked yet."""
    narrower = q.dim() == 3 and v_pages.dim() == 4 and v_pages.shape[3] != q.shape[2]
    return v_pages.shape[3] if narrower else None


def _attend(
    spec: AttentionSpec, call: AttentionCall, step: tuple[Any, Any, Any], rules: tuple[bool, int, bool, str]
) -> None:
    """Plan a step and run it on queries and pages that fit together."""
    page_table, seq_lens, cu_seqlens_q = step

    def refuse(lens: Ints, starts: Ints) -> None:
        checks.check_num_tokens(call.q, int(starts[-1]), cu_seqlens_q)

    planned = plan_within(
        (len(call.q), refuse), page_table, seq_lens, spec, cu_seqlens_q, *rules, call.q.device
    )
    checks.check_num_tokens(call.q, planned.num_tokens, cu_seqlens_q)
    planned.attend(*call, layer_checked=True)


def _paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None, causal: bool, window_left: int,
    batch_invariant: bool, backend: str, *scoring: Any,
) -> None:  # fmt: skip
    spec = checks.check_layer(q, k_pages, v_pages)
    call = AttentionCall(q, k_pages, v_pages, out, lse, Scoring(*scoring))
    _attend(spec, call, (page_table, seq_lens, cu_seqlens_q), (causal, window_left, batch_invariant, backend))


register(
    "paged_attention",
    "Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, Tensor? cu_seqlens_q, "
    f"Tensor(a!) out, Tensor(b!)? lse, bool causal, int window_left, bool batch_invariant, "
    f"str backend, {SCORING}",
    _paged_attention,
)
