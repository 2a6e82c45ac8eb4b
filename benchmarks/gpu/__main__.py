"""Check every GPU kernel, then time it beside ceilings and peers: one call, one CSV, plots, one table.

Examples:
    python -m benchmarks.gpu --out results                       # everything, eight minutes at most
    python -m benchmarks.gpu --only decode,prefill
    python -m benchmarks.gpu --tune --kernels decode --kv-dtypes none int8 --candidates kv_tokens=64,128 num_warps=4,8
    python -m benchmarks.gpu --plot benchmarks/results/gpu-h100.csv
    python -m benchmarks.gpu --device cpu --backend cpu --quick  # a dry run without a GPU

Each job runs in a worker process, so that a crash costs one row. When time runs short, the least important jobs are
skipped; their rows say so.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import markdown, plots, report
from benchmarks.gpu.jobs import Row, Setting, run_jobs
from benchmarks.gpu.suite import SECTIONS, make_jobs, warm_up_jobs
from benchmarks.gpu.tune import jobs as tune_jobs

CHECK_SHARE = 0.4  # of the time, at most


def main() -> int:
    """Parse, run, write, print; the exit code is 1 where a check failed."""
    args = parse_args()
    if args.plot:
        for path in plots.plot(args.plot, args.plot.parent):
            print(path)
        return 0
    if args.markdown:
        print(markdown.tables(args.markdown))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    setting = Setting(args.device, args.backend, args.seed, args.quick)
    folder = Path(tempfile.mkdtemp(prefix="quire-gpu-"))
    rows: list[Row] = []
    with (args.out / ("tune-log.txt" if args.tune else "log.txt")).open("w", encoding="utf-8") as log:

        def say(line: str) -> None:
            log.write(f"{time.time() - started:7.1f} {line}\n")
            log.flush()

        try:
            run = tune if args.tune else measure
            run(args, setting, started + args.seconds, folder, rows, say)
        finally:
            facts = report.facts(args.device, args.seed)
            stem = report.stem(facts["gpu"]) + ("-tune" if args.tune else "")
            report.derive(rows)
            path = report.write_csv(args.out / f"{stem}.csv", facts, rows)
            for plotted in [] if args.tune else plots.plot(path, args.out):
                say(f"wrote {plotted}")
            append_logs(folder, log)
            shutil.rmtree(folder)
    seconds = time.time() - started
    text = report.tune_table(rows) if args.tune else report.table(rows)
    print(f"{facts['gpu']}, seed {args.seed}, {seconds:.0f} s, {path}\n{text}")
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def measure(
    args: argparse.Namespace,
    setting: Setting,
    deadline: float,
    folder: Path,
    rows: list[Row],
    say: Callable[[str], None],
) -> None:
    """Checks and compilation in many processes at once, then all that is timed in one."""
    timed = [
        job
        for section in SECTIONS
        if section in args.only and section != "checks"
        for job in make_jobs(section, args.quick, args.seed)
    ]
    together = warm_up_jobs(timed)
    if "checks" in args.only:
        together += make_jobs("checks", args.quick, args.seed)
    if together:
        until = deadline - (1 - CHECK_SHARE) * args.seconds if timed else deadline
        rows += run_jobs(together, setting, deadline=until, folder=folder, workers=args.workers, say=say)
    if timed:
        rows += run_jobs(timed, setting, deadline=deadline, folder=folder, say=say)


def tune(
    args: argparse.Namespace,
    setting: Setting,
    deadline: float,
    folder: Path,
    rows: list[Row],
    say: Callable[[str], None],
) -> None:
    """Compile all candidates in many processes at once, then time them one by one."""
    chosen, kernels = args.candidates or None, tuple(args.kernels)
    kv_dtypes = tuple(None if name == "none" else name for name in args.kv_dtypes)
    jobs = tune_jobs(("compile",), chosen, args.quick, kernels, kv_dtypes)
    until = deadline - 0.4 * args.seconds
    compiled = run_jobs(jobs, setting, deadline=until, folder=folder, workers=args.workers, say=say)
    rows += [row for row in compiled if row["status"] != "ok"]
    jobs = tune_jobs(("tune",), chosen, args.quick, kernels, kv_dtypes)
    rows += run_jobs(jobs, setting, deadline=deadline, folder=folder, say=say)


def append_logs(folder: Path, log: report.Writable) -> None:
    """What the workers printed, behind the rows."""
    for path in sorted(folder.glob("*.log")):
        text = path.read_text(errors="replace")
        if text.strip():
            log.write(f"\n--- {path.name}\n{text[-60_000:]}\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = Path(os.environ.get("OUT") or "benchmarks/results")
    parser.add_argument("--out", type=Path, default=out, help="folder for CSV, plots and log ($OUT)")
    parser.add_argument("--seconds", type=float, default=480, help="time for everything")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--quick", action="store_true", help="tiny cases: for trying the script out")
    parser.add_argument("--workers", type=int, default=min(10, max(1, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw the plots of a CSV file")
    parser.add_argument("--markdown", type=Path, metavar="CSV", help="only print the tables of docs/gpu.md")
    parser.add_argument("--tune", action="store_true", help="sweep tile shapes instead")
    parser.add_argument("--kernels", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--kv-dtypes", nargs="+", default=["none"], help="none, int8, fp8_e4m3, fp8_e5m2")
    parser.add_argument(
        "--candidates", nargs="+", default=[], metavar="NAME=A,B", help="settings to sweep over"
    )
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"--only takes some of {','.join(SECTIONS)}; got {','.join(sorted(unknown))}")
    try:
        pairs = [text.split("=") for text in args.candidates]
        args.candidates = {name: [int(value) for value in values.split(",")] for name, values in pairs}
    except ValueError:
        parser.error("--candidates takes NAME=1,2,3")
    return args


if __name__ == "__main__":
    sys.exit(main())
