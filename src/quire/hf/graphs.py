"""CUDA graphs of decode steps: a model's launches recorded once, and replayed by one call.

A decode step of a large model is a thousand small launches, and the host takes longer to make them than the device to
run them. A graph has fixed shapes and addresses. So there is a graph for each of a few batch sizes, smaller batches
are padded by sequences of length 0 whose keys go to slot -1, and everything that a step brings lies in memory of its
own: ids, positions and slots in one tensor, and a plan per kind of layer in the memory of a `Planner`.

Everything between is the model's: what it computes on the host is recorded as it was. A model that looks at a value on
the device while it is recorded cannot be, and the first replay of every graph is compared with the same launches made
one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeAlias

import torch

from quire.debug import debug_enabled
from quire.errors import ArgumentError, UnsupportedError
from quire.hf.attention import RunningStep
from quire.hf.cache import Kind, PagedCache
from quire.hf.forward import PackedForward
from quire.hf.planners import Planners, tables_of
from quire.hf.step import Step, pad_decode
from quire.hf.transfer import to_device
from quire.ops.attention_plan import AttentionPlan
from quire.ops.planner import Planner
from quire.planning.checks import Limits
from quire.spans import span

logger = logging.getLogger("quire")

# KV tokens of a sequence that each graph has room for; a longer sequence takes one with room for a power of two.
SMALLEST_CAPACITY = 2048
MAX_BATCH = 1024  # larger steps keep the device busy without
# A replay differs from the launches one by one in rounding at most, where sums are added by atomics.
_TOLERANCE = 0.05

Replay: TypeAlias = Callable[[], torch.Tensor]  # logits of all rows, in memory of the graph
Capture: TypeAlias = Callable[[Replay], Replay]


def batch_size_of(batch: int) -> int:
    """The sequences of the graph that serves so many: few sizes, of which none wastes much.

    Powers of two up to 8, multiples of 8 to 64, then eight sizes up to each power of two.
    """
    if batch <= 8:
        return 1 << (batch - 1).bit_length()
    unit = max(8, (1 << (batch - 1).bit_length()) // 16)
    return -(-batch // unit) * unit


class DecodeGraphs:
    """The graphs of a model's decode steps, each recorded when it is first needed.

    Args:
        forward: the model.
        cache: its pages.
        planners: where its other steps are planned.
        max_seq_len: most tokens of a sequence.
        capture: records launches; a CUDA graph, unless a test brings something else.
    """

    def __init__(
        self,
        forward: PackedForward,
        cache: PagedCache,
        planners: Planners,
        max_seq_len: int,
        capture: Capture | None = None,
    ) -> None:
        self._forward, self._cache, self._planners = forward, cache, planners
        self._max_seq_len = max_seq_len
        self._capture = capture or _CudaCapture(planners.device)
        self._graphs: dict[int, _Graph] = {}

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, sorted(self._graphs)))
        return f"DecodeGraphs(of {sizes or 'no'} sequences, {self.num_bytes / 1e6:.1f} MB)"

    @property
    def num_bytes(self) -> int:
        """Device memory that the graphs hold beside their plans; they share it, as one of them runs at a time.

        Cost: a look at every block of torch's allocator.
        """
        return self._capture.num_bytes if isinstance(self._capture, _CudaCapture) else 0

    def serves(self, step: Step) -> bool:
        """Whether a step is of one token per sequence, and of no more sequences than graphs are made for."""
        return step.num_tokens == len(step.seq_lens) <= MAX_BATCH

    def run(self, step: Step, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The step's logits, as ``PackedForward.paged`` returns them.

        Args:
            input_ids: as for ``PagedModel.forward``.
        Raises:
            UnsupportedError: the model's launches cannot be recorded, or are others when they are replayed.
        Cost: of the first step of a size, or beyond the lengths that a graph has room for, three forwards. Then the
            plans, one copy to the device, and the replay; no copy to the host.
        """
        with self._forward.switches.lock:  # the graphs' memory serves one step at a time
            size = batch_size_of(step.num_tokens)
            longest = int(step.seq_lens.max())
            graph = self._graphs.get(size)
            if graph is None or longest > graph.capacity:
                graph = self._record(size, longest)
            graph.fill(step, input_ids)
            logits = graph.replay()[: step.num_tokens]
            if not graph.is_proven:
                graph.prove()
            wanted = step.logits_indices
            if len(wanted) == step.num_tokens and bool((wanted.diff() > 0).all()):
                return logits.clone()  # the next replay writes to the same memory
            return logits[to_device(wanted, logits.device)]

    def record(self, batch: int) -> None:
        """Record the graph of so many sequences now.

        Raises:
            UnsupportedError: the model's launches cannot be recorded.
        """
        with self._forward.switches.lock:
            self._record(batch_size_of(batch), 1)

    def _record(self, size: int, longest: int) -> _Graph:
        capacity = min(max(SMALLEST_CAPACITY, 1 << (longest - 1).bit_length()), self._max_seq_len)
        start = time.perf_counter()
        graph = _Graph(self._forward, self._cache, self._planners, size, capacity)
        graph.fill(None)
        try:
            graph.launch()  # compiles kernels, and takes the memory that libraries keep
            graph.replay = self._capture(graph.launch)
        except RuntimeError as error:  # torch's errors of CUDA among them
            reason = str(error).strip().split("\n")[0]
            raise UnsupportedError(
                f"to be recorded as a CUDA graph, a model must leave its values on the device; got: {reason}. "
                "Fix: cuda_graphs=False"
            ) from error
        self._graphs[size] = graph
        logger.debug("recorded the CUDA graph of %d sequences in %.2f s", size, time.perf_counter() - start)
        return graph


class _Graph:
    """A graph of one batch size, and the memory that its launches read.

    Attributes:
        capacity: most KV tokens of a sequence.
        replay: runs the step that was filled in last.
        is_proven: a replay has been compared with launches one by one.
    """

    replay: Replay

    def __init__(
        self, forward: PackedForward, cache: PagedCache, planners: Planners, size: int, capacity: int
    ) -> None:
        self.size, self.capacity, self.is_proven = size, capacity, False
        self._forward, self._cache, self._planners = forward, cache, planners
        self._num_groups = cache.num_groups
        limits = Limits(size, capacity, 1, size)
        self._planner_of: dict[Kind, Planner] = {
            kind: planners.planner(limits, *kind[:2])
            for kind in dict.fromkeys(layer.kind for layer in cache.layers.values())
        }
        device = planners.device
        self._inputs = torch.zeros(2 + self._num_groups, size, dtype=torch.int64, device=device)
        self._rows = torch.arange(size, device=device)
        self._plans: dict[Kind, AttentionPlan] = {}
        self._step: Step | None = None

    def fill(self, step: Step | None, input_ids: torch.Tensor | None = None) -> None:
        """Plan a step and copy it over, padded; None: nothing but padding.

        Cost: host only, and a copy per kind of layer and one more that the host does not wait for.
        """
        self._plans = {}  # whatever fails from here on leaves nothing to be replayed by mistake
        padded = pad_decode(step, self.size, self._num_groups)
        with span("plan"):
            plans = {
                kind: planner.plan(*tables_of(padded, *kind)) for kind, planner in self._planner_of.items()
            }
        for plan in plans.values():
            plan.check_pages(self._cache.num_pages)
        slots = padded.slot_mapping.reshape(self._num_groups, self.size)
        inputs = torch.cat([padded.input_ids[None], padded.position_ids[None], slots])
        self._inputs.copy_(to_device(inputs, self._inputs.device))
        if input_ids is not None:
            self._inputs[0, : len(input_ids)] = input_ids
        self._step, self._plans = padded, plans

    def launch(self) -> torch.Tensor:
        """Logits of all rows of the step that was filled in last, launch by launch."""
        assert self._step is not None
        slots = self._inputs[2:] if self._num_groups > 1 else self._inputs[2]
        running = RunningStep(self._step, self._cache, self._planners, slots, self._plans)
        return self._forward.paged(running, self._inputs[0], self._inputs[1], self._rows)

    def prove(self) -> None:
        """Compare the last replay with the same launches made one by one.

        Raises:
            UnsupportedError: they are not the same.
        """
        replayed = self.replay().clone()
        wanted = self.launch()
        off = float((replayed - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if not off <= _TOLERANCE:
            raise UnsupportedError(
                "to be replayed as a CUDA graph, a model must compute on the device what differs between steps; got "
                f"logits off by {off:.2g} of the largest. Fix: cuda_graphs=False"
            )
        self.is_proven = True


class _CudaCapture:
    """Records CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def num_bytes(self) -> int:
        """Device memory of the pool."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(each["total_size"] for each in segments if each["segment_pool_id"] == self._pool)

    def __call__(self, launch: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = launch()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def wants_graphs(cuda_graphs: bool | None, backend: str, device: torch.device) -> bool:
    """Whether decode steps are to be recorded: where asked, and by default wherever CUDA runs them.

    Raises:
        UnsupportedError: asked for where there are none.
        ArgumentError: no bool and not None.
    """
    if cuda_graphs not in (None, True, False):
        raise ArgumentError(
            f"cuda_graphs must be True, False or None; got {cuda_graphs!r}. Fix: cuda_graphs=None"
        )
    reasons = [
        reason
        for reason, holds in (
            (f"pages on {device}", device.type != "cuda"),
            (f'backend="{backend}"', backend != "triton"),
            ("QUIRE_DEBUG=1, which looks at values in every step", debug_enabled()),
        )
        if holds
    ]
    if cuda_graphs and reasons:
        raise UnsupportedError(
            f"cuda_graphs=True needs a GPU and its kernels; got {reasons[0]}. Fix: cuda_graphs=None"
        )
    return not reasons if cuda_graphs is None else cuda_graphs
