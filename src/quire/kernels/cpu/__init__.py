"""The CPU backend: paged attention in Numba, written in the SIMD words of ``simd`` and ``memory``."""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import torch

from quire.kernels.cpu import decode as decoding
from quire.kernels.cpu import prefill as prefilling
from quire.kernels.cpu import scores
from quire.kernels.cpu.config import DTYPE_CODES, Config
from quire.kernels.cpu.launch import addresses, num_threads, run
from quire.kernels.cpu.merge import merge
from quire.kernels.cpu.notes import describe_machine, describe_tile
from quire.kernels.cpu.products import BLOCK
from quire.kernels.cpu.rows import Call, Step
from quire.kernels.cpu.store import Write, write
from quire.spec import PAGE_ALIGNMENT_BYTES, AttentionSpec
from quire.work import AttentionCall, StepPlan, TileShape, Tiling, WorkList


def why_not(spec: AttentionSpec, device: torch.device) -> str | None:
    """Whatever lies in host memory can be served."""
    if device.type != "cpu":
        return f'it reads host memory; got tensors on {device}. Fix: backend="auto"'
    return None


def tiling(spec: AttentionSpec, device: torch.device) -> Tiling:
    """One share per thread; a prefill tile holds as many tokens as fit its rows with their whole group."""
    return _tiling(spec, num_threads())


@functools.cache
def _tiling(spec: AttentionSpec, threads: int) -> Tiling:
    return Tiling(
        num_workers=threads,
        decode=TileShape(q_tokens=1, kv_tokens=BLOCK),
        prefill=TileShape(q_tokens=_prefill_tokens(spec), kv_tokens=scores.BLOCK),
        rows_stand_alone=True,
    )


def _prefill_tokens(spec: AttentionSpec) -> int:
    return max(1, scores.ROWS // spec.group_size)


class _Kernel(NamedTuple):
    """One of the two kernels, for a spec."""

    function: Any
    config: Config
    partial_rows: int
    scratch_bytes: int  # per worker


@functools.cache
def _kernels(spec: AttentionSpec) -> tuple[_Kernel, _Kernel]:
    """Decode and prefill."""
    config = Config(DTYPE_CODES[spec.dtype], DTYPE_CODES[spec.storage_dtype], spec.head_dim)
    tiles = -(-spec.group_size // config.most_heads)
    return (
        _Kernel(
            decoding.decode,
            config._replace(heads=-(-spec.group_size // tiles)),
            spec.group_size,
            _apart(decoding.scratch_bytes(spec.head_dim, tiles)),
        ),
        _Kernel(
            prefilling.prefill,
            config,
            _prefill_tokens(spec) * spec.group_size,
            _apart(prefilling.scratch_bytes(spec.head_dim)),
        ),
    )


def _apart(nbytes: int) -> int:
    """Bytes from one worker's scratch to the next: whole cache lines and an odd number of them.

    At a power of two the same row of every worker would fight for the same set of a shared cache.
    """
    return (-(-nbytes // PAGE_ALIGNMENT_BYTES) | 1) * PAGE_ALIGNMENT_BYTES


class _Launch:
    """One kernel's part of a plan, ready to be called for each layer."""

    def __init__(self, kernel: _Kernel, spec: AttentionSpec, plan: StepPlan, work: WorkList) -> None:
        items, worker_indptr, merges, page_table, seq_lens, cu_seqlens_q = addresses(
            work.items, work.worker_indptr, work.merges, plan.page_table, plan.seq_lens, plan.cu_seqlens_q
        )
        self._function, self._config = kernel.function, kernel.config
        self._workers, self._merges = len(work.worker_indptr) - 1, len(work.merges)
        self._partial_out = self._workers * kernel.scratch_bytes
        rows = work.num_partials * kernel.partial_rows
        self._partial_softmax = self._partial_out + rows * kernel.config.row_bytes
        self._nbytes = self._partial_softmax + rows * 8
        self._step = Step(
            items=items,
            worker_indptr=worker_indptr,
            merges=merges,
            page_table=page_table,
            page_table_row=plan.page_table.strides[0],
            seq_lens=seq_lens,
            cu_seqlens_q=cu_seqlens_q,
            page_size=plan.page_size,
            group=spec.group_size,
            causal=int(plan.causal),
            window_left=plan.window_left,
            partial_rows=kernel.partial_rows,
            partial_out=0,
            partial_softmax=0,
            scratch=0,
            scratch_bytes=kernel.scratch_bytes,
        )

    def __call__(self, call: Call) -> None:
        threads, step = num_threads(), self._in_scratch(borrow_scratch(self._nbytes))
        run(self._function, self._config, threads, self._workers, step, call)
        if self._merges:
            run(merge, self._config, threads, self._merges, step, call)

    def _in_scratch(self, scratch: int) -> Step:
        """The step with its places in scratch memory, which lies where it did for the layer before."""
        step = self._step
        if step.scratch != scratch:
            step = self._step = step._replace(
                scratch=scratch,
                partial_out=scratch + self._partial_out,
                partial_softmax=scratch + self._partial_softmax,
            )
        return step


class _Prepared(NamedTuple):
    """The host arrays that launches hold the addresses of, the launches, and strides by a call's layout."""

    step: StepPlan
    launches: list[_Launch]
    strides: dict[int | None, tuple[int | float, ...]]
    spec: AttentionSpec

    @property
    def notes(self) -> list[str]:
        """Tiles, threads and vectors, for plan.explain()."""
        tiles, (decode, prefill) = _tiling(self.spec, num_threads()), _kernels(self.spec)
        lines = []
        if len(self.step.decode.items):
            config = decode.config
            lines.append(describe_tile("decode", tiles.decode, config.heads, config.pairs))
        if len(self.step.prefill.items):
            rows, pairs = prefill.partial_rows, prefill.config.prefill_pairs
            lines.append(describe_tile("prefill", tiles.prefill, rows, pairs))
        return [*lines, describe_machine(num_threads())] if lines else []


def prepare(spec: AttentionSpec, step: StepPlan, device: torch.device) -> _Prepared:
    """The launches of a plan: decode, prefill or both."""
    work = zip(_kernels(spec), (step.decode, step.prefill), strict=True)
    launches = [_Launch(kernel, spec, step, shares) for kernel, shares in work if len(shares.items)]
    return _Prepared(step, launches, {}, spec)


_borrowed = threading.local()


def borrow_scratch(nbytes: int) -> int:
    """Scratch memory of the calling thread, which runs one kernel at a time; it grows and is kept."""
    buffer: torch.Tensor | None = getattr(_borrowed, "buffer", None)
    if buffer is None or buffer.numel() < nbytes:
        _borrowed.buffer = buffer = torch.empty(nbytes, dtype=torch.uint8)
    return buffer.data_ptr()


def attend(prepared: _Prepared, call: AttentionCall) -> None:
    """Run a plan's launches on one layer's tensors."""
    strides = prepared.strides.get(call.layout)
    if strides is None:
        strides = _strides(call)
        if call.layout is not None:
            prepared.strides[call.layout] = strides
    native = Call._make((
        call.q.data_ptr(), call.k_pages.data_ptr(), call.v_pages.data_ptr(), call.out.data_ptr(), _address(call.lse),
        _address(call.k_scale), _address(call.v_scale), _address(call.alibi_slopes), _address(call.sinks),
        _address(call.tree_mask), *strides,
    ))  # fmt: skip
    for launch in prepared.launches:
        launch(native)


def _strides(call: AttentionCall) -> tuple[int | float, ...]:
    """All of ``Call`` that is no address."""
    element, kv_element = call.q.element_size(), call.k_pages.element_size()
    return (
        *(stride * element for stride in call.q.stride()[:2]),
        *(stride * kv_element for stride in call.k_pages.stride()[:3]),
        *(stride * kv_element for stride in call.v_pages.stride()[:3]),
        *(stride * element for stride in call.out.stride()[:2]),
        0 if call.lse is None else call.lse.stride(0) * 4,
        *((0, 0, 0) if call.k_scale is None else (stride * 4 for stride in call.k_scale.stride())),
        0 if call.tree_mask is None else call.tree_mask.stride(0),
        float(call.scale),
        float(call.softcap),
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Write each token's K and V into its slot."""
    tokens, heads, head_dim = k.shape
    config = Config(DTYPE_CODES[k.dtype], DTYPE_CODES[k_pages.dtype], head_dim)
    slots = slot_mapping.contiguous()
    k_write, v_write = _native_write(k, k_pages, k_scale), _native_write(v, v_pages, v_scale)
    run(write, config, num_threads(), tokens, heads, slots.data_ptr(), k_pages.shape[2], k_write, v_write)


def _native_write(rows: torch.Tensor, pages: torch.Tensor, scale: torch.Tensor | None) -> Write:
    element, page_element = rows.element_size(), pages.element_size()
    pages_head, page, slot, _ = pages.stride()
    scale_head, scale_page, scale_slot = (0, 0, 0) if scale is None else scale.stride()
    return Write(
        rows=rows.data_ptr(),
        token=rows.stride(0) * element,
        head=rows.stride(1) * element,
        pages=pages.data_ptr(),
        pages_head=pages_head * page_element,
        page=page * page_element,
        slot=slot * page_element,
        scale=_address(scale),
        scale_head=scale_head * 4,
        scale_page=scale_page * 4,
        scale_slot=scale_slot * 4,
    )
