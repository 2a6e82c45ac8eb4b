"""What is measured, in a short grammar.

8x2048:1            8 sequences with 2048 keys each, 1 query token each (decode)
1x2k:2k             one prompt of 2048 tokens (prefill)
2x8k:512+32x1k:1    two chunks of 512 behind 7680 cached tokens, beside 32 decodes
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

import quire

_GROUP = re.compile(r"(\d+)x(\d+k?):(\d+k?)")


@dataclass(frozen=True)
class Case:
    """Lengths of one step, and the layer it is measured on."""

    name: str
    seq_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    spec: quire.AttentionSpec

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values the step must read at least once (all of each sequence's)."""
        per_token = 2 * self.spec.num_kv_heads * self.spec.head_dim * self.spec.storage_dtype.itemsize
        return per_token * sum(self.seq_lens)

    @property
    def flops(self) -> int:
        """Multiply-adds × 2 of causal attention, each visible (query, key) pair counted once."""
        pairs = sum(q * n - q * (q - 1) // 2 for q, n in zip(self.q_lens, self.seq_lens, strict=True))
        return 4 * self.spec.num_qo_heads * self.spec.head_dim * pairs


def parse_case(text: str, spec: quire.AttentionSpec) -> Case:
    """A case from its name; ValueError with the grammar if it does not parse."""
    seq_lens: list[int] = []
    q_lens: list[int] = []
    for group in text.split("+"):
        match = _GROUP.fullmatch(group)
        if match is None:
            raise ValueError(f"case must look like 8x2048:1 or 2x2k:2k+32x1k:1; got {text!r}")
        count, seq_len, q_len = (_number(part) for part in match.groups())
        if not 0 < q_len <= seq_len:
            raise ValueError(f"case needs 1 to {seq_len} queries for {seq_len} keys; got {group!r}")
        seq_lens += [seq_len] * count
        q_lens += [q_len] * count
    return Case(text, tuple(seq_lens), tuple(q_lens), spec)


def _number(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case; pages are scattered over the pool at random."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Fill a pool through the public API's own layout."""
    torch.manual_seed(seed)
    spec = case.spec
    pages = [-(-n // spec.page_size) for n in case.seq_lens]
    pool = quire.KVPool(spec, num_layers=1, num_pages=sum(pages))
    pool.k.normal_()
    pool.v.normal_()
    page_table = torch.full((len(pages), max(pages)), -1, dtype=torch.int32)
    shuffled = torch.randperm(sum(pages), dtype=torch.int32).split(pages)
    for row, own in enumerate(shuffled):
        page_table[row, : len(own)] = own
    k_pages, v_pages = pool.layer(0)
    return Inputs(
        q=torch.randn(sum(case.q_lens), spec.num_qo_heads, spec.head_dim).to(spec.dtype),
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *case.q_lens]).cumsum(0).to(torch.int32),
    )
