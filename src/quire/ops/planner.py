"""From a step's lengths and page table to a plan: check → cut → prepare the kernels."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import ModuleType
from typing import Any

import torch

from quire.debug import debug_enabled
from quire.errors import ArgumentError
from quire.kernels import load_backend, resolve_backend
from quire.kernels.call import BoundCall
from quire.ops import checks
from quire.ops.attention_plan import AttentionPlan, within_reach
from quire.planning import checks as step_checks
from quire.planning.checks import describe
from quire.planning.step import TokenLimit, largest_work, plan_step
from quire.planning.work_list import Capacity, Tiling
from quire.spec import AttentionSpec, existing_device

# Numbers of tokens for which a Planner keeps its bound calls: as many as decode has batch sizes, or nearly.
KEPT_BOUND = 256


def plan(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    spec: AttentionSpec,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    causal: bool = True,
    window_left: int = -1,
    batch_invariant: bool = False,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """Plan one step on the host; run it once per layer.

    Args:
        page_table: int32 [batch, max_pages]; entries past a sequence's last page may hold anything. The others are
            copied. A table on a GPU stays there, and the copy is made on the current stream.
        seq_lens: int32 [batch], KV tokens per sequence including this step's.
        spec: the layers' shape.
        cu_seqlens_q: int32 [batch + 1], where each sequence's queries start in the packed q; None for one
            query per sequence (decode).
        causal: each query sees keys up to its own position; query j of sequence i stands at
            ``seq_lens[i] − q_len[i] + j``.
        window_left: keys further back than this many positions are out of sight; −1 for no window.
        batch_invariant: a query's result has the same bits in every batch, on any number of workers, and
            however its sequence was divided into steps. Slower: see docs/numerics.md.
        backend: "auto", "cpu", "triton" or "reference".
        device: where q and the pages will be; page_table's device when None.
    Returns:
        An AttentionPlan, valid until a length or a page changes. On a GPU it is copied over on the stream that is
        current, and may be run on any: launches on another stream wait for the copy, on the device.
    Raises:
        ArgumentError: lengths and tables that do not fit together; a negative page id; a device that is not there.
        UnsupportedError: the backend asked for cannot serve this spec here, or not batch-invariantly.
    Cost: host only, tens of microseconds; lengths on a device are copied to the host, which waits for them.
    Source: PagedAttention, arXiv:2309.06180 §4; Stream-K, arXiv:2301.03598.
    """
    return plan_within(
        None, page_table, seq_lens, spec, cu_seqlens_q, causal, window_left, batch_invariant, backend, device
    )


def plan_within(
    limit: TokenLimit | None, page_table: torch.Tensor, seq_lens: torch.Tensor, spec: AttentionSpec,
    cu_seqlens_q: torch.Tensor | None, causal: bool, window_left: int, batch_invariant: bool, backend: str,
    device: torch.device | str | None,
) -> AttentionPlan:  # fmt: skip
    """``plan``, for a step within a limit of query tokens."""
    step_checks.check_rules(causal, window_left, batch_invariant, backend)
    check_spec(spec)
    table, lens, starts = step_checks.check_step(page_table, seq_lens, cu_seqlens_q)
    where = checks.resolve_device(device, page_table)
    name, kernels, tiling = _service(backend, spec, where, batch_invariant, lens.shape[0])
    if not table.is_cpu:
        table = within_reach(table, kernels, where)
    rules = causal, window_left, tiling
    step = plan_step(table, lens, starts, spec.num_kv_heads, spec.page_size, *rules, limit)
    return AttentionPlan(
        spec, name, where, step, step.max_q_len, kernels, kernels.prepare(spec, step, where), {}
    )


class Planner:
    """Plans steps of bounded size into the same memory, one after the other, so that a CUDA graph serves them all.

    Every plan lies at the same addresses and is run by the same launches. A graph that was captured around
    ``AttentionPlan.run`` therefore computes, each time it is replayed, whatever step was planned last::

        planner = quire.Planner(spec, max_batch=64, max_seq_len=8192, device="cuda")
        plan = planner.plan(page_table, seq_lens)
        with torch.cuda.graph(graph):
            plan.run(q, k_pages, v_pages, out=out)      # and the rest of the model
        ...
        planner.plan(page_table, seq_lens)              # the next step, on the stream of the replays
        graph.replay()

    A graph has one number of tokens: pad shorter steps with sequences of length 0, whose rows become 0. Work that
    a step does not have costs a launch that ends at once, so plan for decode alone (``max_q_len=1``) where there is
    no other. A backend without such graphs plans as ``quire.plan`` does.

    Plan and replay on one stream. Outside of graphs a plan may be run on any stream: launches there wait for the plan's
    copy, and the next plan for those launches, on the device. Memory that a captured launch reads is never freed, as
    its graph may be replayed when the Planner is gone. A Planner keeps no tensor that its plans were run on. Its tiles
    are those of its largest batch, so that last bits may differ from those of ``quire.plan``.

    Args:
        spec: the layers' shape.
        max_batch: sequences of a step.
        max_seq_len: KV tokens of a sequence.
        max_q_len: query tokens of a sequence.
        max_tokens: query tokens of a step; max_batch · max_q_len when None.
        causal, window_left, batch_invariant, backend: rules of all its plans, as in ``plan``.
        device: where q and the pages will be.
    Raises:
        ArgumentError: a limit below one, a bad rule, or a device that is not there.
        UnsupportedError: the backend asked for cannot serve this spec here, or not batch-invariantly.
    Cost: memory on a GPU for the largest step: its page table, its work, and at most two partial states of a tile
        per worker, in all a few MB for decode.
    Source: fixed workspaces under CUDA graphs, arXiv:2501.01005 §3.3.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        max_batch: int,
        max_seq_len: int,
        max_q_len: int = 1,
        max_tokens: int | None = None,
        causal: bool = True,
        window_left: int = -1,
        batch_invariant: bool = False,
        backend: str = "auto",
        device: torch.device | str = "cuda",
    ) -> None:
        step_checks.check_rules(causal, window_left, batch_invariant, backend)
        check_spec(spec)
        self.limits = step_checks.Limits.checked(max_batch, max_seq_len, max_q_len, max_tokens)
        self._token_limit = self.limits.max_tokens, self.limits.check_lengths
        self.spec, self.causal, self.window_left = spec, causal, window_left
        self.device = existing_device(device)
        self.backend, self._kernels, self._tiling = _service(
            backend, spec, self.device, batch_invariant, max_batch
        )
        self._reserved = self._reserve()
        # By a step's number of tokens, the latest last.
        self._bound: dict[int, dict[Hashable, BoundCall]] = {}
        self._latest: AttentionPlan | None = None

    def plan(
        self, page_table: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None
    ) -> AttentionPlan:
        """Plan the next step; the one before can no longer be run.

        Args:
            page_table, seq_lens, cu_seqlens_q: the step, as in ``quire.plan``.
        Returns:
            An AttentionPlan, whose ``max_q_len`` (the columns of a tree mask) is the planner's.
        Raises:
            ArgumentError: lengths and tables that do not fit together, a negative page id, or a step above the limits.
        Cost: host only, and one copy to the device that the host does not wait for; lengths on a device are copied to
            the host, which waits for them.
        """
        spec, limits = self.spec, self.limits
        table, lens, starts = step_checks.check_step(page_table, seq_lens, cu_seqlens_q)
        if not table.is_cpu:
            table = within_reach(table, self._kernels, self.device)
        rules = self.causal, self.window_left, self._tiling
        step = plan_step(table, lens, starts, spec.num_kv_heads, spec.page_size, *rules, self._token_limit)
        limits.check(step.batch, step.max_seq_len, step.max_q_len, step.num_tokens)
        bound: dict[Hashable, BoundCall] = {}
        if self._reserved is None:
            prepared = self._kernels.prepare(spec, step, self.device)
        else:
            prepared = self._kernels.prepare(spec, step, self.device, self._reserved)
            if step.device_table is None or not debug_enabled():
                # debug mode checks each step's page ids, so each step binds anew
                bound = self._bound_for(step.num_tokens)
        if self._latest is not None:
            self._latest.replace()
        self._latest = AttentionPlan(
            spec, self.backend, self.device, step, limits.max_q_len, self._kernels, prepared, bound
        )
        return self._latest

    def _bound_for(self, num_tokens: int) -> dict[Hashable, BoundCall]:
        """The bound calls of steps with this many tokens, kept for the numbers used last."""
        bound = self._bound[num_tokens] = self._bound.pop(num_tokens, {})
        if len(self._bound) > KEPT_BOUND:
            del self._bound[next(iter(self._bound))]
        return bound

    def _reserve(self) -> Any:
        """The backend's memory for every step within the limits, or None where it has no ``reserve``."""
        reserve = getattr(self._kernels, "reserve", None)
        if reserve is None:
            return None
        limits = self.limits
        decode, prefill = largest_work(
            self._tiling, self.spec.num_kv_heads, limits.max_batch, limits.max_tokens, limits.max_seq_len,
            limits.max_q_len,
        )  # fmt: skip
        max_pages = -(-limits.max_seq_len // self.spec.page_size)
        capacity = Capacity(
            limits.max_batch, max_pages, limits.max_q_len, decode, prefill,
            self.causal, self.window_left, self._tiling.kv_split,
        )  # fmt: skip
        return reserve(self.spec, capacity, self.device)


def check_spec(spec: object) -> None:
    if not isinstance(spec, AttentionSpec):
        raise ArgumentError(
            f"spec must be an AttentionSpec; got {describe(spec)}. Fix: quire.AttentionSpec(...)"
        )


@functools.lru_cache(maxsize=256)
def _backend(requested: str, spec: AttentionSpec, where: torch.device) -> tuple[str, ModuleType]:
    """The backend of that name that serves this spec there."""
    name = resolve_backend(requested, where)
    return name, load_backend(name, spec, where)


def _service(
    requested: str, spec: AttentionSpec, where: torch.device, batch_invariant: bool, batch: int
) -> tuple[str, ModuleType, Tiling]:
    """A backend's name, its kernels, and how they want the work cut just now."""
    name, kernels = _backend(requested, spec, where)
    tiling: Tiling = kernels.tiling(spec, where, batch)
    return name, kernels, tiling.batch_invariant(name) if batch_invariant else tiling
