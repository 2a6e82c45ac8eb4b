"""Chunks of requests to one packed forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quire.engine.scheduler import Chunk
from quire.hf.step import Step
from quire.pages import PageTable


def build_step(chunks: Sequence[Chunk], table: PageTable) -> Step:
    """Pack the chunks of a step end to end.

    Logits are asked for only where a chunk is the last of its request: at its last token.

    Args:
        chunks: what the scheduler chose; their slots are already appended to the table.
        table: the pages of their requests.
    Returns:
        A step with CPU tensors; logits row i belongs to the i-th chunk with `is_last`.
    Cost: O(chunks) Python, O(tokens) NumPy.
    """
    num_chunks = len(chunks)
    lengths = np.fromiter((chunk.num_tokens for chunk in chunks), np.int64, num_chunks)
    starts = np.fromiter((chunk.request.num_computed for chunk in chunks), np.int64, num_chunks)
    is_last = np.fromiter((chunk.is_last for chunk in chunks), np.bool_, num_chunks)
    cu_seqlens_q = np.zeros(num_chunks + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu_seqlens_q[1:])
    token_bytes = bytearray().join(
        chunk.request.tokens[chunk.request.num_computed : chunk.request.num_computed + chunk.num_tokens]
        for chunk in chunks
    )
    # Row r of chunk i stands at position starts[i] + (r - cu_seqlens_q[i]).
    positions = np.arange(cu_seqlens_q[-1]) + np.repeat(starts - cu_seqlens_q[:-1], lengths)
    seq_ids = [chunk.request.request_id for chunk in chunks]
    return Step(
        input_ids=torch.from_numpy(np.frombuffer(token_bytes, dtype=np.int64)),
        position_ids=torch.from_numpy(positions),
        page_table=table.dense(seq_ids),
        seq_lens=torch.from_numpy((starts + lengths).astype(np.int32)),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q.astype(np.int32)),
        slot_mapping=torch.from_numpy(np.concatenate([chunk.slot_mapping for chunk in chunks])),
        logits_indices=torch.from_numpy(cu_seqlens_q[1:][is_last] - 1),
    )
