"""Time attention on pages beside its peers and this machine's ceilings; one CSV row per case and peer.

Examples:
    python -m benchmarks.attention                                     # the README's table, a minute or two
    python -m benchmarks.attention --cases 8x2048:1 1x8k:1 --dtype float32
    python -m benchmarks.attention --cases 2x8k:512+32x1k:1 --heads 32/8x128 --page-size 16

Nothing is timed before it agrees with the float64 reference. Peers take turns, repeat by repeat, so that a noisy
moment hits all of them; medians are reported, with the 20th and 80th percentile beside them.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import quire
from benchmarks.cases import Case, Inputs, make_inputs, parse_case
from benchmarks.peers import PEERS, gemm_ceiling, read_ceiling

DEFAULT_CASES = ["8x2k:1", "1x8k:1", "32x512:1", "1x2k:2k", "2x4k:512+16x1k:1"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of outputs of order one


def main() -> None:
    """Parse, run, print, write."""
    args = parse_args()
    rows: list[dict[str, Any]] = []
    for text in track(args.cases, description="measuring", console=Console(stderr=True)):
        rows += measure(parse_case(text, args.spec), args.repeats)
    facts = machine_facts()
    print_table(rows)
    if args.out:
        write_csv(args.out, [facts | row for row in rows])


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Check every peer against the reference, then time them in turns with the ceilings of this case."""
    inputs = make_inputs(case)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    expected = reference(case, inputs)
    for name, make in PEERS.items():
        calls[name] = make(case, inputs)
        errors[name] = float((calls[name]().double() - expected).abs().max())
        if not errors[name] <= TOLERANCE[case.spec.dtype]:
            raise SystemExit(f"{name} is wrong on {case.name}: error {errors[name]:.2g}; nothing was timed")
    calls["ceiling: read"], read_bytes = read_ceiling(case.kv_bytes)
    calls["ceiling: sgemm"], gemm_flops = gemm_ceiling()

    seconds = {name: np.array(times) for name, times in time_in_turns(calls, repeats).items()}
    read_rate = read_bytes / np.median(seconds["ceiling: read"])
    gemm_rate = gemm_flops / np.median(seconds["ceiling: sgemm"])
    rows = []
    for name, times in seconds.items():
        median = float(np.median(times))
        is_ceiling = name.startswith("ceiling")
        rate = read_rate if name == "ceiling: read" else 0 if is_ceiling else case.kv_bytes / median
        flops = gemm_rate if name == "ceiling: sgemm" else 0 if is_ceiling else case.flops / median
        rows.append(
            {
                "case": case.name,
                "heads": f"{case.spec.num_qo_heads}/{case.spec.num_kv_heads}x{case.spec.head_dim}",
                "page_size": case.spec.page_size,
                "dtype": str(case.spec.dtype).removeprefix("torch."),
                "peer": name,
                "median_ms": round(median * 1e3, 4),
                "p20_ms": round(float(np.percentile(times, 20)) * 1e3, 4),
                "p80_ms": round(float(np.percentile(times, 80)) * 1e3, 4),
                "gb_per_s": round(rate / 1e9, 2),
                "gflop_per_s": round(flops / 1e9, 1),
                "of_read": round(rate / read_rate, 3),
                "of_sgemm": round(flops / gemm_rate, 3),
                "max_error": errors.get(name, ""),
                "repeats": repeats,
            }
        )
    return rows


def reference(case: Case, inputs: Inputs) -> torch.Tensor:
    """float64 attention of the case, on the specification's backend."""
    fields = (
        inputs.q,
        inputs.k_pages,
        inputs.v_pages,
        inputs.page_table,
        inputs.seq_lens,
        inputs.cu_seqlens_q,
    )
    state: torch.Tensor = quire.paged_attention(*fields, backend="reference")
    return state.double()


def time_in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds per call; peers alternate, and each is called once untimed first."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def machine_facts() -> dict[str, Any]:
    """Where and with what a row was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "quire": quire.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "command": "python -m benchmarks.attention " + " ".join(sys.argv[1:]),
    }


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as people read them."""
    table = Table("case", "who", "median ms", "GB/s", "of read", "GFLOP/s", "of sgemm", "max error")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        error = row["max_error"]
        table.add_row(
            row["case"],
            row["peer"],
            f"{row['median_ms']:.3f}",
            f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else "",
            f"{row['of_read']:.0%}" if row["gb_per_s"] else "",
            f"{row['gflop_per_s']:.0f}" if row["gflop_per_s"] else "",
            f"{row['of_sgemm']:.0%}" if row["gflop_per_s"] else "",
            f"{error:.1e}" if error != "" else "",
            end_section=row["peer"] == "ceiling: sgemm",
        )
    Console().print(table)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows of this run; an older file of the same name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parse_args() -> argparse.Namespace:
    """The command line, with the spec put together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, help="see benchmarks/cases.py")
    parser.add_argument("--heads", default="32/8x128", help="query heads / KV heads x head_dim")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    try:
        queries, rest = args.heads.split("/")
        kv_heads, head_dim = rest.split("x")
        sizes = int(queries), int(kv_heads), int(head_dim)
        args.spec = quire.AttentionSpec(*sizes, args.page_size, getattr(torch, args.dtype))
        for case in args.cases:
            parse_case(case, args.spec)
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    main()
