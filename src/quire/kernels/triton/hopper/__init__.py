"""Prefill for Hopper: warps that load, warps that compute, and barriers between them.

A program walks one worker's items. *Loader* warps ask the copy engine (TMA) for the query tile and for blocks of keys
and values, one box per page, into rings of shared memory; two *consumer* warpgroups of 64 query rows each multiply
them with asynchronous matrix instructions. Each tile in shared memory has two barriers: ``full`` (its bytes have
landed) and ``free`` (both warpgroups have read it).

A query tile is a box of the queries as [tokens, kv_heads, group, head_dim]: row r is token r // GROUP_ROWS and query
head r % GROUP_ROWS of its KV head, the group padded to a power of two with rows that the copy engine fills with zeros.

The unused slots of a sequence's last page must not be loaded: 0 · NaN is NaN. Its box is moved so that the valid
tokens end it. What lies ahead of the page is outside the tensor, and is filled with zeros.

``geometry`` is what both sides agree on, ``load`` the loaders, ``attend`` the consumers and the kernel, ``finish`` the
end of a tile. This module is the host's side: when the kernel serves (``why_not``, ``why_not_rules``, ``why_not_call``), and its launch.

Sources: FlashAttention-3, arXiv:2407.08608; PagedAttention, arXiv:2309.06180.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from quire.kernels.call import AttentionCall
from quire.kernels.triton.addresses import ALIGNMENT
from quire.kernels.triton.device_plan import DevicePlan, DeviceWork
from quire.kernels.triton.interpreted import INTERPRETED
from quire.kernels.triton.launch import Enqueue, Form, Options
from quire.kernels.triton.tune import Chip, Tile, power_of_two
from quire.planning.work_list import Capacity, TileShape
from quire.spec import AttentionSpec

ROWS = 128  # of a tile, two warpgroups of 64
BLOCK_N = 128  # keys of a block
STAGES = 2
TILE = Tile(ROWS, BLOCK_N, num_warps=12, num_stages=STAGES, workers_per_sm=1)
LOADER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # of each thread: 3 × 128 threads share 64 K
TRITON = "3.6."  # Gluon changes between releases; others may compile it, but have not run it
CAPABILITY = 90  # its matrix and copy instructions are this chip's alone
TILE_COST = 320  # KV tokens that a tile's beginning and end take the time of
MIN_BOX = 16  # tokens: smaller boxes would keep the loaders busier than the matrix unit
SLAB = 64  # columns of a box: 128 bytes
LOG2_E = math.log2(math.e)


def why_not(spec: AttentionSpec, chip: Chip) -> str | None:
    """A phrase if the kernel cannot serve the layers of this spec on this chip."""
    if chip.name != "cuda" or chip.capability != CAPABILITY or INTERPRETED:
        return "the chip is not a Hopper"
    if not triton.__version__.startswith(TRITON):
        return f"Triton is {triton.__version__}, not {TRITON}x"
    if spec.dtype == torch.float32 or spec.quantized:
        return "pages are neither bfloat16 nor float16"
    if spec.head_dim not in (64, 128):
        return f"head_dim is {spec.head_dim}, neither 64 nor 128"
    if math.gcd(spec.page_size, BLOCK_N) < MIN_BOX:
        return f"page_size is {spec.page_size}, no multiple of {MIN_BOX}"
    if spec.group_size > ROWS // 2:
        return f"{spec.group_size} query heads share a KV head, more than {ROWS // 2}"
    return None


def why_not_rules(rules: Capacity) -> str | None:
    """A phrase if the kernel cannot serve steps of these rules for a layer that it could serve otherwise."""
    if rules.window_left >= 0:
        return "a window is set"
    if rules.kv_split:
        return "a batch-invariant step needs each key in the same column whatever ends behind it"
    return None


def why_not_call(call: AttentionCall) -> str | None:
    """A phrase if the kernel cannot serve this call of a layer that it could serve otherwise."""
    _, softcap, alibi_slopes, sinks, tree_mask, *_ = call.scoring
    if softcap or any(x is not None for x in (alibi_slopes, sinks, tree_mask)):
        return "softcap, alibi_slopes, sinks or tree_mask is given"
    if call.scale <= 0:
        return "softmax_scale is not positive"
    for tensor in (call.q, call.k_pages, call.v_pages, call.out):
        step = ALIGNMENT // tensor.element_size()
        if tensor.data_ptr() % ALIGNMENT or any(s % step or s <= 0 for s in tensor.stride()[:-1]):
            return "a tensor's rows do not start on 16 bytes"
        if not tensor.numel() or tensor.stride(-1) != 1:
            return "a tensor is empty or its rows are not contiguous"
    return None


def note(reason: str | None) -> str:
    """The choice of a plan's prefill kernel in words, given what ``why_not`` said."""
    if reason is None:
        return (
            "prefill kernel: Hopper's (warps that load, warps that compute), portable where softcap, ALiBi, sinks, a tree "
            "mask or a softmax_scale not above 0 is given, or a tensor is empty or its rows do not start on 16 bytes"
        )
    return f"prefill kernel: portable, not Hopper's, because {reason}"


def tile_shape(spec: AttentionSpec, chip: Chip) -> TileShape:
    """A tile of the kernel; other prefill kernels can walk the same work."""
    return TileShape(ROWS // power_of_two(spec.group_size), BLOCK_N, chip.multiprocessors)


class Box(NamedTuple):
    """A tensor as the copy engine sees it: what a launch reads of a Triton ``TensorDescriptor``, without its checks."""

    base: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"  # of what lies outside


_forms: dict[Any, Form] = {}  # compiled kernels, by what they are compiled for


class Prefill:
    """The kernel for one plan's prefill."""

    def __init__(
        self, spec: AttentionSpec, plan: DevicePlan, work: DeviceWork, causal: bool, device: torch.device
    ) -> None:
        self._spec, self._causal, self._device = spec, causal, device
        self._num_workers, self._table_row = work.num_workers, plan.page_table.shape[1]
        self._sections = (
            work.items, work.worker_indptr, work.arrivals, plan.page_table, work.partial_out, work.partial_lse,
        )  # fmt: skip
        self._order = plan.order

    def bind(self, call: AttentionCall, granted: Any) -> Enqueue:
        """The launch on tensors like this call's; ``why_not`` and ``why_not_call`` have been asked."""
        numbers = call.scale * LOG2_E, self._table_row
        strides = (*call.out.stride()[:2], 0 if call.lse is None else call.lse.stride(0))
        key = (self._spec, self._causal, self._device, strides, granted, call.lse is None)
        form = _forms.get(key)
        if form is None:
            form = _forms[key] = self._compile(call, numbers, strides)
        launch = form.bind(self._num_workers, self._device, self._sections, numbers, self._order)

        def enqueue(tensors: Sequence[Any], addresses: Sequence[int | None]) -> None:
            q, k_pages, v_pages, out, *_ = tensors
            given: Any = (*self._boxes(q, k_pages, v_pages, out), addresses[3], addresses[4])
            launch((), given)

        return enqueue

    def _boxes(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor
    ) -> tuple[Box, ...]:
        return self._by_group(q), by_page(k_pages), by_page(v_pages), self._by_group(out)

    def _by_group(self, rows: torch.Tensor) -> Box:
        """Queries or results as [tokens, kv_heads, group, head_dim]."""
        tokens, heads, head_dim = rows.shape
        token, head, _ = rows.stride()
        group = self._spec.group_size
        return Box(rows, (tokens, heads // group, group, head_dim), (token, group * head, head, 1))

    def _compile(self, call: AttentionCall, numbers: tuple[float, ...], strides: tuple[int, ...]) -> Form:
        # Imported here: Gluon is an experimental part of Triton, and only this kernel needs it.
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from quire.kernels.triton.hopper.attend import hopper_prefill

        spec = self._spec
        group_rows = power_of_two(spec.group_size)
        rows = [ROWS // 2 // group_rows, 1, group_rows, spec.head_dim]
        page = [1, 1, math.gcd(spec.page_size, BLOCK_N), SLAB]
        layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        descriptors = [
            TensorDescriptor(box.base, list(box.shape), list(box.strides), block, layout)
            for box, block in zip(self._boxes(*call[:4]), (rows, page, page, rows), strict=True)
        ]
        constants = (
            spec.group_size, spec.page_size, BLOCK_N, STAGES, self._causal, LOADER_REGISTERS, CONSUMER_REGISTERS,
        )  # fmt: skip
        tensors = (call.out, call.lse, *[section.tensor for section in self._sections])
        return Form.compile(
            hopper_prefill,
            self._device,
            (*descriptors, *tensors),
            numbers,
            (*strides, *constants),
            Options(num_warps=4, num_stages=1, enable_fp_fusion=True),
        )


def by_page(pages: torch.Tensor) -> Box:
    """Keys or values as they are, [kv_heads, num_pages, page_size, head_dim]."""
    return Box(pages, tuple(pages.shape), pages.stride())
