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
from pathlib import Path

from benchmarks.gpu import markdown, plots, report
from benchmarks.gpu.jobs import Job, Row, Setting, run_jobs
from benchmarks.gpu.suite import SECTIONS, make_jobs, warm_up_jobs
from benchmarks.gpu.tune import jobs as tune_jobs

TOGETHER_SHARE, TUNE_TOGETHER_SHARE = 0.4, 0.6  # of the time, at most, for what many processes do at once


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
    with Run(args) as run:
        if args.tune:
            tune(run)
        else:
            measure(run)
    return int(any(row["status"] in ("wrong", "failed") for row in run.rows))


class Run:
    """One call: its clock, its rows, and the log they are written to as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started, self.rows = args, time.time(), list[Row]()
        self.setting = Setting(args.device, args.backend, args.seed, args.quick)
        self.folder = Path(tempfile.mkdtemp(prefix="quire-gpu-"))
        self.log = (args.out / ("tune-log.txt" if args.tune else "log.txt")).open("w", encoding="utf-8")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """Write and print what there is, however it ended."""
        facts, path = self.write()
        if not self.args.tune:
            plots.plot(path, self.args.out)
        for written in sorted(self.folder.glob("*.log")):  # what the workers printed
            if text := written.read_text(errors="replace").strip():
                self.log.write(f"\n--- {written.name}\n{text[-60_000:]}\n")
        self.log.close()
        shutil.rmtree(self.folder)
        text = report.tune_table(self.rows) if self.args.tune else report.table(self.rows)
        seconds = time.time() - self.started
        print(f"{facts['gpu']}, seed {self.args.seed}, {seconds:.0f} s, {path}\n{text}")

    def write(self) -> tuple[Row, Path]:
        """The CSV file of the rows so far."""
        facts = report.facts(self.args.device, self.args.seed)
        stem = report.stem(facts["gpu"]) + ("-tune" if self.args.tune else "")
        report.derive(self.rows)
        return facts, report.write_csv(self.args.out / f"{stem}.csv", facts, self.rows)

    def do(self, jobs: list[Job], share: float = 1.0, workers: int = 1) -> None:
        """Run jobs until this share of the call's time is over, in so many processes."""
        if not jobs:
            return
        deadline = self.started + share * self.args.seconds
        self.rows += run_jobs(
            jobs, self.setting, deadline=deadline, folder=self.folder, workers=workers, say=self.say
        )
        print(f"{time.time() - self.started:.0f} s: {len(self.rows)} rows", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line of the log, with the seconds since the start."""
        self.log.write(f"{time.time() - self.started:7.1f} {line}\n")
        self.log.flush()


def measure(run: Run) -> None:
    """Checks and compilation in many processes at once, then all that is timed in one."""
    args = run.args
    timed = [
        job
        for section in SECTIONS
        if section in args.only and section != "checks"
        for job in make_jobs(section, args.quick, args.seed)
    ]
    together = warm_up_jobs(timed)
    if "checks" in args.only:
        together += make_jobs("checks", args.quick, args.seed)
    run.do(together, share=TOGETHER_SHARE if timed else 1.0, workers=args.workers)
    # A call that is cut off has measured what matters most.
    for priority in sorted({job.priority for job in timed}):
        run.do([job for job in timed if job.priority == priority])
        run.write()


def tune(run: Run) -> None:
    """Compile all candidates in many processes at once, then time them one by one."""
    args = run.args
    kv_dtypes = tuple(None if name == "none" else name for name in args.kv_dtypes)
    what = args.candidates or None, args.quick, tuple(args.kernels), kv_dtypes
    run.do(tune_jobs("compile", *what), share=TUNE_TOGETHER_SHARE, workers=args.workers)
    run.do(tune_jobs("tune", *what))


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
