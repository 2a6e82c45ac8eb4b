"""Time what prefix caching is for: conversations that grow, questions behind the same examples, one long prompt again.

Example:
    {prog} --out prefix.csv

A random Llama (8 layers, 8/4 heads of 32, float32) reads random tokens, greedily; three traces:

    turns      8 conversations of 5 turns, each prompt all that was said before plus 64 new tokens; 32 tokens a turn
    examples   32 prompts of 1,024 tokens in common and 32 of their own, after one such prompt; 16 tokens each
    again      a prompt of 8,192 tokens for the second time, one token

An engine that keeps prefixes and one that does not take turns on a model of their own each. Nothing is timed before
both give the same tokens and the hit rate is the one that full pages allow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import environment, records
from benchmarks.options import Parser
from benchmarks.progress import Progress, wide_console
from benchmarks.turns import Spread
from quire import LLM, RequestOutput, SamplingParams

VOCAB, LAYERS, PAGE = 4096, 8, 16
CONVERSATIONS, TURNS, SAID, ANSWERED = 8, 5, 64, 32
COMMON, OWN, QUESTIONS, REPLIED = 1024, 32, 32, 16
LONG = 8192

Tokens = list[int]
Trace = Callable[[LLM], list[RequestOutput]]


@dataclass(frozen=True)
class Case:
    """A trace, and what of it full pages can hold.

    Attributes:
        trace: serves the prompts; returns the outputs that count, in order.
        theoretical: share of all prompt tokens of these outputs that an earlier request has left in full pages.
    """

    trace: Trace
    theoretical: float


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.prefix") -> int:
    """Parse, measure, print, write; the exit code is 1 where tokens differed or a hit was missed."""
    args = parse_args(arguments, prog)
    typed = sys.argv[1:] if arguments is None else arguments
    facts = environment.facts(environment.command_line("benchmarks.prefix", typed))
    with Progress() as progress:
        progress.say("loading two engines")
        both, rows = engines(), []
        for name, case in cases().items():
            progress.say(f"{name}: {args.rounds} rounds")
            rows += [facts | row for row in measure(name, case, both, args.rounds)]
    print_table(rows)
    if args.out:
        records.write(args.out, rows)
    return int(any(row["status"] != "ok" for row in rows))


def engines() -> dict[str, LLM]:
    """One that keeps prefixes, and one that does not, each on a model and a pool of its own."""
    return {
        who: LLM(model(), page_size=PAGE, num_pages=2048, enable_prefix_caching=who == "with")
        for who in ("with", "without")
    }


def model() -> LlamaForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2 * LONG, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def cases() -> dict[str, Case]:
    """The three traces by name."""
    generator = torch.Generator().manual_seed(1)

    def tokens(*shape: int) -> list[list[int]]:
        drawn: list[list[int]] = torch.randint(VOCAB, shape, generator=generator).tolist()
        return drawn

    said = [tokens(CONVERSATIONS, SAID) for _ in range(TURNS)]
    [common], own, [long] = tokens(1, COMMON), tokens(QUESTIONS + 1, OWN), tokens(1, LONG)
    # Of a turn's prompt all but its new tokens is known; the last token of an answer was never computed.
    known = [turn * (SAID + ANSWERED) for turn in range(TURNS)]
    found = sum((before - 1) // PAGE * PAGE for before in known if before)
    return {
        "turns": Case(lambda llm: converse(llm, said), found / (sum(known) + TURNS * SAID)),
        "examples": Case(
            lambda llm: answer(llm, [common + each for each in own]), COMMON // PAGE * PAGE / (COMMON + OWN)
        ),
        "again": Case(lambda llm: repeat(llm, long), min(LONG // PAGE * PAGE, LONG - 1) / LONG),
    }


def converse(llm: LLM, said: list[list[Tokens]]) -> list[RequestOutput]:
    """All conversations side by side, turn by turn."""
    params = SamplingParams(max_tokens=ANSWERED, ignore_eos=True)
    histories: list[Tokens] = [[] for _ in range(CONVERSATIONS)]
    outputs: list[RequestOutput] = []
    for turn in said:
        histories = [history + new for history, new in zip(histories, turn, strict=True)]
        answers = llm.generate(histories, params, progress=False)
        histories = [h + answer.token_ids for h, answer in zip(histories, answers, strict=True)]
        outputs += answers
    return outputs


def answer(llm: LLM, prompts: list[Tokens]) -> list[RequestOutput]:
    """The first prompt alone, then all others at once."""
    params = SamplingParams(max_tokens=REPLIED, ignore_eos=True)
    llm.generate(prompts[0], params, progress=False)
    return llm.generate(prompts[1:], params, progress=False)


def repeat(llm: LLM, prompt: Tokens) -> list[RequestOutput]:
    """A prompt twice; the second time counts."""
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    llm.generate(prompt, params, progress=False)
    return llm.generate(prompt, params, progress=False)


def measure(name: str, case: Case, engines: dict[str, LLM], rounds: int) -> list[records.Row]:
    """A row per engine; times are of rounds in which both took part."""
    outputs = {who: run(case, llm)[0] for who, llm in engines.items()}
    texts = {who: [output.token_ids for output in found] for who, found in outputs.items()}
    rates = {who: hit_rate(found) for who, found in outputs.items()}
    good = texts["with"] == texts["without"] and abs(rates["with"] - case.theoretical) < 1e-9
    seconds: dict[str, list[float]] = {who: [] for who in engines}
    first: dict[str, list[float]] = {who: [] for who in engines}
    for _ in range(rounds if good else 0):
        for who, llm in engines.items():
            found, elapsed = run(case, llm)
            seconds[who].append(elapsed)
            first[who].append(median(output.time_to_first_token or 0.0 for output in found))
    return [
        {
            "case": name,
            "who": f"{who} prefix caching",
            "status": "ok" if good else "wrong",
            "hit_rate": f"{rates[who]:.4f}",
            "theoretical_hit_rate": f"{case.theoretical:.4f}" if who == "with" else "0.0000",
            "rounds": str(rounds),
            "prompt_tokens": str(sum(len(output.prompt_token_ids) for output in outputs[who])),
            "generated_tokens": str(sum(len(output.token_ids) for output in outputs[who])),
            **times("trace", seconds[who]),
            **times("first_token", first[who]),
        }
        for who in engines
    ]


def run(case: Case, llm: LLM) -> tuple[list[RequestOutput], float]:
    """Serve a trace from an empty cache, and how long it took."""
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = case.trace(llm)
    return outputs, time.perf_counter() - begin


def hit_rate(outputs: Sequence[RequestOutput]) -> float:
    """The share of prompt tokens that was found in pages."""
    return sum(o.num_cached_tokens for o in outputs) / sum(len(o.prompt_token_ids) for o in outputs)


def times(name: str, seconds: list[float]) -> records.Row:
    """Milliseconds: the median, and between which the middle 60 % lie."""
    spread = Spread.of(seconds) if seconds else None
    return {
        f"{name}_{of}_ms": f"{getattr(spread, of) * 1e3:.2f}" if spread else ""
        for of in ("median", "p20", "p80")
    }


def print_table(rows: Sequence[records.Row]) -> None:
    """The rows as people read them."""
    table = Table(
        "trace",
        "engine",
        "hit rate",
        "full pages allow",
        "first token, median ms",
        "whole trace, ms",
        "status",
    )
    for row in rows:
        table.add_row(
            row["case"], row["who"], row["hit_rate"], row["theoretical_hit_rate"], row["first_token_median_ms"],
            row["trace_median_ms"], row["status"],
        )  # fmt: skip
    wide_console().print(table)


def parse_args(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog, __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
