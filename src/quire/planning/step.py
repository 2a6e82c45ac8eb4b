"""The host plan: lengths and page tables become index lists and equal shares of work.

One step's attention is a set of *tiles*: a run of query tokens of one sequence, with all query heads of
one KV head packed together (GQA), against the KV range they may see. Tiles are laid end to end on a line
measured in work; the line is cut into ``num_workers`` equal shares, and a tile that straddles a cut is split
along its KV range (FlashDecoding's split, placed the Stream-K way: at most ``num_workers − 1`` splits in all,
whatever the lengths). Split tiles leave partial softmax states, which ``merges`` says how to fold.
A batch-invariant step (``Tiling.kv_split``) is split at fixed keys instead, and shares are runs of whole parts.

``stream_k.cut_step`` does the arithmetic, compiled; the index lists of pages (``work_list.StepPlan``) are NumPy over
whole batches.

Sources: PagedAttention, arXiv:2309.06180 §4; FlashDecoding (KV split); Stream-K, arXiv:2301.03598.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from quire.errors import ArgumentError, ShapeError
from quire.kernels.ahead import Job
from quire.planning.checks import check_page_ids
from quire.planning.work_list import Ints, StepPlan, TileShape, Tiling, WorkBound, WorkList

MAX_TOKENS = 2**31 - 1
# The most query tokens that a step may have, and what raises the error for the lengths and starts of one with more.
TokenLimit = tuple[int, Callable[[Ints, Ints], None]]


def plan_step(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    num_kv_heads: int,
    page_size: int,
    causal: bool,
    window_left: int,
    tiling: Tiling,
    limit: TokenLimit | None = None,
) -> StepPlan:
    """Copy one step and cut it into one equal share per worker and kernel.

    Args:
        page_table, seq_lens, cu_seqlens_q: the step, its shapes and dtypes already checked. Lengths are on the host. A
            page table on a device is left there: the backend copies it.
        window_left: keys further back than this many positions are out of sight; −1 for no window.
        tiling: how the backend wants it cut.
        limit: of query tokens where cu_seqlens_q is given; 2³¹ − 1 when None.
    Raises:
        ArgumentError: lengths that make no step, negative page ids, or tensors without memory.
    Cost: a microsecond per hundred items and per 5,000 page ids; the first plan of a process loads Numba.
    """
    batch, max_pages = page_table.shape
    device_table, table_at, row, column = None, 0, max_pages, 1
    if page_table.is_cpu:
        table_at = _address("page_table", page_table)
        if not page_table.is_contiguous():
            row, column = page_table.stride()
    else:
        device_table = page_table
    seq_lens, starts_at, starts_bytes = seq_lens.contiguous(), 0, 0
    if cu_seqlens_q is not None:
        cu_seqlens_q = cu_seqlens_q.contiguous()
        starts_at, starts_bytes = _address("cu_seqlens_q", cu_seqlens_q), cu_seqlens_q.element_size()
    arguments = (
        _address("seq_lens", seq_lens), seq_lens.element_size(), starts_at, starts_bytes, table_at, row * 4, column * 4,
        batch, max_pages, page_size, tiling, num_kv_heads, causal, window_left,
        MAX_TOKENS if limit is None or cu_seqlens_q is None else limit[0],
    )  # fmt: skip

    def cut(*, leaves_prefill: bool) -> StepPlan:
        numbers, fits, num_tokens, max_q_len, max_seq_len, highest_page, decode, prefill = _arithmetic()(
            *arguments, leaves_prefill
        )
        if not fits:
            _refuse(numbers[:batch], numbers[batch:], page_table, page_size, limit)
        return StepPlan(
            numbers, device_table, batch, max_pages, page_size, causal, window_left, WorkList(numbers, *decode),
            WorkList(numbers, *prefill), tiling.kv_split, num_tokens, max_q_len, max_seq_len, highest_page,
        )  # fmt: skip

    if not tiling.prefill_tile_cost or tiling.kv_split:
        return cut(leaves_prefill=False)
    step = cut(leaves_prefill=True)
    if step.max_q_len > tiling.decode_max_q_len:
        prefill = _dealt(step, num_kv_heads, tiling)
        if prefill is None:  # few tiles, so that both cost little
            return cut(leaves_prefill=False)
        step.prefill = prefill
    return step


def on_other_pages(step: StepPlan, page_table: torch.Tensor) -> StepPlan:
    """The same lengths, work and rules over another page table [batch, max_pages], whose shape is checked.

    Raises:
        ShapeError: a table too narrow for the longest sequence.
        ArgumentError: a negative page id.
    Cost: a copy of the step's numbers and of the table.
    """
    max_pages, needed = page_table.shape[1], int(step.pages_per_sequence.max(initial=0))
    if max_pages < needed:
        raise ShapeError(
            f"page_table must have {needed} columns for this step's lengths; got {max_pages}. "
            "Fix: the rows of the step's sequences, whole"
        )
    device_table: torch.Tensor | None = page_table
    ids, highest = np.empty(0, np.int64), -1
    if page_table.is_cpu:
        table, device_table = page_table.numpy(), None
        check_page_ids(table, step.seq_lens, step.page_size)
        used = np.arange(max_pages) < step.pages_per_sequence[:, None]
        highest = int(table.max(initial=-1, where=used))
        ids = np.zeros(-(-table.size // 2), np.int64)
        ids.view(np.int32)[: table.size] = table.ravel()
    first = 2 * step.batch + 1
    behind = first + (-(-step.batch * step.max_pages // 2) if step.device_table is None else 0)
    numbers = np.concatenate((step.numbers[:first], ids, step.numbers[behind:]))

    def moved(work: WorkList) -> WorkList:
        if work.lists is not step.numbers:
            return work
        return work._replace(lists=numbers, at=work.at + first + len(ids) - behind)

    return replace(
        step,
        numbers=numbers,
        device_table=device_table,
        max_pages=max_pages,
        decode=moved(step.decode),
        prefill=moved(step.prefill),
        highest_page=highest,
    )


def _address(name: str, tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie, for ``stream_k.cut_step``."""
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ArgumentError(
            f"{name} must hold data; got a {type(tensor).__name__} without memory. Fix: plan with a real tensor"
        )
    return address


def _refuse(
    lens: Ints, starts: Ints, page_table: torch.Tensor, page_size: int, limit: TokenLimit | None
) -> None:
    """Say which number of a step is wrong."""
    max_pages = page_table.shape[1]
    if len(lens) and lens.min() < 0:
        raise ArgumentError(
            f"seq_lens must not be negative; got {lens.min()}. Fix: use 0 for an empty sequence"
        )
    if len(lens) and lens.max() > max_pages * page_size:
        row = int(lens.argmax())
        raise ShapeError(
            f"page_table must have {-(-int(lens[row]) // page_size)} columns for seq_lens[{row}]={lens[row]} at "
            f"page_size {page_size}; got {max_pages}. Fix: append the tokens to the page table first"
        )
    if starts[0] != 0 or (starts[1:] < starts[:-1]).any():
        raise ArgumentError(
            f"cu_seqlens_q must start with 0 and never decrease; got {starts[:8].tolist()}. "
            "Fix: the cumulative sum of query lengths, with a leading 0"
        )
    if limit is not None and starts[-1] > limit[0]:
        limit[1](lens, starts)
    if starts[-1] > MAX_TOKENS:
        raise ArgumentError(
            f"cu_seqlens_q must end with at most {MAX_TOKENS} query tokens; got {starts[-1]}. "
            "Fix: the cumulative sum of query lengths, with a leading 0"
        )
    check_page_ids(page_table.numpy(), lens, page_size)


def largest_work(
    tiling: Tiling, num_kv_heads: int, max_batch: int, max_tokens: int, max_seq_len: int, max_q_len: int
) -> tuple[WorkBound, WorkBound]:
    """The most work that decode and prefill of a step within these limits can have."""
    few = tiling.decode_max_q_len
    short = max_batch * -(-min(max_q_len, few) // tiling.decode.q_tokens)
    long, q_tokens = min(max_batch, max_tokens // (few + 1)), tiling.prefill.q_tokens
    tiles = 0 if max_q_len <= few else min(long * -(-max_q_len // q_tokens), long + max_tokens // q_tokens)
    return (
        _largest(tiling.decode, tiling, short * num_kv_heads, max_seq_len),
        _largest(tiling.prefill, tiling, tiles * num_kv_heads, max_seq_len),
    )


def _largest(shape: TileShape, tiling: Tiling, tiles: int, max_seq_len: int) -> WorkBound:
    """The most work of this many tiles.

    A cut between shares splits at most one tile, and leaves at least two blocks on both sides. Where parts have
    workers of their own, there are no more parts than workers.
    """
    workers, kv_split = shape.num_workers or tiling.num_workers, tiling.kv_split
    if kv_split:
        parts = -(-max_seq_len // kv_split)
        return WorkBound(workers, tiles * parts, tiles * parts if parts > 1 else 0)
    cuts = min(workers - 1, tiles * max(0, max_seq_len // (2 * shape.kv_tokens) - 1))
    own = min(workers, tiles * -(-max_seq_len // shape.kv_tokens)) if shape.part_cost else 0
    return WorkBound(workers, max(tiles + cuts, own), max(cuts + min(cuts, tiles), own))


def _dealt(step: StepPlan, num_kv_heads: int, tiling: Tiling) -> WorkList | None:
    """Whole prefill tiles dealt out to the workers, or None where that would be uneven."""
    from quire.planning.deal import deal_tiles
    from quire.planning.split import Sequences
    from quire.planning.stream_k import tiles_of

    sequences = Sequences(step.seq_lens, step.cu_seqlens_q, num_kv_heads, step.causal, step.window_left)
    tiles = tiles_of(tiling, tiling.prefill, tiling.decode_max_q_len + 1, step.max_q_len)
    items, worker_indptr, evenly = deal_tiles(sequences, tiles, tiling.prefill_tile_cost)
    if not evenly:
        return None
    return WorkList(np.concatenate((worker_indptr, items.ravel())), 0, len(worker_indptr) - 1, len(items))


def compile_jobs() -> list[Job]:
    """Whatever ``plan_step`` runs of steps without a ``Tiling.prefill_tile_cost``."""
    from quire.planning.stream_k import cut_step

    return [Job.of(cut_step, *_TYPES)]


_NO_TILING = Tiling(0, TileShape(0, 0), TileShape(0, 0))
_TYPES = (*[0] * 10, _NO_TILING, 0, False, 0, 0, False)  # arguments of cut_step


@functools.cache
def _arithmetic() -> Callable[..., Any]:
    # Imported late: the operators must stay light, and Numba is not.
    from quire.kernels.compile import machine_code
    from quire.planning.stream_k import cut_step

    return machine_code(cut_step, *_TYPES)
