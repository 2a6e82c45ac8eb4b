"""Random paged batches with poison wherever nothing may be read, and the one rule by which results are judged.

Every slot that no sequence owns is NaN: pages nobody owns, tails of last pages, gaps between strided rows,
the scales beside them. Page table entries past a sequence's last page hold ids that exist nowhere.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import quire
from quire.kernels import reference
from quire.plan import plan_step
from quire.spec import QUANTIZED_DTYPES
from quire.work import AttentionCall, StepPlan, TileShape, Tiling

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


def plan_for(batch: Batch, workers: int | None = None, **rules: Any) -> quire.AttentionPlan:
    """A plan cut for so many threads; it may be run on any other number of them."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads if workers is None else workers)
        return quire.plan(*batch.lengths, batch.shape.spec(batch.page_size), **rules)
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


def step_of(batch: Batch, causal: bool = True, window_left: int = -1) -> StepPlan:
    whole = TileShape(1 << 30, 1 << 30)
    return plan_step(
        batch.page_table.numpy(), batch.seq_lens.numpy().astype(np.int64), batch.cu_seqlens_q.numpy().astype(np.int64),
        num_kv_heads=batch.shape.num_kv_heads, page_size=batch.page_size,
        causal=causal, window_left=window_left, tiling=Tiling(1, whole, whole),
    )  # fmt: skip


def exact(batch: Batch, *, causal: bool = True, window_left: int = -1, **scoring: Any) -> quire.SoftmaxState:
    """The float64 reference, not rounded to the batch's dtype."""
    out = torch.full(batch.q.shape, math.nan, dtype=torch.float64)
    lse = torch.full(batch.q.shape[:2], math.nan)
    call = AttentionCall(*batch.pages, out, lse, **scoring, **batch.scales)
    reference.attend(step_of(batch, causal, window_left), call)
    return quire.SoftmaxState(out, lse)


def plain(batch: Batch, *, causal: bool = True, window_left: int = -1, **scoring: Any) -> torch.Tensor:
    """The same attention as anyone writes it in PyTorch: gathered, padded to nothing, in the batch's dtype."""
    out = torch.zeros(batch.q.shape, dtype=batch.shape.dtype)
    starts = batch.cu_seqlens_q.tolist()
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        q_len = rows.stop - rows.start
        pages = batch.page_table[i, : math.ceil(seq_len / batch.page_size)].long()
        k, v = (
            _gather(batch, cache, batch.scales.get(scale), pages, seq_len)
            for cache, scale in ((batch.k_pages, "k_scale"), (batch.v_pages, "v_scale"))
        )
        scale = scoring.get("softmax_scale")
        scores = (
            batch.q[rows].transpose(0, 1) @ k.mT * (batch.shape.head_dim**-0.5 if scale is None else scale)
        )
        if scoring.get("softcap"):
            scores = scoring["softcap"] * torch.tanh(scores / scoring["softcap"])
        position = torch.arange(seq_len - q_len, seq_len)[:, None]
        key = torch.arange(seq_len)
        if scoring.get("alibi_slopes") is not None:
            scores = scores - scoring["alibi_slopes"][:, None, None] * (position - key).abs()
        visible = _visible(position, key, q_len, causal, window_left, scoring.get("tree_mask"), rows)
        scores = scores.masked_fill(~visible, -math.inf)
        if scoring.get("sinks") is not None:
            sinks = scoring["sinks"].to(scores.dtype)[:, None, None].expand(-1, q_len, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.softmax(scores.float(), -1).to(batch.shape.dtype)[..., :seq_len]
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        out[rows] = (weights @ v).transpose(0, 1)
    return out


def _gather(
    batch: Batch, cache: torch.Tensor, scale: torch.Tensor | None, pages: torch.Tensor, seq_len: int
) -> torch.Tensor:
    values = cache.float()[:, pages]
    if scale is not None:
        values = values * scale[:, pages, :, None]
    return values.flatten(1, 2)[:, :seq_len].to(batch.shape.dtype).repeat_interleave(batch.shape.group, 0)


def _visible(
    position: torch.Tensor,
    key: torch.Tensor,
    q_len: int,
    causal: bool,
    window_left: int,
    tree_mask: torch.Tensor | None,
    rows: slice,
) -> torch.Tensor:
    """[q_len, seq_len], key by key as the public docstrings say."""
    visible = (key <= position) | (not causal)
    if window_left >= 0:
        visible = visible & (key >= position - window_left)
    if tree_mask is not None:
        new = key - (len(key) - q_len)  # the key's place among the step's tokens; negative for earlier ones
        allowed = tree_mask[rows][:, new.clamp(min=0)]
        visible = visible & (allowed | (new < 0))
    return visible


# --- the rule --------------------------------------------------------------------------------------------


def assert_accurate(
    state: quire.SoftmaxState,
    wanted: quire.SoftmaxState,
    baseline: torch.Tensor,
    largest_value: float,
) -> None:
    """max error ≤ 2 × the error of plain PyTorch in the same dtype, plus four roundings of fp32, in which the
    kernels compute, at the size of the largest value; rows that see no key are exactly zero with lse −inf.

    The rule of FlashAttention's tests.
    """
    out, lse = state
    assert out.shape == wanted.out.shape
    assert out.isfinite().all(), "poison reached the output"
    if out.numel() == 0:
        return
    atol = 4 * torch.finfo(torch.float32).eps * largest_value
    allowed = 2 * (baseline.double() - wanted.out).abs().max().item() + atol
    error = (out.double() - wanted.out).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    empty = wanted.lse.isneginf()
    assert (lse.isneginf() == empty).all()
    assert (out[empty] == 0).all()
    # The kernels' softmax is fp32 whatever the dtype, so lse is judged by fp32's own precision.
    torch.testing.assert_close(lse[~empty], wanted.lse[~empty], atol=2e-5, rtol=2e-6)


def check(batch: Batch, *, workers: int | None = None, **rules: Any) -> quire.SoftmaxState:
    """Run the CPU kernels and judge them."""
    state = attend(batch, workers=workers, **rules)
    assert_accurate(state, exact(batch, **rules), plain(batch, **rules), batch.largest_value)
    return state


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
