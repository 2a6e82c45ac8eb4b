"""FlexAttention on pages: a block mask whose blocks are pages, compiled by torch.compile.

It reads the pool in place, as one long sequence of all pages; the mask says which of them each sequence sees. Queries
of equal sequences make a batch, so a mixed step takes one call per length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.cases import Case, Inputs
from benchmarks.peers import equal_sequences, queries


def compile_case(case: Case, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """The compiled call for a case; compiling takes from seconds to a minute."""
    torch.compiler.reset()  # each case is its own specialisation, as every kernel's here
    compiled = torch.compile(flex_attention, dynamic=False)
    k, v = (x.flatten(1, 2)[None] for x in (inputs.k_pages, inputs.v_pages))
    parts = [
        (queries(inputs, rows, q_len).contiguous(), page_mask(case, inputs, rows, seq_len, q_len))
        for rows, seq_len, q_len in equal_sequences(case)
    ]

    def attend() -> torch.Tensor:
        outs = [compiled(q, k, v, block_mask=mask, enable_gqa=True) for q, mask in parts]
        return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])

    return attend


def page_mask(case: Case, inputs: Inputs, rows: slice, seq_len: int, q_len: int) -> BlockMask:
    """Which slots of the pool the queries of equal sequences see: their own pages, up to their own position."""
    batch, page_size = rows.stop - rows.start, case.spec.page_size
    num_pages = inputs.k_pages.shape[1]
    pages = inputs.page_table[rows, : -(-seq_len // page_size)].long()
    paged = PagedAttention(num_pages, page_size, batch, device="cpu")
    paged.page_table[:, : pages.shape[1]] = pages
    logical = torch.arange(pages.shape[1]).expand_as(pages)
    paged.physical_to_logical.scatter_(1, pages, logical)

    def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= q + (seq_len - q_len)

    mask = create_block_mask(causal, batch, None, q_len, seq_len, device="cpu", BLOCK_SIZE=(128, page_size))
    lengths = torch.full((batch,), seq_len)
    return paged.convert_logical_block_mask(mask, kv_len=lengths)
