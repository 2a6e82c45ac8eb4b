"""Chunked attention is ordinary causal attention of virtual sequences."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.hf.chunks import split_at_chunks


@st.composite
def steps(draw):
    """(page_size, chunk_size, [(seq_len, q_len), ...])"""
    page_size = draw(st.integers(1, 5))
    chunk_size = page_size * draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    return page_size, chunk_size, [(n, draw(st.integers(0, n))) for n in lengths]


def page_table_of(sequences, page_size):
    """Distinct pages for every sequence, padded with −1 to one page more than the longest needs."""
    width = 1 + max(-(-seq_len // page_size) for seq_len, _ in sequences)
    table = torch.full((len(sequences), width), -1, dtype=torch.int32)
    for i, (seq_len, _) in enumerate(sequences):
        used = -(-seq_len // page_size)
        table[i, :used] = 100 * i + torch.arange(used, dtype=torch.int32)
    return table


def keys_seen(page_table, seq_lens, cu_seqlens_q, page_size):
    """For each packed query in order, the (page, offset) of every key that causal attention shows it."""
    seen = []
    q_lens = cu_seqlens_q.diff().tolist()
    for row, seq_len, q_len in zip(page_table.tolist(), seq_lens.tolist(), q_lens, strict=True):
        for position in range(seq_len - q_len, seq_len):
            seen.append([(row[t // page_size], t % page_size) for t in range(position + 1)])
    return seen


@given(steps())
def test_each_query_sees_its_own_chunk_up_to_itself_and_nothing_else(step):
    page_size, chunk_size, sequences = step
    table = page_table_of(sequences, page_size)
    seq_lens = torch.tensor([n for n, _ in sequences], dtype=torch.int32)
    cu_seqlens_q = torch.tensor([0, *(q for _, q in sequences)]).cumsum(0).to(torch.int32)

    virtual = split_at_chunks(table, seq_lens, cu_seqlens_q, chunk_size=chunk_size, page_size=page_size)

    expected = [
        [(table[i, t // page_size].item(), t % page_size) for t in range(p // chunk_size * chunk_size, p + 1)]
        for i, (seq_len, q_len) in enumerate(sequences)
        for p in range(seq_len - q_len, seq_len)
    ]
    assert keys_seen(*virtual, page_size) == expected


def test_the_split_has_the_dtypes_and_widths_a_plan_wants():
    table = torch.tensor([[7, 3, 5]], dtype=torch.int32)
    virtual = split_at_chunks(
        table,
        torch.tensor([11], dtype=torch.int32),
        torch.tensor([0, 6], dtype=torch.int32),
        chunk_size=8,
        page_size=4,
    )
    page_table, seq_lens, cu_seqlens_q = virtual
    assert [x.dtype for x in virtual] == [torch.int32] * 3
    # Queries 5..7 end the first chunk, on pages 7 and 3; queries 8..10 begin the second, on page 5.
    assert page_table[0].tolist() == [7, 3]
    assert page_table[1, 0] == 5
    assert seq_lens.tolist() == [8, 3]
    assert cu_seqlens_q.tolist() == [0, 3, 6]


def test_sequences_without_new_tokens_leave_no_segment():
    virtual = split_at_chunks(
        torch.zeros(2, 3, dtype=torch.int32),
        torch.tensor([0, 9], dtype=torch.int32),
        torch.tensor([0, 0, 0], dtype=torch.int32),
        chunk_size=4,
        page_size=4,
    )
    assert [len(x) for x in virtual] == [0, 0, 1]
