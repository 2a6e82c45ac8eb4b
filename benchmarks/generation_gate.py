"""Are the generated tokens right? Judged token by token by the same model in float64.

A greedy engine picks the largest logit it computed. If its logits are off by at most e, the logit that
float64 gives its choice lies at most 2 e below float64's largest. Plain PyTorch's own e, in the case's dtype
on the same texts, is the measure; an engine may be off by twice that, as kernels may.
"""

from __future__ import annotations

from pathlib import Path

import torch

ATOL = 1e-6


class TextGate:
    """Judges texts of one model; each text is computed once, whoever generated it.

    Args:
        folder: of the model.
        dtype: in which the engines compute.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._exact, self._plain = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
            for kind in (torch.float64, getattr(torch, dtype))
        )
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}

    @torch.inference_mode()
    def judge(
        self, prompts: list[list[int]], results: list[list[list[int]]], new_tokens: int
    ) -> tuple[float, float]:
        """How far below the largest float64 logit the worst choice lies, and how far it may.

        Args:
            results: every different result of an engine, each with a text per prompt.
        Returns:
            (regret, allowed); regret is infinite where a text is missing or not as long as asked.
        """
        regret = allowed = 0.0
        for texts in results:
            if [len(text) for text in texts] != [new_tokens] * len(prompts):
                return float("inf"), allowed
            for prompt, text in zip(prompts, texts, strict=True):
                own_regret, own_allowed = self._judge_text(prompt, text)
                regret, allowed = max(regret, own_regret), max(allowed, own_allowed)
        return regret, allowed

    def _judge_text(self, prompt: list[int], text: list[int]) -> tuple[float, float]:
        key = (*prompt, -1, *text)
        if key not in self._known:
            self._known[key] = self._compute(prompt, text)
        return self._known[key]

    def _compute(self, prompt: list[int], text: list[int]) -> tuple[float, float]:
        read = torch.tensor([prompt + text[:-1]])
        exact, plain = (
            model(read, logits_to_keep=len(text)).logits[0].double() for model in (self._exact, self._plain)
        )
        chosen = exact.gather(1, torch.tensor(text)[:, None])[:, 0]
        error = (plain - exact).abs().max().item()
        return (exact.max(1).values - chosen).max().item(), 4 * error + ATOL
