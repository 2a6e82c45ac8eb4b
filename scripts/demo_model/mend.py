"""The last lessons: greedy texts of the model itself, in which it learns not to repeat what it has just written.

A small model's greedy text falls into loops, since a repeated line makes its next repetition likelier. Here the
model writes, and every token that completes a run of tokens which the text held before is made less likely, beside
ordinary training on the corpus. Source: unlikelihood training on sequences, arXiv:1908.04319, section 5.2.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from transformers import LlamaForCausalLM

from demo_model.learn import Loss, MasterWeights
from demo_model.model import build_model

PROMPT_TOKENS = 48
NEW_TOKENS = 200
RUN = 10  # tokens; shorter runs are how Python is written
RATE = 0.1  # of the peak rates, down to zero
UPDATES = 2  # from each batch of texts


def mend(
    master: MasterWeights,
    feed: Iterator[torch.Tensor],
    loss_fn: Loss,
    *,
    rounds: int,
    texts: int,
    rows: int,
    deadline: float,
) -> int:
    """Do up to `rounds` rounds; returns how many there was time for.

    Args:
        feed: windows of the corpus, int64 [batch, context + 1].
        texts: how many the model writes in a round.
        rows: windows that one pass takes, as `loss_fn` was compiled for.
    """
    writer = build_model("sdpa").to(next(master.model.parameters()).device, torch.bfloat16).eval()
    for done in range(rounds):
        started = time.monotonic()
        if started > deadline:
            print(f"mending: out of time after {done} of {rounds} rounds", flush=True)
            return done
        windows = next(feed)
        written = write(writer, master, windows[torch.arange(texts) % len(windows), :PROMPT_TOKENS])
        repeated = repeats(written, PROMPT_TOKENS, RUN)
        for update in range(UPDATES):
            for part in windows.split(rows):
                (loss_fn(master.model, part) * len(part) / len(windows)).backward()
                master.add_gradients()
            if repeated.any():
                unlikelihood(master.model, written, repeated).backward()
                master.add_gradients()
            master.step(RATE * (1 - (done + update / UPDATES) / rounds))
            if update < UPDATES - 1:
                windows = next(feed)
        if done % 10 == 0 or done == rounds - 1:
            share = repeated.sum().item() / (written.shape[0] * NEW_TOKENS)
            looping = repeated[:, -1].float().mean().item()
            took = time.monotonic() - started
            print(
                f"mending {done + 1}/{rounds}: {share:.1%} of tokens repeat, "
                f"{looping:.1%} of texts end so, {took:.1f} s",
                flush=True,
            )
    return rounds


@torch.no_grad()
def write(writer: LlamaForCausalLM, master: MasterWeights, prompts: torch.Tensor) -> torch.Tensor:
    """Greedy texts, int64 [texts, PROMPT_TOKENS + NEW_TOKENS], zero after their end."""
    for mine, p in zip(writer.parameters(), master.weights, strict=True):
        mine.copy_(p)
    out = writer.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=0,
    )
    missing = PROMPT_TOKENS + NEW_TOKENS - out.shape[1]
    return torch.nn.functional.pad(out, (0, missing))


def repeats(texts: torch.Tensor, prompt_tokens: int, run: int) -> torch.Tensor:
    """Where a token after the prompt ends a run of tokens that the text held before; bool, like texts.

    Tokens after a text's end count as no repetition.
    """
    found = torch.zeros(texts.shape, dtype=torch.bool)
    for row, ids in enumerate(texts.tolist()):
        end = next((i for i in range(prompt_tokens, len(ids)) if ids[i] == 0), len(ids))
        seen: set[tuple[int, ...]] = set()
        for last in range(run - 1, end):
            tokens = tuple(ids[last - run + 1 : last + 1])
            if last >= prompt_tokens and tokens in seen:
                found[row, last] = True
            seen.add(tokens)
    return found.to(texts.device)


def unlikelihood(model: LlamaForCausalLM, texts: torch.Tensor, repeated: torch.Tensor) -> torch.Tensor:
    """Mean of -log(1 - p) over the repeated tokens of texts [texts, tokens]; p is what the model gave them."""
    logits = model(input_ids=texts[:, :-1], use_cache=False).logits.float()
    logp = logits.log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]
    likely = logp.exp().clamp(max=1 - 1e-4)
    chosen = repeated[:, 1:]
    return -(torch.log1p(-likely) * chosen).sum() / chosen.sum()
