"""The attention kernel: persistent workers, each walking its share of the plan's tiles.

Decode and prefill are two launches of it, each with its own tile shape: a decode tile holds the few query rows
of one KV head, a prefill tile as many tokens of a sequence as fill the matrix units, all query heads of the KV
head packed together (GQA). A tile that the plan split between workers leaves partial states, and the last worker
to finish its part folds them: no second launch, no host in between.

Sources: PagedAttention, arXiv:2309.06180 §4.1; Stream-K, arXiv:2301.03598; GQA packing, FlashAttention.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quire.kernels.call import AttentionCall, BoundCall
from quire.kernels.triton import hopper, tune
from quire.kernels.triton.addresses import addresses_of, is_small
from quire.kernels.triton.device_plan import COLUMNS, DevicePlan, DeviceWork
from quire.kernels.triton.interpreted import INTERPRETED
from quire.kernels.triton.launch import Enqueue, Form, Options
from quire.kernels.triton.layout import in_rows, no_values, per_row
from quire.kernels.triton.merge import arrived_last, fold_parts, leave_partial, write_rows
from quire.kernels.triton.pages import page_ids, prefetch_rows, slots_in_page
from quire.kernels.triton.tile import (
    NO_SCORE,
    CompiledFor,
    Pages,
    Reach,
    Rows,
    attend_keys,
    first_unit,
    scores_in_base_2,
    split_queries,
    value_unit,
)
from quire.planning.work_list import Capacity
from quire.spec import AttentionSpec

WORD = 4  # one-byte elements to an int32
_FOLD_ROWS = 32  # rows of a prefill tile that are folded at a time
_FOLD_ELEMENTS = 4096  # elements of partial results that are folded at a time
# Arguments that change from step to step: compiled code must not depend on their values.
PER_STEP = ["table_row", "window_left", "mask_token", "mask_columns"]


@triton.jit(do_not_specialize=PER_STEP)
def attend(
    q, k, v, out, lse, alibi_slopes, sinks, tree_mask, k_scale, v_scale,
    items, worker_indptr, arrivals, cu_seqlens_q, page_table, partial_out, partial_lse,
    softmax_scale, softcap, table_row, window_left, mask_token, mask_columns,
    q_token, q_head, out_token, out_head, lse_token,
    k_head, k_page, k_slot, v_head, v_page, v_slot, scale_head, scale_page, scale_slot,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FOLD_ROWS: tl.constexpr, FOLD_PARTS: tl.constexpr, ITEM: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, FORMAT: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, SAME_STRIDES: tl.constexpr, TRANSPOSED: tl.constexpr,
    INVARIANT: tl.constexpr, OVERLAPS: tl.constexpr, LOOKS_AHEAD: tl.constexpr, CAPABILITY: tl.constexpr,
    PHASES: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attend this worker's items, whose columns are ``device_plan.ITEM_COLUMNS``.

    With two PHASES, the keys that every row of a tile sees are walked first and without a mask. A kernel that OVERLAPS
    may begin while the kernel ahead of it in the stream still runs; it also LOOKS_AHEAD to its next items.
    """
    FINE: tl.constexpr = FORMAT != "same" and out.dtype.element_ty == tl.float16
    APART: tl.constexpr = TRANSPOSED and PACKED
    compiled_for: tl.constexpr = CompiledFor(
        HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, PLAIN,
        FORMAT, PACKED, ALIGNED, TRANSPOSED, INVARIANT, FINE, CAPABILITY, PRECISION, NUM_STAGES,
    )  # fmt: skip
    worker = tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    if SAME_STRIDES:  # one address serves a key and its value
        v_page, v_slot = k_page, k_slot
    # A worker's first item also stands at the worker's number, so that its load need not wait for the list's bounds.
    (
        sequence, kv_head, q_begin, q_len, q_position, begin, end, partial, first_partial, num_parts,
    ) = load_item(items + worker * ITEM, True)  # fmt: skip
    first_item, last_item = tl.load(worker_indptr + worker), tl.load(worker_indptr + worker + 1)
    if LOOKS_AHEAD:
        # Columns are loaded two items ahead and first page ids one item ahead, so that an item waits for its queries
        # and keys alone.
        table = page_table + sequence.to(tl.int64) * table_row
        page = page_ids(table, begin // BLOCK_N * BLOCK_N, begin, end - 1, PAGE_SIZE, BLOCK_N, ALIGNED)
        (
            sequence2, kv_head2, q_begin2, q_len2, q_position2, begin2, end2, partial2, first_partial2, num_parts2,
        ) = load_item(items + (first_item + 1) * ITEM, first_item + 1 < last_item)  # fmt: skip
        if OVERLAPS:
            # The plan was complete before the kernel ahead began. Keys may be written by that kernel, so that until it
            # has ended they are only prefetched, into the cache that all multiprocessors share.
            if first_item < last_item:
                slot = slots_in_page(begin // BLOCK_N * BLOCK_N, begin, end - 1, PAGE_SIZE, BLOCK_N, ALIGNED)
                at = page.to(tl.int64)
                prefetch_rows(k + kv_head * k_head, at * k_page + slot * k_slot, HEAD_DIM, PACKED)
                prefetch_rows(v + kv_head * v_head, at * v_page + slot * v_slot, HEAD_DIM, PACKED)
            # Also without items: if this program ended before the kernel ahead, the one behind could begin too early.
            gdc_wait()
            gdc_launch_dependents()
    for item in range(first_item, last_item):
        start = begin // BLOCK_N * BLOCK_N
        k_here, v_here = k + kv_head * k_head, v + kv_head * v_head
        if LOOKS_AHEAD:
            table2 = page_table + sequence2.to(tl.int64) * table_row
            start2 = begin2 // BLOCK_N * BLOCK_N
            page2 = page_ids(table2, start2, begin2, end2 - 1, PAGE_SIZE, BLOCK_N, ALIGNED)
            (
                sequence3, kv_head3, q_begin3, q_len3, q_position3, begin3, end3, partial3, first_partial3, num_parts3,
            ) = load_item(items + (item + 2) * ITEM, item + 2 < last_item)  # fmt: skip
        else:
            # Before queries: storing queries to shared memory ends in a barrier, and no load moves ahead of one.
            table = page_table + sequence.to(tl.int64) * table_row
            page = page_ids(table, start, begin, end - 1, PAGE_SIZE, BLOCK_N, ALIGNED)

        token = q_begin + row // GROUP
        head = kv_head * GROUP + row % GROUP
        valid = row < q_len * GROUP
        at = q + (token.to(tl.int64) * q_token + head * q_head)[:, None] + dim[None, :]
        queries = tl.load(at, mask=valid[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        queries, q_unit = split_queries(queries, FORMAT)
        score_scale = softmax_scale * q_unit
        position = q_position + row // GROUP
        slopes = None
        if alibi_slopes is not None:
            slopes = tl.load(alibi_slopes + head, mask=valid, other=0.0)
        mask_row, first_new = None, 0
        unmasked = tl.minimum(q_position + 1, end) if CAUSAL else end
        if tree_mask is not None:
            mask_row = tree_mask + tl.where(valid, token, q_begin).to(tl.int64) * mask_token
            first_new = q_position - (q_begin - tl.load(cu_seqlens_q + sequence))
            unmasked = tl.minimum(unmasked, first_new)

        k_scale_here, v_scale_here = None, None
        if FORMAT != "same":
            k_scale_here, v_scale_here = k_scale + kv_head * scale_head, v_scale + kv_head * scale_head

        m = tl.full([BLOCK_M], NO_SCORE, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = no_values(BLOCK_M, BLOCK_D, TRANSPOSED, APART)
        unit = first_unit(FORMAT, queries.dtype, INVARIANT, BLOCK_M)
        rows = Rows(queries, score_scale, position, slopes, mask_row, first_new, mask_columns, window_left)
        reach = Reach(table, begin, end)
        pages = Pages(
            k_here, v_here, k_scale_here, v_scale_here, k_page, k_slot, v_page, v_slot, scale_page, scale_slot
        )
        split = start
        if PHASES == 2:
            split = start + tl.maximum(unmasked - start, 0) // BLOCK_N * BLOCK_N
            m, l, acc, unit, page = attend_keys(
                m, l, acc, unit, page, rows, reach, pages, start, split, softcap, False, compiled_for
            )
        m, l, acc, unit, page = attend_keys(
            m, l, acc, unit, page, rows, reach, pages, split, end, softcap, True, compiled_for
        )
        m = scores_in_base_2(m, score_scale, queries.dtype, PLAIN, FORMAT)
        acc = in_rows(acc, TRANSPOSED, APART)
        if FORMAT != "same":
            acc = acc * per_row(unit * value_unit(FORMAT, queries.dtype), False)

        if num_parts == 1:
            write_rows(
                m, l, acc, out, lse, sinks, token, head, valid,
                out_token, out_head, lse_token, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
        else:
            leave_partial(m, l, acc, partial, partial_out, partial_lse, valid, BLOCK_M, BLOCK_D)
            if arrived_last(first_partial, num_parts, arrivals):
                for first_row in range(0, q_len * GROUP, FOLD_ROWS):
                    fold_row = first_row + tl.arange(0, FOLD_ROWS)
                    fold_valid = fold_row < q_len * GROUP
                    m2, l2, acc2 = fold_parts(
                        first_partial, num_parts, fold_row, fold_valid, partial_out, partial_lse,
                        BLOCK_M, BLOCK_D, FOLD_ROWS, FOLD_PARTS,
                    )  # fmt: skip
                    write_rows(
                        m2, l2, acc2, out, lse, sinks,
                        q_begin + fold_row // GROUP, kv_head * GROUP + fold_row % GROUP, fold_valid,
                        out_token, out_head, lse_token, HEAD_DIM, BLOCK_D,
                    )  # fmt: skip
        if LOOKS_AHEAD:
            sequence, kv_head, q_begin, q_len, q_position = sequence2, kv_head2, q_begin2, q_len2, q_position2
            begin, end, partial, first_partial, num_parts = begin2, end2, partial2, first_partial2, num_parts2
            sequence2, kv_head2, q_begin2, q_len2, q_position2 = (
                sequence3,
                kv_head3,
                q_begin3,
                q_len3,
                q_position3,
            )
            begin2, end2, partial2, first_partial2, num_parts2 = (
                begin3,
                end3,
                partial3,
                first_partial3,
                num_parts3,
            )
            table, page = table2, page2
        else:
            (
                sequence, kv_head, q_begin, q_len, q_position, begin, end, partial, first_partial, num_parts,
            ) = load_item(items + (item + 1) * ITEM, item + 1 < last_item)  # fmt: skip


@triton.jit
def load_item(entry, exists):
    """The columns of an item, zeros where there is none; ``kv_head`` in 64 bits, as addresses are computed with it."""
    return (
        tl.load(entry, mask=exists, other=0), tl.load(entry + 1, mask=exists, other=0).to(tl.int64),
        tl.load(entry + 2, mask=exists, other=0), tl.load(entry + 3, mask=exists, other=0),
        tl.load(entry + 4, mask=exists, other=0), tl.load(entry + 5, mask=exists, other=0),
        tl.load(entry + 6, mask=exists, other=0), tl.load(entry + 7, mask=exists, other=0),
        tl.load(entry + 8, mask=exists, other=0), tl.load(entry + 9, mask=exists, other=0),
    )  # fmt: skip


class Constants(NamedTuple):
    """What the attention kernel is compiled for, in the order of its arguments."""

    group: int
    head_dim: int
    page_size: int
    block_m: int
    block_n: int
    block_d: int
    fold_rows: int
    fold_parts: int
    item: int
    causal: bool
    window: bool
    softcap: bool
    plain: bool
    format: str
    packed: bool
    aligned: bool
    same_strides: bool
    transposed: bool
    invariant: bool
    overlaps: bool
    looks_ahead: bool
    capability: int
    phases: int
    precision: str
    num_stages: int


class _Recipe(NamedTuple):
    """How a plan's launch is compiled, and its compiled forms."""

    constants: Constants
    options: Options
    forms: dict[Any, Form]  # by the layout of a call's tensors


@functools.lru_cache(maxsize=1024)
def _recipe(
    spec: AttentionSpec, tile: tune.Tile, phases: int, device: torch.device, chip: tune.Chip, causal: bool,
    window: bool, invariant: bool,
) -> _Recipe:  # fmt: skip
    """Kept per device, as code is loaded per device."""
    constants = _constants(spec, tile, phases, chip, causal, window, invariant)
    return _Recipe(constants, Options.of(tile, constants.overlaps), {})


def _constants(
    spec: AttentionSpec,
    tile: tune.Tile,
    phases: int,
    chip: tune.Chip,
    causal: bool,
    window: bool,
    invariant: bool,
) -> Constants:
    """The constants for steps of this spec; ``_tail`` changes those that depend on a call."""
    block_d = tune.block_dim(spec.head_dim)
    fold_rows = min(tile.rows, _FOLD_ROWS) if phases == 2 else tune.power_of_two(spec.group_size)
    return Constants(
        group=spec.group_size,
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        block_m=tile.rows,
        block_n=tile.kv_tokens,
        block_d=block_d,
        fold_rows=fold_rows,
        fold_parts=max(1, _FOLD_ELEMENTS // (fold_rows * block_d)),
        item=COLUMNS,
        causal=causal,
        window=window,
        softcap=False,
        plain=True,
        format=spec.kv_dtype or "same",
        # Where even and odd dims are multiplied apart, half of the dims must fill the matrix units' rows.
        packed=spec.quantized
        and spec.dtype != torch.float32
        and spec.head_dim % WORD == 0
        and block_d >= 2 * tune.MIN_ROWS,
        aligned=not window and (tile.kv_tokens % spec.page_size == 0 or spec.page_size % tile.kv_tokens == 0),
        same_strides=True,
        transposed=tile.transposed,
        invariant=invariant,
        overlaps=phases == 1 and chip.overlaps_launches and not INTERPRETED,
        looks_ahead=phases == 1,
        capability=chip.capability if chip.name == "cuda" else 0,
        phases=1 if window else phases,
        # Three products of tf32 halves carry float32's precision on the matrix units.
        precision="ieee" if chip.name == "hip" else "tf32x3",
        num_stages=tile.num_stages,
    )


class Launch:
    """The kernel's part of a plan, decode or prefill, for tensors of any layout."""

    def __init__(
        self, spec: AttentionSpec, rules: Capacity, plan: DevicePlan, work: DeviceWork, tile: tune.Tile, phases: int,
        device: torch.device, use_hopper: bool,
    ) -> None:  # fmt: skip
        rule = rules.causal, rules.window_left >= 0, rules.kv_split > 0
        self._recipe = _recipe(spec, tile, phases, device, tune.chip_of(device), *rule)
        self._num_workers, self._device = work.num_workers, device
        self._sections = (
            work.items, work.worker_indptr, work.arrivals, plan.cu_seqlens_q, plan.page_table,
            work.partial_out, work.partial_lse,
        )  # fmt: skip
        self._order, self._window_left = plan.order, rules.window_left
        self._is_small = torch.version.hip is None or is_small(plan.page_table.buffer)  # as in addresses_of
        self._hopper = hopper.Prefill(spec, plan, work, rules.causal, device) if use_hopper else None

    def bind(self, call: AttentionCall) -> BoundCall:
        """The launch on tensors of this call's layout."""
        scoring = call.scoring.numbers
        mask = call.scoring.tree_mask
        # Floats even where the caller gave whole numbers, for which other code would be compiled.
        numbers = (
            float(call.scale), float(call.scoring.softcap), self._sections[4].shape[1], self._window_left,
            0 if mask is None else mask.stride(0), 0 if mask is None else mask.shape[1],
        )  # fmt: skip
        enqueues: dict[Any, Enqueue] = {}

        def run(*tensors: torch.Tensor | None) -> None:
            addresses, granted = addresses_of(tensors)
            enqueue = enqueues.get(granted)
            if enqueue is None:
                enqueue = enqueues[granted] = self._bind(AttentionCall.of(tensors, scoring), granted, numbers)
            enqueue(tensors, addresses)

        return run

    def _bind(self, call: AttentionCall, granted: Any, numbers: tuple[float, ...]) -> Enqueue:
        """The launch on tensors that are also aligned like these, compiled on first use."""
        if self._hopper and hopper.why_not_call(call) is None:
            return self._hopper.bind(call, granted)
        recipe = self._recipe
        strides = [None if tensor is None else tensor.stride() for tensor in call.tensors]
        layout = (*strides, call.scoring.softcap > 0, call.scale > 0, granted, self._is_small)
        form = recipe.forms.get(layout)
        if form is None:
            tensors = (*call.tensors, *[section.tensor for section in self._sections])
            form = Form.compile(
                attend, self._device, tensors, numbers, _tail(recipe.constants, call), recipe.options
            )
            recipe.forms[layout] = form
        return form.bind(self._num_workers, self._device, self._sections, numbers, self._order)


def _tail(constants: Constants, call: AttentionCall) -> tuple[Any, ...]:
    """The kernel's last arguments: strides, then what the call adds to the plan's constants."""
    q, k_pages, v_pages, out, lse, scoring = call
    k_scale = scoring.k_scale
    k_head, *k_strides, _ = k_pages.stride()
    v_head, *v_strides, _ = v_pages.stride()
    # Whether rows of one-byte elements can be read four at a time.
    whole = k_pages.data_ptr() | v_pages.data_ptr()
    for stride in (k_head, v_head, *k_strides, *v_strides):
        whole |= stride
    packed = constants.packed and whole % WORD == 0
    if packed:
        k_strides, v_strides = ([stride // WORD for stride in strides] for strides in (k_strides, v_strides))
    strides = (
        *q.stride()[:2], *out.stride()[:2], 0 if lse is None else lse.stride(0),
        k_head, *k_strides, v_head, *v_strides, *((0, 0, 0) if k_scale is None else k_scale.stride()),
    )  # fmt: skip
    constants = constants._replace(
        packed=packed,
        softcap=scoring.softcap > 0,
        plain=not scoring.softcap and scoring.alibi_slopes is None and call.scale > 0,
        same_strides=k_strides == v_strides,
    )
    return (*strides, *constants)
