"""The CPU backend: paged attention in Numba, in the vector operations of ``simd``."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from quire.kernels.ahead import Job
from quire.kernels.call import AttentionCall, BoundCall, outside_the_pool
from quire.kernels.compile import compiled
from quire.kernels.cpu import amx, wake
from quire.kernels.cpu.attend import decode as decoding
from quire.kernels.cpu.attend import prefill as prefilling
from quire.kernels.cpu.attend import scores
from quire.kernels.cpu.attend.config import DTYPE_CODES, Config
from quire.kernels.cpu.attend.merge import merge
from quire.kernels.cpu.attend.notes import describe_machine, describe_tile, factors, prefill_factors
from quire.kernels.cpu.attend.products import BLOCK
from quire.kernels.cpu.attend.rows import ITEM_BYTES, Call, Step
from quire.kernels.cpu.store import Layout, Write, write
from quire.kernels.cpu.threads import num_threads, run, threads_for
from quire.planning.work_list import StepPlan, TileShape, Tiling, WorkList
from quire.spec import PAGE_ALIGNMENT_BYTES, AttentionSpec


def why_not(spec: AttentionSpec, device: torch.device) -> str | None:
    """It serves tensors in host memory whose values are as wide as their keys."""
    if device.type != "cpu":
        return f'it reads host memory; got tensors on {device}. Fix: backend="auto"'
    if spec.value_dim is not None:
        return f'values must be as wide as keys; got value_dim={spec.value_dim}. Fix: backend="reference"'
    return None


def tiling(spec: AttentionSpec, device: torch.device, batch: int) -> Tiling:
    """A share for each thread, or one share of little work.

    A prefill tile holds as many tokens as fit its rows with their whole group.
    """
    return _tiling(spec, num_threads())


@functools.cache
def _tiling(spec: AttentionSpec, threads: int) -> Tiling:
    least = math.ceil(wake.PAYS / wake.key_takes(spec))
    return Tiling(
        num_workers=threads,
        decode=TileShape(q_tokens=1, kv_tokens=BLOCK, least_shared=least),
        prefill=TileShape(q_tokens=_prefill_tokens(spec), kv_tokens=scores.BLOCK, least_shared=least),
        rows_stand_alone=True,
    )


def _prefill_tokens(spec: AttentionSpec) -> int:
    return max(1, scores.ROWS // spec.group_size)


class _Kernel(NamedTuple):
    """One of the two kernels, for a spec."""

    function: Any
    config: Config
    partial_rows: int
    row_bytes: int  # of a row in a partial state, with its m and l
    scratch_bytes: int  # per worker
    takes: float  # nanoseconds of one thread for work of weight 1


@functools.cache
def _kernels(spec: AttentionSpec) -> tuple[_Kernel, _Kernel]:
    """Decode and prefill."""
    config = Config(DTYPE_CODES[spec.dtype], DTYPE_CODES[spec.storage_dtype], spec.head_dim)
    in_tiles = config._replace(amx=int(config.fits_amx and amx.in_use()))
    tiles, row_bytes = -(-spec.group_size // config.most_heads), config.row_bytes + 8
    takes = wake.key_takes(spec)
    return (
        _Kernel(
            decoding.decode,
            config._replace(heads=-(-spec.group_size // tiles)),
            spec.group_size,
            row_bytes,
            _apart(decoding.scratch_bytes(spec.head_dim, tiles)),
            takes,
        ),
        _Kernel(
            prefilling.prefill,
            in_tiles,
            _prefill_tokens(spec) * spec.group_size,
            row_bytes,
            _apart(prefilling.scratch_bytes(in_tiles)),
            takes,
        ),
    )


def _apart(nbytes: int) -> int:
    """Bytes from one worker's scratch to the next: whole cache lines and an odd number of them.

    At a power of two the same row of every worker would be in the same set of a shared cache.
    """
    return (-(-nbytes // PAGE_ALIGNMENT_BYTES) | 1) * PAGE_ALIGNMENT_BYTES


def compile_jobs(spec: AttentionSpec) -> list[Job]:
    """Whatever plans and stores of this spec run, the slowest to compile first."""
    decode, prefill = _kernels(spec)
    step, call = Step._make([0] * len(Step._fields)), Call._make([0] * (len(Call._fields) - 2) + [0.0, 0.0])
    tokens, plain = Write._make([0] * len(Write._fields)), prefill.config._replace(amx=0)
    numbers = np.empty(1, np.int64)
    return [
        Job.of(prefill.function, prefill.config, 1, 1, step, call),
        Job.of(decode.function, decode.config, 1, 1, step, call),
        Job.of(merge, plain, 1, 1, step, call),
        Job.of(write, plain, 1, Layout._make([0] * len(Layout._fields)), 0, tokens, tokens),
        Job.of(addresses, np.empty((1, 1), np.int32), numbers, numbers),
    ]


@compiled
def addresses(page_table: Any, numbers: Any, lists: Any) -> tuple[int, int, int]:
    """Where a plan's arrays lie: one call, where NumPy takes one per array at four times the price."""
    return page_table.ctypes.data, numbers.ctypes.data, lists.ctypes.data


class _Launch:
    """One kernel's part of a plan, ready to be called for each layer."""

    def __init__(self, kernel: _Kernel, spec: AttentionSpec, plan: StepPlan, work: WorkList) -> None:
        self._kernel, self._spec, self._plan, self._work = kernel, spec, plan, work
        self._partials_at = work.num_workers * kernel.scratch_bytes
        partials = work.num_partials * kernel.partial_rows * kernel.row_bytes
        self._nbytes = self._partials_at + partials
        self._takes, self._merging_takes = work.weight * kernel.takes, wake.reading_takes(partials)
        self._step: Step | None = None

    def __call__(self, call: Call) -> None:
        kernel, work = self._kernel, self._work
        shared = work.num_workers > 1 and not wake.stays_calm(self._takes)
        threads, scratch = num_threads() if shared else 1, borrow_scratch(self._nbytes)
        step = self._step
        if step is None or step.scratch != scratch:  # mostly it is where it was for the layer before
            step = self._step = self._in_scratch(scratch)
        run(kernel.function, kernel.config, threads, self._takes, work.num_workers, step, call)
        if work.num_merges:
            takes = self._merging_takes
            config = kernel.config._replace(heads=1, amx=0)  # one merge for both kernels
            run(merge, config, threads_for(takes), takes, work.num_merges, step, call)

    def _in_scratch(self, scratch: int) -> Step:
        """What the kernel reads, with its places in scratch memory."""
        kernel, plan, work = self._kernel, self._plan, self._work
        table = plan.page_table
        page_table, seq_lens, lists = addresses(table, plan.numbers, work.lists)
        worker_indptr = lists + work.at * 8
        items = worker_indptr + (work.num_workers + 1) * 8
        partial_out = scratch + self._partials_at
        return Step(
            items=items,
            worker_indptr=worker_indptr,
            merges=items + work.num_items * ITEM_BYTES,
            page_table=page_table,
            page_table_row=table.strides[0],
            seq_lens=seq_lens,
            cu_seqlens_q=seq_lens + plan.batch * 8,
            page_size=plan.page_size,
            group=self._spec.group_size,
            causal=int(plan.causal),
            window_left=plan.window_left,
            partial_rows=kernel.partial_rows,
            partial_out=partial_out,
            partial_softmax=partial_out + work.num_partials * kernel.partial_rows * kernel.config.row_bytes,
            scratch=scratch,
            scratch_bytes=kernel.scratch_bytes,
        )


class _Prepared(NamedTuple):
    """The host arrays that launches hold the addresses of, and the launches."""

    step: StepPlan
    launches: list[_Launch]
    spec: AttentionSpec

    @property
    def notes(self) -> list[str]:
        """Tiles, threads and vectors, for plan.explain()."""
        tiles, (decode, prefill) = _tiling(self.spec, num_threads()), _kernels(self.spec)
        lines = []
        if len(self.step.decode.items):
            config = decode.config
            lines.append(describe_tile("decode", tiles.decode, config.heads, factors(config)))
        if len(self.step.prefill.items):
            numbers = prefill_factors(prefill.config)
            lines.append(describe_tile("prefill", tiles.prefill, prefill.partial_rows, numbers))
        shared = max(self.step.decode.num_workers, self.step.prefill.num_workers) > 1
        return [*lines, describe_machine(num_threads() if shared else 1)] if lines else []


def prepare(spec: AttentionSpec, step: StepPlan, device: torch.device) -> _Prepared:
    """The launches of a plan: decode, prefill or both."""
    decode, prefill = _kernels(spec)
    launches = []
    if step.decode.num_items:
        launches.append(_Launch(decode, spec, step, step.decode))
    if step.prefill.num_items:
        launches.append(_Launch(prefill, spec, step, step.prefill))
    return _Prepared(step, launches, spec)


_borrowed = threading.local()


def borrow_scratch(nbytes: int) -> int:
    """Scratch memory of the calling thread, which runs one kernel at a time; it grows and is kept."""
    buffer: torch.Tensor | None = getattr(_borrowed, "buffer", None)
    if buffer is None or buffer.numel() < nbytes:
        _borrowed.buffer = buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return buffer.data_ptr()


def bind(prepared: _Prepared, call: AttentionCall) -> BoundCall:
    """A plan's launches for tensors of this call's layout."""
    strides, launches = _strides(call), prepared.launches

    def attend(*tensors: torch.Tensor | None) -> None:
        native = Call._make((*[0 if tensor is None else tensor.data_ptr() for tensor in tensors], *strides))
        for launch in launches:
            launch(native)

    return attend


def _strides(call: AttentionCall) -> tuple[int | float, ...]:
    """All of ``Call`` that is no address."""
    element, kv_element = call.q.element_size(), call.k_pages.element_size()
    k_scale, tree_mask = call.scoring.k_scale, call.scoring.tree_mask
    return (
        *(stride * element for stride in call.q.stride()[:2]),
        *(stride * kv_element for stride in call.k_pages.stride()[:3]),
        *(stride * kv_element for stride in call.v_pages.stride()[:3]),
        *(stride * element for stride in call.out.stride()[:2]),
        0 if call.lse is None else call.lse.stride(0) * 4,
        *((0, 0, 0) if k_scale is None else (stride * 4 for stride in k_scale.stride())),
        0 if tree_mask is None else tree_mask.stride(0),
        float(call.scale),
        float(call.scoring.softcap),
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def bind_write(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, given: bool = False,
) -> Callable[..., None]:  # fmt: skip
    """``write_kv`` for tensors of the layout of these; ``given`` scales are read, through any strides.

    What it returns raises ArgumentError, and writes nothing, where a slot is neither in the pool nor −1.
    """
    tokens, (heads, head_dim) = len(slot_mapping), k.shape[1:]
    _, num_pages, page_size, _ = k_pages.shape
    config = Config(DTYPE_CODES[k.dtype], DTYPE_CODES[k_pages.dtype], head_dim)
    slot_bytes, num_slots = slot_mapping.stride(0) * 8, num_pages * page_size
    layout = Layout(tokens, heads, slot_bytes, num_slots, page_size, int(given))
    k_strides, v_strides = _write_strides(k, k_pages, k_scale), _write_strides(v, v_pages, v_scale)
    takes = wake.reading_takes(2 * tokens * heads * head_dim * (k.element_size() + k_pages.element_size()))

    def write_tokens(
        k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
        k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
    ) -> None:  # fmt: skip
        k_write = Write(k.data_ptr(), k_pages.data_ptr(), _address(k_scale), *k_strides)
        v_write = Write(v.data_ptr(), v_pages.data_ptr(), _address(v_scale), *v_strides)
        if not run(
            write, config, threads_for(takes), takes, layout, slot_mapping.data_ptr(), k_write, v_write
        ):
            raise outside_the_pool(slot_mapping, num_slots)

    return write_tokens


def _write_strides(rows: torch.Tensor, pages: torch.Tensor, scale: torch.Tensor | None) -> tuple[int, ...]:
    """All of ``Write`` that is no address, in bytes."""
    element, page_element = rows.element_size(), pages.element_size()
    return (
        *(stride * element for stride in rows.stride()[:2]),
        *(stride * page_element for stride in pages.stride()[:3]),
        *((0, 0, 0) if scale is None else (stride * 4 for stride in scale.stride())),
    )
