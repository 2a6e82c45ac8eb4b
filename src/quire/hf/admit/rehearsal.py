"""A rehearsal: two short texts through the pages, and through the model as it is without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from quire.hf.attention import RunningStep
from quire.hf.cache import LayerShape, PagedCache
from quire.hf.forward import PackedForward
from quire.hf.planners import Planners
from quire.hf.step import Step
from quire.pages import PageAllocator, PageTable

# New tokens of each text per step, as they come in practice: two prefills, a decode beside a chunk, two
# decodes.
_STEPS = ((9, 4), (1, 5), (1, 1))
TEXT_LENGTHS = [sum(tokens) for tokens in zip(*_STEPS, strict=True)]


def rehearse(
    forward: PackedForward,
    shapes: Mapping[int, LayerShape],
    texts: Sequence[torch.Tensor],
    *,
    page_size: int,
    backend: str,
) -> tuple[torch.Tensor, float]:
    """Serve the texts in mixed steps on pages full of NaN, and compare each row with the ordinary model's.

    Args:
        texts: int64 [tokens] each, of TEXT_LENGTHS.
    Returns:
        max |Δlogit| of every token [tokens], infinite where rows are missing; and the largest |logit|.
    Cost: a forward per step and per text, on a pool of a few pages that is dropped again.
    """
    ordinary = [forward.ordinary(text) for text in texts]
    num_pages = sum(-(-len(text) // page_size) for text in texts)
    cache = PagedCache(
        shapes, page_size=page_size, num_pages=num_pages, kv_dtype=None, device=forward.model.device
    )
    cache.poison(range(num_pages))
    planners = Planners(backend, forward.model.device)
    differences = []
    for step, expected in _steps(texts, ordinary, PageTable(PageAllocator(num_pages), page_size)):
        logits = forward.paged(RunningStep(step, cache, planners))
        same_rows = logits.shape == expected.shape
        differences.append((logits - expected).abs().amax(-1) if same_rows else torch.tensor([torch.inf]))
    return torch.cat([d.cpu() for d in differences]), max(float(logits.abs().max()) for logits in ordinary)


def _steps(
    texts: Sequence[torch.Tensor], ordinary: Sequence[torch.Tensor], table: PageTable
) -> Iterator[tuple[Step, torch.Tensor]]:
    """Each step, and the logits that its rows should have."""
    sequences = range(len(texts))
    for i in sequences:
        table.add(i)
    for counts in _STEPS:
        starts = [table.length(i) for i in sequences]
        slots = [torch.from_numpy(table.append(i, counts[i]).slot_mapping) for i in sequences]
        new = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        # Not in order: a model must return the rows asked for, not the last so many.
        rows = torch.arange(sum(counts)).flip(0)
        step = Step(
            input_ids=torch.cat([texts[i][new[i]] for i in sequences]),
            position_ids=torch.cat([torch.arange(len(texts[i]))[new[i]] for i in sequences]),
            page_table=table.dense(list(sequences)),
            seq_lens=table.seq_lens(list(sequences)),
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            slot_mapping=torch.cat(slots),
            logits_indices=rows,
        )
        yield step, torch.cat([ordinary[i][new[i]] for i in sequences])[rows]
