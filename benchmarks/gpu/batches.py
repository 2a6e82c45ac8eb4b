"""Random small steps with poison wherever nothing may be read, and the float64 reference of them.

Every slot that no sequence owns is NaN: pages nobody owns, tails of last pages, the scales beside them (int8 pages
hold 127 there). Page table entries past a sequence's last page hold ids that exist nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import quire
from benchmarks.gpu.layers import gather
from benchmarks.judge import attention, visible_keys
from quire.kernels import reference
from quire.kernels.call import AttentionCall, Scoring
from quire.planning.step import plan_step
from quire.planning.work_list import TileShape, Tiling

NO_PAGES = (2**31 - 1, -7, -(2**31), 10**6)
LAYOUTS = ("pool", "nhd", "hnd")
FEATURES = ("window", "softcap", "alibi", "sinks", "tree")


@dataclass
class Batch:
    """One step on the device; lengths and page table on the host."""

    spec: quire.AttentionSpec
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)  # causal, window_left: the plan's
    scoring: dict[str, Any] = field(default_factory=dict)  # softcap, alibi_slopes, …: the call's

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k_pages, self.v_pages

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.page_table, self.seq_lens, self.cu_seqlens_q


def make_batch(
    spec: quire.AttentionSpec,
    lengths: Sequence[tuple[int, int]],
    where: torch.device,
    seed: int,
    *,
    layout: str = "pool",
    causal: bool = True,
    features: Sequence[str] = (),
) -> Batch:
    """A batch of (seq_len, q_len) pairs on random pages; made on the host, then moved."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    counts = [math.ceil(seq_len / spec.page_size) for seq_len, _ in lengths]
    num_pages = sum(counts) + 3
    table, slots = _page_table(rng, [seq_len for seq_len, _ in lengths], counts, num_pages, spec.page_size)
    sizes = (spec.num_kv_heads, num_pages, spec.page_size, spec.head_dim)
    stores = [_poisoned(sizes, spec.storage_dtype, layout) for _ in range(2)]
    scales = [torch.full(sizes[:3], math.nan) if spec.quantized else None for _ in range(2)]
    k, v = (
        torch.randn(len(slots), spec.num_kv_heads, spec.head_dim, generator=generator).to(spec.dtype)
        for _ in range(2)
    )
    reference.write_kv(k, v, *(in_layout(store, layout) for store in stores), slots, *scales)
    q_lens = [q_len for _, q_len in lengths]
    q = torch.randn(sum(q_lens), spec.num_qo_heads, spec.head_dim, generator=generator).to(spec.dtype)
    k_pages, v_pages = (in_layout(store.to(where), layout) for store in stores)
    batch = Batch(
        spec=spec,
        q=q.to(where),
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=torch.from_numpy(table),
        seq_lens=torch.tensor([seq_len for seq_len, _ in lengths], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int32),
        rules={"causal": causal},
    )
    if scales[0] is not None and scales[1] is not None:
        batch.scales = {"k_scale": scales[0].to(where), "v_scale": scales[1].to(where)}
    _add_features(batch, features, generator)
    return batch


def _page_table(
    rng: np.random.Generator, seq_lens: list[int], counts: list[int], num_pages: int, page_size: int
) -> tuple[np.ndarray, torch.Tensor]:
    """The table, and the slot of every token of every sequence."""
    table = rng.choice(NO_PAGES, (len(counts), max(counts) + 2)).astype(np.int32)
    own = np.split(rng.permutation(num_pages)[: sum(counts)], np.cumsum(counts)[:-1])
    slots = []
    for row, (pages, seq_len) in enumerate(zip(own, seq_lens, strict=True)):
        table[row, : len(pages)] = pages
        token = np.arange(seq_len)
        slots.append(pages[token // page_size] * page_size + token % page_size if seq_len else token)
    return table, torch.from_numpy(np.concatenate(slots).astype(np.int64))


def _poisoned(sizes: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    heads, num_pages, page_size, head_dim = sizes
    order = {
        "pool": sizes,
        "nhd": (num_pages, page_size, heads, head_dim),
        "hnd": (num_pages, heads, page_size, head_dim),
    }
    return torch.full(order[layout], 127.0 if dtype == torch.int8 else math.nan).to(dtype)


def in_layout(store: torch.Tensor, layout: str) -> torch.Tensor:
    """Memory of a layout as [num_kv_heads, num_pages, page_size, head_dim]."""
    if layout == "nhd":
        return store.permute(2, 0, 1, 3)
    return store.transpose(0, 1) if layout == "hnd" else store


def _add_features(batch: Batch, features: Sequence[str], generator: torch.Generator) -> None:
    where, heads = batch.q.device, batch.q.shape[1]
    if "window" in features:
        longest = int(batch.seq_lens.max())
        batch.rules["window_left"] = int(torch.randint(0, 1 + longest, (), generator=generator))
    if "softcap" in features:
        batch.scoring["softcap"] = 1.5
    if "alibi" in features:
        batch.scoring["alibi_slopes"] = torch.rand(heads, generator=generator).to(where)
    if "sinks" in features:
        batch.scoring["sinks"] = torch.randn(heads, generator=generator).to(where)
    if "tree" in features:
        size = (len(batch.q), int(batch.cu_seqlens_q.diff().max()))
        batch.scoring["tree_mask"] = (torch.rand(size, generator=generator) < 0.6).to(where)


def exact(batch: Batch) -> quire.SoftmaxState:
    """The float64 reference, not rounded to the batch's dtype, on dequantised pages."""
    spec, rules = batch.spec, batch.rules
    whole = TileShape(1 << 30, 1 << 30)
    step = plan_step(
        batch.page_table, batch.seq_lens, batch.cu_seqlens_q, num_kv_heads=spec.num_kv_heads, page_size=spec.page_size,
        causal=rules["causal"], window_left=rules.get("window_left", -1), tiling=Tiling(1, whole, whole),
    )  # fmt: skip
    k, v = (
        pages.double() if scale is None else pages.float().double() * scale[..., None].double()
        for pages, scale in zip(
            batch.pages, (batch.scales.get("k_scale"), batch.scales.get("v_scale")), strict=True
        )
    )
    out = torch.zeros(batch.q.shape, dtype=torch.float64, device=batch.q.device)
    lse = torch.full(batch.q.shape[:2], -math.inf, device=batch.q.device)
    reference.attend(step, AttentionCall(batch.q, k, v, out, lse, Scoring(**batch.scoring)))
    return quire.SoftmaxState(out, lse)


def plain(batch: Batch) -> torch.Tensor:
    """The same attention as anyone writes it in PyTorch, in the batch's dtype."""
    out = torch.zeros_like(batch.q)
    starts = batch.cu_seqlens_q.tolist()
    scoring = {name: value for name, value in batch.scoring.items() if name != "tree_mask"}
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        q_len = rows.stop - rows.start
        if not q_len or not seq_len:
            continue
        pages = batch.page_table[i, : math.ceil(seq_len / batch.spec.page_size)].long().to(out.device)
        k, v = (
            gather(cache, batch.scales.get(scale), pages, seq_len, batch.spec.dtype)
            for cache, scale in ((batch.k_pages, "k_scale"), (batch.v_pages, "v_scale"))
        )
        position = torch.arange(seq_len - q_len, seq_len, device=out.device)
        visible = visible_keys(position, seq_len, **batch.rules)
        if "tree_mask" in batch.scoring:
            place = torch.arange(seq_len, device=out.device) - (seq_len - q_len)  # among this step's tokens
            allowed = batch.scoring["tree_mask"][rows][:, place.clamp(min=0)]
            visible = visible & (allowed | (place < 0))
        out[rows] = attention(batch.q[rows], k, v, position, visible, **scoring)
    return out


def largest_value(batch: Batch) -> float:
    """The largest |v| that anyone owns."""
    values = batch.v_pages.float()
    if batch.scales:
        values = values * batch.scales["v_scale"][..., None]
    return values.nan_to_num(0.0).abs().max().item()
