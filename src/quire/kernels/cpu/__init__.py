"""The CPU backend: paged attention in Numba, written in the SIMD words of ``simd`` and ``memory``."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from quire.kernels.cpu import decode as decoding
from quire.kernels.cpu import prefill as prefilling
from quire.kernels.cpu.launch import DTYPE_CODES, Config, num_threads, run
from quire.kernels.cpu.merge import merge
from quire.kernels.cpu.products import BLOCK, MAX_HEADS
from quire.kernels.cpu.rows import Call, Step
from quire.kernels.cpu.scores import ROWS
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
    return Tiling(
        num_workers=num_threads(),
        decode=TileShape(q_tokens=1, kv_tokens=BLOCK),
        prefill=TileShape(q_tokens=max(1, ROWS // spec.group_size), kv_tokens=prefilling.BLOCK),
        rows_stand_alone=True,
    )


@dataclass(frozen=True)
class _Launch:
    """One kernel's part of a plan, ready to be called for each layer."""

    kernel: Any
    config: Config
    work: WorkList
    step: Step
    scratch_bytes: int  # of all workers and partial states together

    def __call__(self, call: Call) -> None:
        threads, workers = num_threads(), len(self.work.worker_indptr) - 1
        scratch = borrow_scratch(self.scratch_bytes)
        partial_out = scratch + workers * self.step.scratch_bytes
        partial_softmax = (
            partial_out + self.work.num_partials * self.step.partial_rows * self.config.row_bytes
        )
        step = self.step._replace(scratch=scratch, partial_out=partial_out, partial_softmax=partial_softmax)
        run(self.kernel, self.config, threads, workers, step, call)
        if len(self.work.merges):
            run(merge, self.config, threads, len(self.work.merges), step, call)


def prepare(spec: AttentionSpec, step: StepPlan, device: torch.device) -> list[_Launch]:
    """The launches of a plan: decode, prefill or both."""
    q_dtype, kv_dtype = DTYPE_CODES[spec.dtype], DTYPE_CODES[spec.storage_dtype]
    tiles = -(-spec.group_size // MAX_HEADS)
    decode_config = Config(q_dtype, kv_dtype, spec.head_dim, heads=-(-spec.group_size // tiles))
    prefill_config = Config(q_dtype, kv_dtype, spec.head_dim)
    prefill_rows = tiling(spec, device).prefill.q_tokens * spec.group_size
    decode_scratch = decoding.scratch_bytes(spec.head_dim, spec.group_size)
    candidates = (
        (decoding.decode, decode_config, step.decode, spec.group_size, decode_scratch),
        (
            prefilling.prefill,
            prefill_config,
            step.prefill,
            prefill_rows,
            prefilling.scratch_bytes(spec.head_dim),
        ),
    )
    return [_launch(spec, step, *candidate) for candidate in candidates if len(candidate[2].items)]


def _launch(
    spec: AttentionSpec,
    step: StepPlan,
    kernel: Any,
    config: Config,
    work: WorkList,
    partial_rows: int,
    scratch: int,
) -> _Launch:
    # Workers' scratch starts on its own cache lines, an odd number of them apart: at a power of two
    # the same row of every worker would fight for the same set of a shared cache.
    lines = -(-scratch // PAGE_ALIGNMENT_BYTES) | 1
    native = Step(
        items=work.items.ctypes.data,
        worker_indptr=work.worker_indptr.ctypes.data,
        merges=work.merges.ctypes.data,
        page_table=step.page_table.ctypes.data,
        page_table_row=step.page_table.strides[0],
        seq_lens=step.seq_lens.ctypes.data,
        cu_seqlens_q=step.cu_seqlens_q.ctypes.data,
        page_size=step.page_size,
        group=spec.group_size,
        causal=int(step.causal),
        window_left=step.window_left,
        partial_rows=partial_rows,
        partial_out=0,
        partial_softmax=0,
        scratch=0,
        scratch_bytes=lines * PAGE_ALIGNMENT_BYTES,
    )
    workers = len(work.worker_indptr) - 1
    partials = work.num_partials * partial_rows * (config.row_bytes + 8)
    return _Launch(kernel, config, work, native, workers * native.scratch_bytes + partials)


_borrowed = threading.local()


def borrow_scratch(nbytes: int) -> int:
    """Scratch memory of the calling thread, which runs one kernel at a time; it grows and is kept."""
    buffer: torch.Tensor | None = getattr(_borrowed, "buffer", None)
    if buffer is None or buffer.numel() < nbytes:
        _borrowed.buffer = buffer = torch.empty(nbytes, dtype=torch.uint8)
    return buffer.data_ptr()


def attend(launches: list[_Launch], call: AttentionCall) -> None:
    """Run a plan's launches on one layer's tensors."""
    native = _native_call(call)
    for launch in launches:
        launch(native)


def _native_call(call: AttentionCall) -> Call:
    element, kv_element = call.q.element_size(), call.k_pages.element_size()
    q_token, q_head, _ = call.q.stride()
    out_token, out_head, _ = call.out.stride()
    k_head, k_page, k_slot, _ = call.k_pages.stride()
    v_head, v_page, v_slot, _ = call.v_pages.stride()
    scale_head, scale_page, scale_slot = (0, 0, 0) if call.k_scale is None else call.k_scale.stride()
    return Call(
        q=call.q.data_ptr(),
        q_token=q_token * element,
        q_head=q_head * element,
        k=call.k_pages.data_ptr(),
        k_head=k_head * kv_element,
        k_page=k_page * kv_element,
        k_slot=k_slot * kv_element,
        v=call.v_pages.data_ptr(),
        v_head=v_head * kv_element,
        v_page=v_page * kv_element,
        v_slot=v_slot * kv_element,
        out=call.out.data_ptr(),
        out_token=out_token * element,
        out_head=out_head * element,
        lse=_address(call.lse),
        lse_token=0 if call.lse is None else call.lse.stride(0) * 4,
        k_scale=_address(call.k_scale),
        v_scale=_address(call.v_scale),
        scale_head=scale_head * 4,
        scale_page=scale_page * 4,
        scale_slot=scale_slot * 4,
        alibi_slopes=_address(call.alibi_slopes),
        sinks=_address(call.sinks),
        tree_mask=_address(call.tree_mask),
        tree_mask_row=0 if call.tree_mask is None else call.tree_mask.stride(0),
        softmax_scale=float(call.scale),
        softcap=float(call.softcap),
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
