"""What plain transformers makes of prompts, for engines to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

MARGIN = 1e-3  # between the two likeliest tokens, far above what another order of summation changes


def one_by_one(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
) -> list[list[int]]:
    """Each prompt's greedy tokens from model.generate, one prompt at a time, none of them a near tie."""
    texts = []
    for prompt in prompts:
        result = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        best, second = torch.cat(result.scores).topk(2, dim=-1).values.T
        assert (best - second).min() > MARGIN, "a near tie proves nothing: choose another seed"
        texts.append(result.sequences[0, len(prompt) :].tolist())
    return texts
