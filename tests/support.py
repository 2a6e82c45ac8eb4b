"""Random paged batches with poison wherever nothing may be read. Results are judged by ``accuracy``.

Every slot that no sequence owns is NaN: pages nobody owns, tails of last pages, gaps between strided rows,
the scales beside them. Page table entries past a sequence's last page hold ids that exist nowhere.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

import quire
from quire.kernels import reference
from quire.spec import QUANTIZED_DTYPES

NO_PAGES = (2**31 - 1, -7, -(2**31), 10**6)  # ids that a padding entry may hold
LAYOUTS = ("pool", "nhd", "hnd", "gaps", "apart")  # apart: K's and V's pages lie differently


@dataclass(frozen=True)
class Shape:
    """One attention layer; what the kernels are compiled for, but for page_size and num_kv_heads."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    group: int = 1
    kv_dtype: str | None = None
    num_kv_heads: int = 2

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{self.kv_dtype or 'same'}-d{self.head_dim}-g{self.group}"

    def spec(self, page_size: int) -> quire.AttentionSpec:
        heads = self.num_kv_heads * self.group
        return quire.AttentionSpec(
            heads, self.num_kv_heads, self.head_dim, page_size, self.dtype, self.kv_dtype
        )


@dataclass
class Batch:
    """Packed queries, poisoned pages and the tables that say which slots are whose."""

    shape: Shape
    page_size: int
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def largest_value(self) -> float:
        """The largest |v| that anyone owns."""
        values = self.v_pages.float()
        if self.scales:
            values = values * self.scales["v_scale"][..., None]
        return values.nan_to_num(0.0).abs().max().item()

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k_pages, self.v_pages

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.page_table, self.seq_lens, self.cu_seqlens_q


def make_batch(
    shape: Shape,
    seq_lens: Sequence[int],
    q_lens: Sequence[int] | None = None,
    *,
    page_size: int = 16,
    layout: str = "pool",
    share: float = 0.0,
    strided_q: bool = False,
    seed: int = 0,
) -> Batch:
    """A batch whose sequences lie on random pages; with probability ``share`` a page is one used before."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    q_lens = [1] * len(seq_lens) if q_lens is None else q_lens
    pages_of = [math.ceil(n / page_size) for n in seq_lens]
    num_pages = sum(pages_of) + 3
    table, owned_slots = _page_table(rng, seq_lens, pages_of, num_pages, page_size, share)

    sizes = (shape.num_kv_heads, num_pages, page_size, shape.head_dim)
    k_layout, v_layout = ("hnd", "gaps") if layout == "apart" else (layout, layout)
    k_pages, k_scale = _pages(shape, sizes, owned_slots, k_layout, generator)
    v_pages, v_scale = _pages(shape, sizes, owned_slots, v_layout, generator)
    tokens, heads = sum(q_lens), shape.num_kv_heads * shape.group
    if strided_q:  # as cut out of a fused projection: rows further apart, NaN between them
        fused = torch.full((tokens, heads + 2, shape.head_dim + 3), math.nan, dtype=shape.dtype)
        q = fused[:, 1:-1, 1 : shape.head_dim + 1]
    else:
        q = torch.empty(tokens, heads, shape.head_dim, dtype=shape.dtype)
    q.copy_(torch.randn(q.shape, generator=generator))
    return Batch(
        shape=shape,
        page_size=page_size,
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=torch.from_numpy(table),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int32),
        scales={} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale},
    )


def _page_table(
    rng: np.random.Generator,
    seq_lens: Sequence[int],
    pages_of: Sequence[int],
    num_pages: int,
    page_size: int,
    share: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The table, and for each page how many of its slots some sequence owns."""
    fresh = list(rng.permutation(num_pages))
    used: list[int] = []
    table = rng.choice(NO_PAGES, (len(seq_lens), max(pages_of, default=0) + 2)).astype(np.int32)
    owned = np.zeros(num_pages, np.int64)
    for i, count in enumerate(pages_of):
        for j in range(count):
            page = int(rng.choice(used)) if used and rng.random() < share else fresh.pop()
            used.append(page)
            table[i, j] = page
            owned[page] = max(owned[page], min(page_size, seq_lens[i] - j * page_size))
    return table, owned


def _pages(
    shape: Shape, sizes: tuple[int, int, int, int], owned: np.ndarray, layout: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    page_size = sizes[2]
    storage = shape.dtype if shape.kv_dtype is None else QUANTIZED_DTYPES[shape.kv_dtype]
    pages = empty_pages(sizes, storage, layout)
    values, scale = torch.randn(sizes, generator=generator), None
    if shape.kv_dtype is not None:
        values, scale = reference.quantize(values, storage)
    poison = torch.arange(page_size) >= torch.from_numpy(owned)[:, None]
    values = values.float()
    values[:, poison] = 127.0 if storage == torch.int8 else math.nan  # int8 has no NaN; its scale has
    pages.copy_(values.to(storage))
    if scale is not None:
        scale[:, poison] = math.nan
        if layout == "nhd":
            scale = scale.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return pages, scale


def empty_pages(sizes: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """One layer's pages [num_kv_heads, num_pages, page_size, head_dim] as a view of some memory order."""
    heads, num_pages, page_size, head_dim = sizes
    if layout == "nhd":
        return torch.empty(num_pages, page_size, heads, head_dim, dtype=dtype).permute(2, 0, 1, 3)
    if layout == "hnd":
        return torch.empty(num_pages, heads, page_size, head_dim, dtype=dtype).transpose(0, 1)
    if layout == "gaps":
        wide = torch.empty(heads, num_pages + 1, page_size + 2, head_dim + 5, dtype=dtype)
        wide.copy_(torch.full(wide.shape, 127.0 if dtype == torch.int8 else math.nan).to(dtype))
        return wide[:, :num_pages, 1:-1, 3 : head_dim + 3]
    return torch.empty(sizes, dtype=dtype)


# --- running ---------------------------------------------------------------------------------------------


@contextmanager
def sharing_all_work() -> Iterator[None]:
    """Plans that are made here are cut for all threads, however little there is to do."""
    from quire.kernels import cpu

    planned = cpu.tiling

    def tiling(spec: quire.AttentionSpec, device: torch.device, batch: int) -> Any:
        shapes = planned(spec, device, batch)
        decode, prefill = (shape._replace(least_shared=0) for shape in (shapes.decode, shapes.prefill))
        return shapes._replace(decode=decode, prefill=prefill)

    with mock.patch.object(cpu, "tiling", tiling):
        yield


def plan_for(batch: Batch, workers: int | None = None, **rules: Any) -> quire.AttentionPlan:
    """A plan cut for so many threads, however little its work is; it may be run on any other number of them."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads if workers is None else workers)
        with sharing_all_work() if workers else nullcontext():
            return quire.plan(
                *batch.lengths[:2], batch.shape.spec(batch.page_size), batch.cu_seqlens_q, **rules
            )
    finally:
        torch.set_num_threads(threads)


def attend(
    batch: Batch,
    *,
    workers: int | None = None,
    backend: str = "cpu",
    causal: bool = True,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    **scoring: Any,
) -> quire.SoftmaxState:
    """The batch's attention with its lse."""
    plan = plan_for(batch, workers, causal=causal, window_left=window_left, backend=backend)
    return plan.run(*batch.pages, out=out, return_state=True, **batch.scales, **scoring)


def features(
    batch: Batch,
    *,
    window: bool = False,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    tree: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Random values for the scoring arguments asked for."""
    generator = torch.Generator().manual_seed(seed)
    heads = batch.q.shape[1]
    q_lens = batch.cu_seqlens_q.diff()
    given: dict[str, Any] = {}
    if window:
        given["window_left"] = int(torch.randint(0, 1 + int(batch.seq_lens.max()), (), generator=generator))
    if softcap:
        given["softcap"] = 1.5
    if alibi:
        given["alibi_slopes"] = torch.rand(heads, generator=generator)
    if sinks:
        given["sinks"] = torch.randn(heads, generator=generator)
    if tree:
        size = (len(batch.q), int(q_lens.max()) + 1)
        given["tree_mask"] = torch.rand(size, generator=generator) < 0.6
    return given


def give_back_unseen(batch: Batch, window_left: int) -> int:
    """Let poisoned pages stand for those that no query sees, as a `PageTable` does that gave them back; how many."""
    used = [row[: -(-n // batch.page_size)] for row, n in zip(batch.page_table, batch.seq_lens, strict=True)]
    poisoned = min(set(range(batch.k_pages.shape[1])) - set(torch.cat(used).tolist()))
    given_back = 0
    for row, seq_len, q_len in zip(
        used, batch.seq_lens.tolist(), batch.cu_seqlens_q.diff().tolist(), strict=True
    ):
        unseen = max(seq_len - q_len - window_left, 0) // batch.page_size
        row[:unseen] = poisoned
        given_back += unseen
    return given_back


# --- memory with an end ----------------------------------------------------------------------------------


def guarded_copy(values: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last that may be touched: behind it lies a page no one may read or write."""
    size = values.numel() * values.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    protected = ctypes.CDLL(None, use_errno=True).mprotect(
        ctypes.c_void_p(start + room), mmap.PAGESIZE, no_access
    )
    assert protected == 0, os.strerror(ctypes.get_errno())
    tensor = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=room - size)
    return tensor.view(values.dtype).view(values.shape).copy_(values)


def assert_no_byte_beyond_is_touched(batch: Batch) -> None:
    """The kernels read what the page table names: a step past a row's end, a last page or a last scale ends us."""
    wanted = attend(batch).out
    last_column = (int(batch.seq_lens[0]) - 1) // batch.page_size
    page, last_page = int(batch.page_table[0, last_column]), batch.k_pages.shape[1] - 1
    for pages in (batch.k_pages, batch.v_pages, *batch.scales.values()):  # bits keep NaN as it is
        bits = pages.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[pages.element_size()])
        bits[:, [page, last_page]] = bits[:, [last_page, page]]
    table = batch.page_table.clone()
    batch.page_table[table == last_page] = page
    batch.page_table[table == page] = last_page
    batch.q, batch.k_pages, batch.v_pages = (guarded_copy(t) for t in batch.pages)
    batch.scales = {name: guarded_copy(scale) for name, scale in batch.scales.items()}
    batch.page_table = guarded_copy(batch.page_table[:, : last_column + 1])
    out = guarded_copy(torch.zeros_like(batch.q))
    assert torch.equal(attend(batch, out=out).out, wanted)
