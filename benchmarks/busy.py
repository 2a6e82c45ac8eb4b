"""Time little work on one thread and on all, at rest and beside a busy process, and the first use of a new machine.

Example:
    {prog} --out busy.csv

Little work is one query on 40 keys (32 query heads on 8 KV heads of 128, bfloat16), and a decode step of the demo model
with eight prompts. The busy process keeps one core at work: on all threads, a decode step beside it is to take at most
1/0.9 of its time on one. The median, the mean and the 99th percentile are reported.

The threads of a process are set by OMP_NUM_THREADS, and processes take turns. After `torch.set_num_threads` MKL would
compute even the cosines of a step on all threads, which is another thing to measure.

First use (`--first-use`, minutes) is `quire generate` until its first token: with no machine code on disk, then again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import quire
from benchmarks import environment, records
from benchmarks.cases import make_inputs, parse_case
from benchmarks.gate import make_gate
from benchmarks.options import Parser
from benchmarks.peers import Bench, quire_planned
from benchmarks.progress import Progress, wide_console
from quire.cli.prompts import PROMPTS

SPEC = quire.AttentionSpec(32, 8, 128, page_size=16, dtype=torch.bfloat16)
LITTLE = "1x40:1"
NEIGHBOURS = {"at rest": 0, "one busy process": 1}
STATISTICS = ("median_us", "mean_us", "p99_us")
GENERATE = (
    "import sys; from quire.cli import main; sys.argv[1:] = ['generate', 'x', '--max-tokens', '1']; main()"
)

Call = tuple[str, str]  # what is called, and on which step


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.busy") -> int:
    """Parse, measure, print, write; the exit code is 1 where attention was wrong."""
    args = parse_args(arguments, prog)
    typed = sys.argv[1:] if arguments is None else arguments
    facts = environment.facts(environment.command_line("benchmarks.busy", typed))
    rows = []
    with Progress() as progress:
        if args.first_use:
            progress.say("first use: compiling everything")
            rows += first_use()
        for beside, number in NEIGHBOURS.items():
            progress.say(f"{beside}, {args.turns} turns")
            with busy_processes(number):
                rows += little_work(args.rounds, args.turns, beside)
    rows = [facts | row for row in rows]
    print_table(rows)
    if args.out:
        records.write(args.out, rows)
    return int(any(row["status"] != "ok" for row in rows))


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that compute for ever."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def little_work(rounds: int, turns: int, beside: str) -> list[records.Row]:
    """A row for each call on one thread, and on all."""
    seconds: dict[tuple[Call, int], list[float]] = defaultdict(list)
    for _ in range(turns):
        for threads in sorted({1, torch.get_num_threads()}):
            for call, times in in_a_process(threads, rounds):
                seconds[call, threads] += times
    return [_row(call, threads, beside, times) for (call, threads), times in seconds.items()]


def in_a_process(threads: int, rounds: int) -> list[tuple[Call, list[float]]]:
    """What ``calls`` takes in a process with so many threads."""
    program = f"from benchmarks import busy; busy.report({rounds})"
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environ,
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [(tuple(call), times) for call, times in json.loads(done.stdout.splitlines()[-1])]


def report(rounds: int) -> None:
    """Print as JSON the seconds of every call; none where its result is wrong."""
    calls: dict[Call, tuple[Callable[[], Any] | None, int]] = {
        ("plan.run", LITTLE): (attention_call(), rounds),
        ("decode step", f"{len(PROMPTS)} prompts"): (decode_steps(), rounds // 10),
    }
    print(json.dumps([(call, [] if run is None else clocked(run, n)) for call, (run, n) in calls.items()]))


def clocked(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of so many calls."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def attention_call() -> Callable[[], Any] | None:
    """One layer's attention, planned for the threads of now; None if its output is wrong."""
    case = parse_case(LITTLE, SPEC)
    inputs = make_inputs(case)
    ready = quire_planned(case, inputs, Bench())
    return ready.turn if make_gate(case, inputs).judge(ready.output).good else None


def decode_steps() -> Callable[[], Any]:
    """Steps of an engine that has read its prompts."""
    llm = quire.LLM(num_pages=1024)
    longest = max(len(tokens) for tokens in llm.tokenizer(list(PROMPTS))["input_ids"])
    params = quire.SamplingParams(max_tokens=llm.model.max_seq_len - longest, ignore_eos=True)
    for prompt in PROMPTS:
        llm.add_request(prompt, params)
    llm.step()
    return llm.step


def first_use() -> list[records.Row]:
    """`quire generate` until its first token, without machine code on disk and with it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "NUMBA_CACHE_DIR": folder}
        for case in ("first", "second"):
            begin = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", GENERATE], env=environ, stdout=subprocess.DEVNULL, check=True
            )
            seconds = time.perf_counter() - begin
            rows.append(_row(("quire generate", case), torch.get_num_threads(), "at rest", [seconds]))
    return rows


def _row(call: Call, threads: int, beside: str, seconds: list[float]) -> records.Row:
    who, case = call
    row = {"case": case, "who": who, "threads": str(threads), "beside": beside}
    figures = (np.median(seconds), np.mean(seconds), np.percentile(seconds, 99)) if seconds else ()
    times = {name: f"{figure * 1e6:.2f}" for name, figure in zip(STATISTICS, figures, strict=False)}
    return (
        row
        | {"status": "ok" if seconds else "wrong", "rounds": str(len(seconds))}
        | dict.fromkeys(STATISTICS, "")
        | times
    )


def print_table(rows: Sequence[records.Row]) -> None:
    """The rows as people read them."""
    table = Table("call", "case", "threads", "beside", "median µs", "mean µs", "p99 µs", "status")
    for row in rows:
        table.add_row(*(row[name] for name in ("who", "case", "threads", "beside", *STATISTICS, "status")))
    wide_console().print(table)


def parse_args(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog, __doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="calls in a turn; of decode steps a tenth")
    parser.add_argument("--turns", type=int, default=3, help="of each number of threads")
    parser.add_argument("--first-use", action="store_true", help="also the first `quire generate`")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
