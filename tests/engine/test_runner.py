"""Chunks to one packed forward."""

from __future__ import annotations

import numpy as np

from quire.engine.params import SamplingParams
from quire.engine.request import Request
from quire.engine.runner import build_step
from quire.engine.scheduler import Chunk
from quire.engine.sequence import Sequence
from quire.pages import PageAllocator, PageTable


def test_chunks_are_packed_end_to_end_each_at_its_own_position_and_slots():
    table = PageTable(PageAllocator(8), page_size=4)
    decoding, in_prompt, whole = (
        Sequence(i, tokens, SamplingParams(), max_length=99, stop_token_ids=frozenset())
        for i, tokens in enumerate([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25], [30, 31]])
    )
    for sequence, num_computed in ((decoding, 4), (in_prompt, 2), (whole, 0)):
        table.add(sequence.seq_id)
        table.append(sequence.seq_id, num_computed)  # pages 0 and 1
        sequence.num_computed = num_computed
    chunks = [
        Chunk.of(Request([sequence]), sequence, num_tokens, *table.append(sequence.seq_id, num_tokens))
        for sequence, num_tokens in ((decoding, 1), (in_prompt, 3), (whole, 2))  # pages 2, 3 and 4
    ]
    assert [chunk.is_last for chunk in chunks] == [True, False, True]

    step = build_step(chunks, table)

    assert step.input_ids.tolist() == [14, 22, 23, 24, 30, 31]
    assert step.position_ids.tolist() == [4, 2, 3, 4, 0, 1]
    assert step.slot_mapping.tolist() == [8, 6, 7, 12, 16, 17]
    assert step.cu_seqlens_q.tolist() == [0, 1, 4, 6]
    assert step.seq_lens.tolist() == [5, 5, 2]
    assert step.page_table.tolist() == [[0, 2], [1, 3], [4, -1]]
    assert step.logits_indices.tolist() == [0, 5]


def test_logits_of_prompt_rows_that_are_not_known_yet_come_behind_those_to_choose_from():
    table = PageTable(PageAllocator(9), page_size=4)
    asks, silent = SamplingParams(prompt_logprobs=0), SamplingParams()
    requests = [
        Request([Sequence(i, range(n), params, max_length=99, stop_token_ids=frozenset())])
        for i, (n, params) in enumerate([(6, asks), (6, silent), (6, asks), (1, asks)])
    ]
    requests[2].prompt_logprobs += ["of token 1", "of token 2", "of token 3"]  # computed once, then preempted
    chunks = []
    for request, num_tokens in zip(requests, (4, 6, 6, 1), strict=True):
        [sequence] = request.sequences
        table.add(sequence.seq_id)
        chunks.append(Chunk.of(request, sequence, num_tokens, *table.append(sequence.seq_id, num_tokens)))
    # Tokens 0 to 3, 4 to 9, 10 to 15 and 16. Behind the last token of a prompt comes none of the prompt.
    assert [list(chunk.prompt_rows) for chunk in chunks] == [[0, 1, 2, 3], [], [3, 4], []]
    assert build_step(chunks, table).logits_indices.tolist() == [9, 15, 16, 0, 1, 2, 3, 13, 14]
    again = Sequence(
        9, range(6), asks, max_length=99, stop_token_ids=frozenset()
    )  # the prompt's second sequence
    requests[0].sequences.append(again)
    assert len(Chunk.of(requests[0], again, 6, np.arange(6), []).prompt_rows) == 0
    requests[0].sequences[0].num_computed = 4
    rest = Chunk.of(requests[0], requests[0].sequences[0], 2, *table.append(0, 2))
    requests[0].prompt_logprobs += [None] * 4
    assert list(rest.prompt_rows) == [0]
    assert build_step([rest], table).logits_indices.tolist() == [1, 0]
