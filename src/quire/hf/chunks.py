"""Chunked attention (Llama-4) without a kernel for it: on pages, it is free.

With chunks of C tokens, the query at position p sees the keys of its own chunk up to itself:

    (p // C)·C ≤ t ≤ p

Cut each sequence's new tokens where a chunk begins. A segment of chunk c then sees what a sequence would see
that begins at token c·C, and on pages such a sequence exists already: when C is a multiple of page_size, its
page table is the same row read from page c·C / page_size on, and its length is counted from there. Nothing is
copied and the packed queries keep their order, so the plan of these *virtual sequences* is all it takes.
"""

from __future__ import annotations

import torch


def split_at_chunks(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    chunk_size: int,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page table, seq_lens and cu_seqlens_q of the virtual sequences of one step.

    Args:
        page_table, seq_lens, cu_seqlens_q: the step, int32 on the CPU.
        chunk_size: C, a multiple of page_size.
        page_size: tokens per page.
    Returns:
        int32 [segments, pages per chunk], int32 [segments] and int32 [segments + 1]; sequences without new
        tokens have no segment, and those of length 0, which pad a step, have one of length 0. Page table entries past
        a segment's last page are some page of its sequence.
    Cost: a few dozen torch calls on the CPU over (segments × pages per chunk) elements.
    """
    q_lens = cu_seqlens_q.diff()
    first_chunk = (seq_lens - q_lens).clamp(min=0) // chunk_size
    last_chunk = (seq_lens - 1).clamp(min=0) // chunk_size
    segments = torch.where(q_lens > 0, last_chunk - first_chunk + 1, 0)

    owner = torch.repeat_interleave(torch.arange(len(seq_lens), device="cpu"), segments)
    first_segment = segments.cumsum(0) - segments
    chunk = first_chunk[owner] + torch.arange(len(owner), device="cpu") - first_segment[owner]
    begin = chunk * chunk_size
    # Below 0 where a padded row has a query and no key.
    first_query = torch.where(
        seq_lens[owner] > 0, torch.maximum(begin, (seq_lens - q_lens)[owner]), -q_lens[owner]
    )
    end = torch.minimum(begin + chunk_size, seq_lens[owner])

    pages_per_chunk = chunk_size // page_size
    column = begin[:, None] // page_size + torch.arange(pages_per_chunk, device="cpu")
    column = column.clamp(max=page_table.shape[1] - 1)
    starts = torch.nn.functional.pad((end - first_query).cumsum(0), (1, 0))
    return page_table[owner[:, None], column], (end - begin).to(torch.int32), starts.to(torch.int32)
