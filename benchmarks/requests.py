"""What is generated end to end: requests in a short grammar, and a random model of known shape.

8x16-256:64         8 prompts of 16 to 256 tokens, evenly spread, 64 new tokens each
4x128:32+1x1k:32    4 prompts of 128 tokens beside one of 1024
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import number

_GROUP = re.compile(r"(\d+)x(\d+k?)(?:-(\d+k?))?:(\d+k?)")
_FORM = "requests must look like 8x16-256:64 or 4x128:32+1x1k:32, all with the same number of new tokens"


@dataclass(frozen=True)
class Requests:
    """Prompt lengths, and how many tokens each prompt is continued by."""

    name: str
    prompt_lens: tuple[int, ...]
    new_tokens: int

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Random token ids, the same for the same seed; long and short prompts in no order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.prompt_lens), generator=generator).tolist()
        return [
            torch.randint(3, vocab_size, (self.prompt_lens[i],), generator=generator).tolist() for i in order
        ]


@dataclass(frozen=True)
class ModelShape:
    """A Llama with random weights; by default one of 110 million, as the CPU targets name it."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 4
    intermediate: int = 2048
    vocab: int = 32000
    positions: int = 2048

    def config(self) -> Any:
        """transformers' config of it, without an end-of-text token."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )

    def __str__(self) -> str:
        """Such as `llama-12x768-12/4-2048-32000`."""
        return (
            f"llama-{self.layers}x{self.hidden}-{self.heads}/{self.kv_heads}-{self.intermediate}-{self.vocab}"
        )


def parse_requests(text: str) -> Requests:
    """Requests from their name; ValueError with the grammar if it does not parse."""
    lens: list[int] = []
    budgets = set()
    for group in text.split("+"):
        match = _GROUP.fullmatch(group)
        if match is None:
            raise ValueError(f"{_FORM}; got {text!r}")
        count, shortest, longest, new = (number(part) for part in match.groups(default="0"))
        longest = longest or shortest
        if not (count and 0 < shortest <= longest and new):
            raise ValueError(f"{_FORM}; got {group!r}")
        lens += [shortest + (longest - shortest) * i // max(count - 1, 1) for i in range(count)]
        budgets.add(new)
    if len(budgets) > 1:
        raise ValueError(f"{_FORM}; got {text!r}")
    return Requests(text, tuple(lens), budgets.pop())


def model_folder(shape: ModelShape, parent: Path, seed: int = 0) -> Path:
    """The random model as a Hugging Face folder, written where it is not there yet.

    Weights are float32; it has a tokenizer of one word per token, since some engines insist on one, and no
    end-of-text token, so that every engine generates as many tokens as asked.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    folder = parent / str(shape).replace("/", "-") / f"seed{seed}"
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(seed)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(shape.vocab)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0").save_pretrained(folder)
    LlamaForCausalLM(shape.config()).save_pretrained(folder)
    return folder
