"""A case's tensors on the device, for as many layers as it takes that no cache holds them between two calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import quire
from benchmarks.cases import Case
from benchmarks.judge import Verdict, attention, judge, visible_keys

MOST_LAYERS = 32
CACHES_FULL = 12  # bytes of all layers over those of the last-level cache
SEQUENCES_JUDGED, ROWS_JUDGED = 3, 16


@dataclass(frozen=True)
class Layers:
    """One step's queries, and the pages of several layers that share its page table."""

    case: Case
    pool: quire.KVPool
    q: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a plan is made of, on the host."""
        return self.page_table, self.seq_lens, self.cu_seqlens_q

    def scales(self, layer: int) -> dict[str, torch.Tensor]:
        """Keyword arguments for quantised pages."""
        k_scale, v_scale = self.pool.k_scale, self.pool.v_scale
        if k_scale is None or v_scale is None:
            return {}
        return {"k_scale": k_scale[layer], "v_scale": v_scale[layer]}

    def keys_values(self, layer: int, row: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence's keys and values, gathered, [num_kv_heads, seq_len, head_dim]."""
        seq_len = int(self.seq_lens[row])
        pages = self.page_table[row, : math.ceil(seq_len / self.case.spec.page_size)].long()
        pages = pages.to(self.q.device)
        k_pages, v_pages = self.pool.layer(layer)
        scales = self.scales(layer)
        return (
            gather(k_pages, scales.get("k_scale"), pages, seq_len, dtype),
            gather(v_pages, scales.get("v_scale"), pages, seq_len, dtype),
        )

    def judge(self, layer: int, out: torch.Tensor) -> Verdict:
        """Judge a sample of the outputs: first, last and some rows between, of a few sequences."""
        worst = Verdict(0.0, 1.0)
        batch = len(self.seq_lens)
        for row in sorted({round(i) for i in torch.linspace(0, batch - 1, SEQUENCES_JUDGED).tolist()}):
            begin, end = self.cu_seqlens_q[row : row + 2].tolist()
            chosen = torch.linspace(0, end - begin - 1, ROWS_JUDGED).round().long().unique().to(out.device)
            position = chosen + int(self.seq_lens[row]) - (end - begin)
            visible = visible_keys(position, int(self.seq_lens[row]))
            results = []
            for dtype in (torch.float64, self.case.spec.dtype):
                k, v = self.keys_values(layer, row, dtype)
                results.append(attention(self.q[begin + chosen].to(dtype), k, v, position, visible))
                largest = v.abs().max().item()
            verdict = judge(out[begin + chosen], results[0], results[1], largest)
            if not verdict.good or verdict.error / verdict.allowed > worst.error / worst.allowed:
                worst = verdict
            if not worst.good:
                break
        return worst


def gather(
    cache: torch.Tensor, scale: torch.Tensor | None, pages: torch.Tensor, seq_len: int, dtype: torch.dtype
) -> torch.Tensor:
    """Pages end to end, dequantised: [num_kv_heads, seq_len, head_dim]."""
    bits = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache  # not every kernel knows float8
    values = bits[:, pages].view(cache.dtype)
    if scale is not None:
        values = values.to(torch.promote_types(dtype, torch.float32)) * scale[:, pages, :, None]
    return values.flatten(1, 2)[:, :seq_len].to(dtype)


def layers_beyond_cache(case: Case, cache_bytes: int, memory_bytes: int = 8 << 30) -> int:
    """Layers whose pages outgrow the cache by far, if memory allows; two at least."""
    wanted = math.ceil(CACHES_FULL * cache_bytes / max(1, case.kv_bytes))
    return max(2, min(wanted, MOST_LAYERS, memory_bytes // max(1, case.kv_bytes)))


def make_layers(case: Case, where: torch.device, seed: int, num_layers: int) -> Layers:
    """Random pages, queries and lengths; page ids are a random permutation over the pool."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    spec = case.spec
    counts = [math.ceil(n / spec.page_size) for n in case.seq_lens]
    pool = quire.KVPool(spec, num_layers, sum(counts), where)
    for pages in (pool.k, pool.v):
        for layer in pages:
            for head in layer:
                fill(head)
    for scales in (pool.k_scale, pool.v_scale):
        if scales is not None:
            scales.uniform_(0.5, 1.5).mul_(1 / 32)
    page_table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    shuffled = torch.randperm(sum(counts), generator=generator).to(torch.int32).split(counts)
    for row, own in enumerate(shuffled):
        page_table[row, : len(own)] = own
    return Layers(
        case=case,
        pool=pool,
        q=torch.randn(sum(case.q_lens), spec.num_qo_heads, spec.head_dim, device=where).to(spec.dtype),
        page_table=page_table,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *case.q_lens]).cumsum(0).to(torch.int32),
    )


def fill(pages: torch.Tensor) -> None:
    """Normal numbers; 32 times as large where a scale will be multiplied with them."""
    if pages.dtype.itemsize > 1:
        pages.normal_()
        return
    values = torch.randn(pages.shape, device=pages.device, dtype=torch.float32).mul_(32).clamp_(-127, 127)
    pages.copy_(values.round_().to(pages.dtype) if pages.dtype == torch.int8 else values.to(pages.dtype))
