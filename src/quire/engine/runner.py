"""Chunks of sequences to one packed forward."""

from __future__ import annotations

from array import array
from collections import abc
from typing import TYPE_CHECKING

import numpy as np
import torch

from quire.engine.scheduler import Chunk
from quire.hf.step import Step
from quire.pages import PageTable
from quire.spans import span

if TYPE_CHECKING:
    from quire.hf import PagedModel


_UNKNOWN = array("q", [0])  # a token that is chosen and has not reached the host


def run(
    model: PagedModel,
    chunks: abc.Sequence[Chunk],
    table: PageTable,
    input_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make the copies that the chunks ask for, then run the model on them.

    Args:
        input_ids: int64 [tokens] on the model's device, where the host does not know the tokens yet.
    Returns:
        Logits, fp32 [rows, vocab_size], as `build_step` orders them.
    """
    copies = [pair for chunk in chunks for pair in chunk.copies]
    if copies:
        model.copy_pages(copies)
    with span("pack"):
        step = build_step(chunks, table)
    with span("launch"):
        return model.forward(step) if input_ids is None else model.forward(step, input_ids)


def build_step(chunks: abc.Sequence[Chunk], table: PageTable) -> Step:
    """Pack the chunks of a step end to end.

    Logits are asked for where a chunk is the last of its sequence, at its last token; behind those at the
    `prompt_rows` of each chunk.

    Args:
        chunks: what the scheduler chose; their slots are already appended to the table.
        table: the pages of their sequences.
    Returns:
        A step with CPU tensors; logits row i belongs to the i-th chunk with `is_last`; after them come each chunk's
        prompt rows, in the order of the chunks.
    Cost: O(chunks) Python, O(tokens) NumPy.
    """
    num_chunks = len(chunks)
    sequences = [chunk.sequence for chunk in chunks]
    lengths = np.fromiter((chunk.num_tokens for chunk in chunks), np.int64, num_chunks)
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, num_chunks)
    is_last = np.fromiter((chunk.is_last for chunk in chunks), np.bool_, num_chunks)
    cu_seqlens_q = np.zeros(num_chunks + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu_seqlens_q[1:])
    token_bytes = bytearray().join(
        chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens] or _UNKNOWN for chunk in chunks
    )
    # Row r of chunk i stands at position starts[i] + (r - cu_seqlens_q[i]).
    positions = np.arange(cu_seqlens_q[-1]) + np.repeat(starts - cu_seqlens_q[:-1], lengths)
    wanted = [cu_seqlens_q[1:][is_last] - 1]
    for i, chunk in enumerate(chunks):
        if chunk.request.prompt_logprobs is not None:
            wanted.append(cu_seqlens_q[i] + np.array(chunk.prompt_rows, dtype=np.int64))
    return Step(
        input_ids=torch.from_numpy(np.frombuffer(token_bytes, dtype=np.int64)),
        position_ids=torch.from_numpy(positions),
        page_table=table.dense([sequence.seq_id for sequence in sequences]),
        seq_lens=torch.from_numpy((starts + lengths).astype(np.int32)),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q.astype(np.int32)),
        slot_mapping=torch.from_numpy(np.concatenate([chunk.slot_mapping for chunk in chunks], axis=-1)),
        logits_indices=torch.from_numpy(np.concatenate(wanted)),
    )
