"""Time what the host does around the kernels: planning a step, calling one layer's attention, storing its tokens.

Example:
    {prog} --out host.csv

A step is planned from one new token per sequence (32 query heads on 8 KV heads of 128, bfloat16, page 16), by
`quire.plan` and by a `quire.Planner`. What a layer's call costs beside its kernel is `plan.run` on a single key: the
kernel then reads 4 KB and takes about a microsecond, so that the whole call is the cost, that microsecond included.
All take turns, each called once untimed just before; medians are reported, with the 20th and 80th percentile.
Attention and the store are checked before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import quire
from benchmarks import environment, records
from benchmarks.cases import Case, make_inputs, parse_case
from benchmarks.gate import make_gate
from benchmarks.options import Parser
from benchmarks.peers import Bench, quire_planned
from benchmarks.progress import Progress, wide_console
from benchmarks.turns import Spread, Turn, stopwatch, time_in_turns

SPEC = quire.AttentionSpec(32, 8, 128, page_size=16, dtype=torch.bfloat16)
PLANNED = ["1x2k:1", "8x2k:1", "256x8k:1"]
ONE_KEY = "1x1:1"
STORED = 8  # tokens of a write_kv
# Microseconds that were set out for.
GOALS = {
    ("quire.plan", "1x2k:1"): 10,
    ("quire.plan", "256x8k:1"): 100,
    ("plan.run", ONE_KEY): 15,
}

Call = tuple[str, str]  # what is called, and on which step


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.host") -> int:
    """Parse, measure, print, write; the exit code is 1 where attention or the store was wrong."""
    args = parse_args(arguments, prog)
    typed = sys.argv[1:] if arguments is None else arguments
    facts = environment.facts(environment.command_line("benchmarks.host", typed))
    with Progress() as progress:
        progress.say(f"measuring, {args.rounds} rounds")
        rows = [facts | row for row in measure(args.rounds)]
    print_table(rows)
    if args.out:
        records.write(args.out, rows)
    return int(any(row["status"] != "ok" for row in rows))


def measure(rounds: int) -> list[records.Row]:
    """A row per call; one whose result is wrong is not timed."""
    turns = planning_turns() | {
        ("plan.run", ONE_KEY): run_turn(),
        ("write_kv", f"{STORED} tokens"): store_turn(),
    }
    spreads, _ = time_in_turns({call: turn for call, turn in turns.items() if turn}, rounds)
    return [_row(call, rounds, spreads.get(call)) for call in turns]


def planning_turns() -> dict[Call, Turn | None]:
    """`quire.plan` and `Planner.plan` of each step."""
    turns: dict[Call, Turn | None] = {}
    for name in PLANNED:
        case = parse_case(name, SPEC)
        lengths = step_of(case)
        planner = quire.Planner(
            SPEC, max_batch=len(case.seq_lens), max_seq_len=max(case.seq_lens), device="cpu"
        )
        plans: dict[str, Callable[[], Any]] = {
            "quire.plan": partial(quire.plan, *lengths[:2], SPEC, lengths[2]),
            "Planner.plan": partial(planner.plan, *lengths),
        }
        turns |= {(who, name): stopwatch(call) for who, call in plans.items()}
    return turns


def step_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page table, lengths and starts of a case's step, its pages in random order: all that planning looks at."""
    pages = [-(-n // case.spec.page_size) for n in case.seq_lens]
    table = torch.randperm(sum(pages), dtype=torch.int32).view(len(pages), -1)
    seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    return table, seq_lens, torch.tensor([0, *case.q_lens]).cumsum(0).to(torch.int32)


def run_turn() -> Turn | None:
    """One layer's call on a single key; None if its output is not what float64 says."""
    case = parse_case(ONE_KEY, SPEC)
    inputs = make_inputs(case)
    ready = quire_planned(case, inputs, Bench())
    return ready.turn if make_gate(case, inputs).judge(ready.output).good else None


def store_turn() -> Turn | None:
    """`write_kv` of a few tokens into slots all over a pool; None if they are not found there."""
    pool = quire.KVPool(SPEC, num_layers=1, num_pages=1024)
    pages = pool.layer(0)
    for tensor in pages:
        tensor.fill_(torch.nan)  # fresh memory may hold the very tokens, left there by a run before
    k, v = torch.randn(2, STORED, SPEC.num_kv_heads, SPEC.head_dim).to(SPEC.dtype)
    slots = torch.randperm(1024 * SPEC.page_size)[:STORED]
    call = partial(quire.write_kv, k, v, *pages, slots)
    call()
    found = (stored.flatten(1, 2)[:, slots].transpose(0, 1) for stored in pages)
    return stopwatch(call) if all(map(torch.equal, found, (k, v))) else None


def _row(call: Call, rounds: int, spread: Spread | None) -> records.Row:
    who, case = call
    row = {
        "case": case,
        "heads": f"{SPEC.num_qo_heads}/{SPEC.num_kv_heads}x{SPEC.head_dim}",
        "page_size": str(SPEC.page_size),
        "dtype": str(SPEC.dtype).removeprefix("torch."),
        "who": who,
        "status": "ok" if spread else "wrong",
        "goal_us": str(GOALS.get(call, "")),
        "rounds": str(rounds),
    }
    times = ("median", "p20", "p80")
    return row | {f"{name}_us": f"{getattr(spread, name) * 1e6:.2f}" if spread else "" for name in times}


def print_table(rows: Sequence[records.Row]) -> None:
    """The rows as people read them."""
    table = Table("call", "step", "median µs", "p20 – p80", "set out for", "status")
    for row in rows:
        between = f"{row['p20_us']} – {row['p80_us']}" if row["p20_us"] else ""
        goal = f"≤ {row['goal_us']}" if row["goal_us"] else ""
        table.add_row(row["who"], row["case"], row["median_us"], between, goal, row["status"])
    wide_console().print(table)


def parse_args(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog, __doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
