"""Who is measured: Quire, the same attention by plain PyTorch, and this machine's ceilings.

A peer is a function from a case's inputs to a call that computes the packed output. What a peer may do ahead of
time (plan, gather into contiguous tensors where that is its premise) happens outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

import quire
from benchmarks.cases import Case, Inputs

Call = Callable[[], torch.Tensor]


def quire_planned(case: Case, inputs: Inputs) -> Call:
    """plan.run on pages, planned ahead as for the second and later layers of a step."""
    plan = quire.plan(inputs.page_table, inputs.seq_lens, inputs.cu_seqlens_q, case.spec)
    out = torch.empty_like(inputs.q)
    return lambda: plan.run(inputs.q, inputs.k_pages, inputs.v_pages, out=out)


def sdpa_contiguous(case: Case, inputs: Inputs) -> Call:
    """scaled_dot_product_attention with GQA on keys and values that already lie contiguous."""
    contiguous = _gathered(case, inputs)
    return lambda: _attend(case, inputs, contiguous)


def gather_sdpa(case: Case, inputs: Inputs) -> Call:
    """The same from pages: gathered into contiguous tensors at every call."""
    return lambda: _attend(case, inputs, _gathered(case, inputs))


PEERS = {"quire": quire_planned, "sdpa, contiguous": sdpa_contiguous, "gather + sdpa": gather_sdpa}


def _gathered(case: Case, inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each group of equal sequences as [batch, num_kv_heads, seq_len, head_dim]."""
    groups = []
    for rows, seq_len, _ in _equal_sequences(case):
        pages = inputs.page_table[rows, : -(-seq_len // case.spec.page_size)].long()
        k, v = (
            x[:, pages].flatten(2, 3)[:, :, :seq_len].transpose(0, 1).contiguous()
            for x in (inputs.k_pages, inputs.v_pages)
        )
        groups.append((k, v))
    return groups


def _attend(case: Case, inputs: Inputs, groups: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    outputs = []
    for (rows, seq_len, q_len), (k, v) in zip(_equal_sequences(case), groups, strict=True):
        begin, end = int(inputs.cu_seqlens_q[rows.start]), int(inputs.cu_seqlens_q[rows.stop])
        q = inputs.q[begin:end].unflatten(0, (-1, q_len)).transpose(1, 2)
        mask = None
        if 1 < q_len < seq_len:
            mask = torch.ones(q_len, seq_len, dtype=torch.bool).tril(seq_len - q_len)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=1 < q_len == seq_len, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _equal_sequences(case: Case) -> list[tuple[slice, int, int]]:
    """Runs of neighbouring sequences with the same lengths: (rows, seq_len, q_len)."""
    runs: list[tuple[slice, int, int]] = []
    for row, lengths in enumerate(zip(case.seq_lens, case.q_lens, strict=True)):
        if runs and runs[-1][1:] == lengths:
            runs[-1] = (slice(runs[-1][0].start, row + 1), *lengths)
        else:
            runs.append((slice(row, row + 1), *lengths))
    return runs


def read_ceiling(nbytes: int) -> tuple[Call, int]:
    """A sum over float32 numbers of this many bytes (at least 1 MB): the rate memory can be read at."""
    numbers = torch.ones(max(nbytes, 1 << 20) // 4)
    return numbers.sum, numbers.numel() * 4


def gemm_ceiling(size: int = 2048) -> tuple[Call, int]:
    """A float32 matrix product: the rate the cores can multiply at."""
    a = torch.randn(size, size)
    return lambda: a @ a, 2 * size**3
