"""Whether a batch-invariant model has one answer on this machine: logprobs alone, and in random company.

    python scripts/one_answer.py --device cuda --dtype bfloat16 --rounds 5

Prompts that begin alike run alone and whole; then together, in steps of random sizes, on prefix hits, through a pool
that is too small for them. Prints the largest difference between logprobs; the exit code is 1 where it is not 0.
"""

from __future__ import annotations

import argparse
import random

import torch

import quire
from quire.engine.core import Engine


def main() -> int:
    """Compare, and print a line per round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder; the embedded model by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = {"model": args.model} if args.model else {}
    llm = quire.LLM(
        **folder, device=args.device, dtype=getattr(torch, args.dtype), num_pages=64, batch_invariant=True
    )
    prompts = draw_prompts(random.Random(0), llm.model.vocab_size)
    params = quire.SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0)
    alone = [
        Engine(llm.model, max_batch_tokens=1024, enable_prefix_caching=False).generate(
            prompt, params, progress=False
        )[0]
        for prompt in prompts
    ]
    worst = 0.0
    for number in range(args.rounds):
        engine = Engine(llm.model, max_batch_tokens=random.Random(number).choice([7, 33, 200]))
        together = engine.generate(prompts, params, progress=False)
        off = max(map(difference, alone, together))
        worst = max(worst, off)
        print(f"round {number}: {engine.stats.cached_tokens} cached tokens, max |Δlogprob| = {off}")
    return int(worst != 0)


def draw_prompts(draw: random.Random, vocab_size: int) -> list[list[int]]:
    """Of up to 300 tokens; some begin alike."""
    beginning = [draw.randrange(1, vocab_size) for _ in range(150)]
    return [
        beginning[: draw.choice([0, 40, 150])]
        + [draw.randrange(1, vocab_size) for _ in range(draw.randint(1, 150))]
        for _ in range(10)
    ]


def difference(one: quire.RequestOutput, other: quire.RequestOutput) -> float:
    """The largest between logprobs of the same tokens; infinite where tokens differ."""
    if one.token_ids != other.token_ids:
        return float("inf")
    pairs = zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True)
    return max(abs(a[token].logprob - b[token].logprob) for a, b in pairs for token in a)


if __name__ == "__main__":
    raise SystemExit(main())
