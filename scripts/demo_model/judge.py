"""What a demo model is worth: held-out loss, greedy texts that loop, functions that parse, questions answered."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from demo_model.corpus import Documents, encode, read_held_out
from demo_model.model import CONTEXT
from demo_model.turns import Turn

GREEDY_TOKENS = 200
LOOP_TOKENS = 10
NUM_PROMPTS = 96
SAMPLES = (
    "def read_lines(path):\n",
    "def copy_file(src, dst):\n",
    "def fibonacci(n):\n",
    "def split_words(text):\n",
    "def to_bytes(value):\n",
    "class ParseError(Exception):\n",
    "class Stack:\n",
    "import os\n",
    "for i in range(10):\n",
    'if __name__ == "__main__":\n',
)


def judge(folder: Path, device: str, turns: list[Turn], *, quick: bool = False) -> dict[str, Any]:
    """All figures of the model in `folder`, as it is stored, computed in float32. Seconds on a GPU.

    quick: only a little of each, to see that it works.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = read_held_out()[: 1 if quick else None]
    texts = [text[:4000] for text in texts] if quick else texts
    documents = encode(tokenizer.backend_tokenizer, texts)
    loss = held_out_loss(model, documents)
    tokens, size = sum(len(d) - 1 for d in documents), sum(len(text.encode()) for text in texts)
    prompts = [prompt for text in texts for prompt in headers(text)][:NUM_PROMPTS] + list(SAMPLES)
    prompts, turns = (prompts[-2:], turns[:2]) if quick else (prompts, turns)
    written = complete(model, tokenizer.backend_tokenizer, prompts, GREEDY_TOKENS)
    continuations = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    figures: dict[str, Any] = {
        "held_out_files": len(texts),
        "held_out_bytes": size,
        "held_out_tokens": tokens,
        "nats_per_token": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * tokens / size / math.log(2),
        "prompts": len(prompts),
        "loop_rate": mean(ends_in_a_loop(ids) for ids in written),
        "ended": mean(len(ids) < GREEDY_TOKENS for ids in written),
        "parses": mean(parses(p + text) for p, text in zip(prompts, continuations, strict=True)),
        "samples": {p: text for p, text in zip(prompts, continuations, strict=True) if p in SAMPLES},
    }
    if tokenizer.chat_template and turns:
        figures |= judge_turns(model, tokenizer, turns)
    return figures


def judge_turns(model: LlamaForCausalLM, tokenizer: Any, turns: list[Turn]) -> dict[str, Any]:
    """How questions that were held out are answered; an answer is right where it is the expected one to the letter."""
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turn.question}], add_generation_prompt=True, tokenize=False
        )
        for turn in turns
    ]
    written = complete(model, tokenizer.backend_tokenizer, asked, GREEDY_TOKENS)
    answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return {
        "turns": len(turns),
        "turns_ended": mean(len(ids) < GREEDY_TOKENS for ids in written),
        "turns_parse": mean(parses(answer) for answer in answers),
        "turns_as_expected": mean(a.strip() == t.answer for a, t in zip(answers, turns, strict=True)),
        "answers": {turn.question: answer for turn, answer in zip(turns, answers, strict=True)},
    }


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: Documents) -> float:
    """Mean nats per token over whole documents, read in windows of CONTEXT that forget the one before."""
    total = count = 0
    for document in documents:
        for start in range(0, len(document) - 1, CONTEXT):
            window = torch.from_numpy(document[start : start + CONTEXT + 1]).long()[None].to(model.device)
            loss = model(input_ids=window, labels=window, use_cache=False).loss
            total += loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return total / count


@torch.no_grad()
def complete(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[str], new_tokens: int
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the end of text. Prompts are padded on the left."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    out = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=0,
    )
    return [without_end(row) for row in out[:, longest:].tolist()]


def without_end(ids: list[int]) -> list[int]:
    """The tokens before the first end of text."""
    return ids[: ids.index(0)] if 0 in ids else ids


def ends_in_a_loop(ids: list[int]) -> bool:
    """Whether a text of full length ends with LOOP_TOKENS tokens that it held before."""
    if len(ids) < GREEDY_TOKENS:
        return False
    end = ids[-LOOP_TOKENS:]
    return any(ids[i : i + LOOP_TOKENS] == end for i in range(len(ids) - LOOP_TOKENS))


def headers(text: str) -> list[str]:
    """The first lines of a file's functions, as prompts."""
    return [
        line
        for line in text.splitlines(keepends=True)
        if line.startswith("def ") and line.rstrip().endswith(":")
    ]


def first_block(text: str) -> str:
    """The text's first line at the left margin that opens a block, what is before it, and the block."""
    lines = text.splitlines(keepends=True)
    opened = next((i for i, line in enumerate(lines) if line.startswith(("def ", "class "))), 0)
    for i in range(opened + 1, len(lines)):
        if lines[i].strip() and not lines[i][0].isspace():
            return "".join(lines[:i])
    return text


def parses(text: str) -> bool:
    """Whether the first function of a text is Python, of one that ends by itself or in another block."""
    try:
        return bool(ast.parse(first_block(text)).body)
    except (SyntaxError, ValueError):
        return False


def mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def summary(name: str, figures: dict[str, Any]) -> str:
    """One line of the figures."""
    line = (
        f"{name}: held out {figures['nats_per_token']:.4f} nats/token, perplexity {figures['perplexity']:.2f}, "
        f"{figures['bits_per_byte']:.4f} bits/byte; of {figures['prompts']} greedy texts "
        f"{figures['loop_rate']:.1%} end in a loop, {figures['ended']:.1%} end by themselves, "
        f"the first function of {figures['parses']:.1%} parses"
    )
    if "turns" in figures:
        line += (
            f"; of {figures['turns']} answers {figures['turns_ended']:.1%} end, {figures['turns_parse']:.1%} parse, "
            f"{figures['turns_as_expected']:.1%} are as expected"
        )
    return line
