"""The models of the table: Llama-2's shapes with random weights, made on the device, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.requests import ModelShape

HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """A Llama without grouped heads: as many KV heads as query heads, of 128."""

    name: str
    layers: int
    heads: int
    intermediate: int
    vocab: int

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.heads * HEAD_DIM

    @property
    def parameters(self) -> int:
        """All weights: embedding, layers, norms and head."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return 2 * self.vocab * self.hidden + self.layers * layer + self.hidden

    @property
    def step_parameters(self) -> int:
        """Weights that a decode step reads: all but the embedding, of which it reads a row per token."""
        return self.parameters - self.vocab * self.hidden

    @property
    def slot_values(self) -> int:
        """Numbers of one token's keys and values, in all layers."""
        return 2 * self.layers * self.hidden

    def scaled(self, divisor: int) -> Shape:
        """The same with layers, width and vocabulary divided; never below two layers and one head."""
        if divisor == 1:
            return self
        return Shape(
            f"{self.name}/{divisor}",
            max(2, self.layers // divisor),
            max(1, self.heads // divisor),
            max(64, self.intermediate // divisor),
            max(256, self.vocab // divisor),
        )


LLAMA_2 = {
    "7B": Shape("7B", layers=32, heads=32, intermediate=11008, vocab=32000),
    "13B": Shape("13B", layers=40, heads=40, intermediate=13824, vocab=32000),
}


def make_model(shape: Shape, positions: int, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A transformers model in eval mode; the same weights for the same seed and device.

    Args:
        positions: longest sequence. Llama-2 was trained to 4,096; random weights know no better at any length.
    """
    from transformers import LlamaForCausalLM

    llama = ModelShape(
        shape.layers, shape.hidden, shape.heads, shape.heads, shape.intermediate, shape.vocab, positions
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM._from_config(llama.config(), dtype=dtype).eval().requires_grad_(False)
