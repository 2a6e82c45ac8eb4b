"""What is measured of attention, in a short grammar.

8x2048:1            8 sequences with 2048 keys each, 1 query token each (decode)
1x2k:2k             one prompt of 2048 tokens (prefill)
2x8k:512+32x1k:1    two chunks of 512 behind 7680 cached tokens, beside 32 decodes
8x2k:1@float32      another dtype than the run's
8x8k:1@int8         quantised pages: int8, fp8_e4m3 or fp8_e5m2
8x2k:1@32/1x128     other heads: query heads / KV heads x head_dim
8x2k:1@page64       another page size; several @ may follow one another
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch

import quire
from quire.spec import COMPUTE_DTYPES, QUANTIZED_DTYPES

_GROUP = re.compile(r"(\d+)x(\d+k?):(\d+k?)")
_HEADS = re.compile(r"(\d+)/(\d+)x(\d+)")
_PAGE = re.compile(r"page(\d+)")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}


@dataclass(frozen=True)
class Case:
    """Lengths of one step, and the layer it is measured on."""

    name: str
    seq_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    spec: quire.AttentionSpec

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values the step must read at least once (all of each sequence's, with scales)."""
        return self.spec.num_kv_heads * self.spec.bytes_per_token * sum(self.seq_lens)

    @property
    def working_set(self) -> int:
        """Bytes the step touches: keys and values, queries, outputs."""
        rows = sum(self.q_lens) * self.spec.num_qo_heads * self.spec.head_dim * self.spec.dtype.itemsize
        return self.kv_bytes + 2 * rows

    @property
    def flops(self) -> int:
        """Multiply-adds × 2 of causal attention, each visible (query, key) pair counted once."""
        pairs = sum(q * n - q * (q - 1) // 2 for q, n in zip(self.q_lens, self.seq_lens, strict=True))
        return 4 * self.spec.num_qo_heads * self.spec.head_dim * pairs

    @property
    def decodes(self) -> bool:
        """Every sequence has one query: bound by reading, where steps with prompts are bound by multiplying."""
        return set(self.q_lens) == {1}


def parse_case(text: str, spec: quire.AttentionSpec) -> Case:
    """A case from its name; ValueError with the grammar if it does not parse."""
    seq_lens: list[int] = []
    q_lens: list[int] = []
    lengths, *changes = text.split("@")
    for group in lengths.split("+"):
        match = _GROUP.fullmatch(group)
        if match is None:
            raise ValueError(f"case must look like 8x2048:1 or 2x2k:2k+32x1k:1; got {text!r}")
        count, seq_len, q_len = (number(part) for part in match.groups())
        if not 0 < q_len <= seq_len or not count:
            raise ValueError(f"case needs 1 to {seq_len} queries for {seq_len} keys; got {group!r}")
        seq_lens += [seq_len] * count
        q_lens += [q_len] * count
    for change in changes:
        spec = _changed(spec, change)
    return Case(text, tuple(seq_lens), tuple(q_lens), spec)


def parse_heads(text: str) -> tuple[int, int, int]:
    """`32/8x128` as query heads, KV heads and head_dim; ValueError if it does not parse."""
    match = _HEADS.fullmatch(text)
    if match is None:
        raise ValueError(f"heads must look like 32/8x128; got {text!r}")
    num_qo_heads, num_kv_heads, head_dim = map(int, match.groups())
    return num_qo_heads, num_kv_heads, head_dim


def number(text: str) -> int:
    """`512`, or `2k` for 2048."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def _changed(spec: quire.AttentionSpec, change: str) -> quire.AttentionSpec:
    """The spec with what stands behind an @."""
    if change in _DTYPES:
        return replace(spec, dtype=_DTYPES[change])
    if change in QUANTIZED_DTYPES:
        return replace(spec, kv_dtype=change)
    if page := _PAGE.fullmatch(change):
        return replace(spec, page_size=int(page[1]))
    if _HEADS.fullmatch(change):
        num_qo_heads, num_kv_heads, head_dim = parse_heads(change)
        return replace(spec, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    dtypes = ", ".join([*_DTYPES, *QUANTIZED_DTYPES])
    raise ValueError(f"case may end in @ and one of {dtypes}, page64 or 32/8x128; got @{change}")


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case; pages are scattered over the pool at random."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def tokens(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sequence's keys and values, gathered and dequantised: [num_kv_heads, seq_len, head_dim]."""
        seq_len, page_size = int(self.seq_lens[row]), self.k_pages.shape[2]
        pages = self.page_table[row, : -(-seq_len // page_size)].long()
        k, v = (x[:, pages].flatten(1, 2)[:, :seq_len] for x in (self.k_pages, self.v_pages))
        if not self.scales:
            return k, v
        k_scale, v_scale = (
            self.scales[name][:, pages].flatten(1, 2)[:, :seq_len, None] for name in ("k_scale", "v_scale")
        )
        return k.float() * k_scale, v.float() * v_scale


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Fill a pool through the public API's own layout, and through its own store where pages are quantised."""
    torch.manual_seed(seed)
    spec = case.spec
    pages = [-(-n // spec.page_size) for n in case.seq_lens]
    pool = quire.KVPool(spec, num_layers=1, num_pages=sum(pages))
    page_table = torch.full((len(pages), max(pages)), -1, dtype=torch.int32)
    shuffled = torch.randperm(sum(pages), dtype=torch.int32).split(pages)
    for row, own in enumerate(shuffled):
        page_table[row, : len(own)] = own
    k_pages, v_pages = pool.layer(0)
    scales = {}
    if pool.k_scale is not None and pool.v_scale is not None:
        scales = {"k_scale": pool.k_scale[0], "v_scale": pool.v_scale[0]}
        slots = torch.arange(sum(pages) * spec.page_size)
        k, v = (torch.randn(len(slots), spec.num_kv_heads, spec.head_dim).to(spec.dtype) for _ in range(2))
        quire.write_kv(k, v, k_pages, v_pages, slots, **scales)
    else:
        pool.k.normal_()
        pool.v.normal_()
    return Inputs(
        q=torch.randn(sum(case.q_lens), spec.num_qo_heads, spec.head_dim).to(spec.dtype),
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *case.q_lens]).cumsum(0).to(torch.int32),
        scales=scales,
    )
