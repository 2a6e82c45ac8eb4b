"""Are the texts right? Judged as in generation_gate.py, on the device: regret against a more exact model's logits.

Logits are float32's where the models compute in 16 bits, and float64's where they compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks.generation_gate import ATOL
from benchmarks.serving.cases import Asked
from benchmarks.serving.shapes import Shape, make_model

Text = tuple[list[int], list[int]]  # a prompt and what was generated after it


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the judge."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def sample(asked: Sequence[Asked], most: int) -> list[int]:
    """Which requests' texts are judged: the shortest, the longest, and others evenly spread between them."""
    by_length = sorted(range(len(asked)), key=lambda i: asked[i].length)
    count = min(most, len(by_length))
    places = [round(k * (len(by_length) - 1) / max(count - 1, 1)) for k in range(count)]
    return [by_length[place] for place in (places if count > 1 else [len(by_length) - 1])]


@torch.inference_mode()
def judge(
    shape: Shape, positions: int, dtype: torch.dtype, device: str, texts: Sequence[Text], seed: int = 0
) -> list[tuple[float, float]]:
    """For each text how far below the largest exact logit its worst token lies, and how far it may.

    Cost: two forwards of each text; the model is made once, in the dtype of the contestants, and widened in place.
    """
    model = make_model(shape, positions, dtype, device, seed)
    plain = [_logits(model, device, text).float().cpu() for text in texts]
    model.to(exact_dtype(dtype))
    return [
        _regret(_logits(model, device, text), own, text[1]) for text, own in zip(texts, plain, strict=True)
    ]


def _logits(model: torch.nn.Module, device: str, text: Text) -> torch.Tensor:
    prompt, new = text
    read = torch.tensor([prompt + new[:-1]], device=device)
    return model(read, logits_to_keep=len(new), use_cache=False).logits[0]


def _regret(exact: torch.Tensor, plain: torch.Tensor, new: Sequence[int]) -> tuple[float, float]:
    exact = exact.cpu()
    chosen = exact.gather(1, torch.tensor(list(new))[:, None])[:, 0]
    regret = float((exact.max(1).values - chosen).max())
    allowed = 4 * float((plain - exact).abs().max()) + ATOL
    # NaN is never right.
    return (regret, allowed) if math.isfinite(regret) and math.isfinite(allowed) else (math.inf, 0.0)
