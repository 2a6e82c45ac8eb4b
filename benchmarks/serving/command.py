"""Serve the same requests by Quire and by transformers: speed, waiting, memory and right texts, one row each.

Examples:
    {prog} --out serving.csv                        # on a GPU: Llama-2's 7B and 13B, nine minutes at most
    {prog} --resume serving.csv                     # a second call does what the first had no time for
    {prog} --scale 8 --seconds 240 --out small.csv  # on a CPU: shapes and lengths divided by 8
    {prog} --scale 8 --only 7b-8k-4 7b-mixed-8
    {prog} --profile --scale 8                      # a decode step by its parts
    {prog} --markdown serving.csv                   # only print the tables of a file
    {prog} --plot serving.csv                       # only draw its plots

Weights are random, made on the device. Each contestant serves each case in a process of its own, after a warm-up; when
memory is refused the row says so. No speed is reported before the texts agree with float32's logits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, records
from benchmarks.options import Parser
from benchmarks.progress import Progress, wide_console
from benchmarks.serving import agreement, figures, processes, tables
from benchmarks.serving.cases import Case, chosen, make_cases
from benchmarks.serving.contestants import BY_DEFAULT, CONTESTANTS, MAX_BATCH_TOKENS
from benchmarks.serving.shapes import LLAMA_2
from quire.cli.busy import warning
from quire.cli.console import hush

START_SECONDS = {"cuda": 15.0, "cpu": 12.0}  # of a process that loads torch and a scaled model
PATIENCE = 8  # a contestant may take so many times what was expected of it, where there is time
JUDGED = 4  # texts of each contestant and case

SETTING = ("device", "dtype", "scale", "seed")  # what the rows of one file share

Do = Callable[[dict[str, Any], float], dict[str, Any]]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.serving") -> int:
    """Parse, measure, print, write; the exit code is 1 where a text was wrong or a contestant failed."""
    args = parse_args(arguments, prog)
    if args.markdown:
        print(tables.markdown(records.read(args.markdown)))
        return 0
    if args.plot:
        return _plot(args.plot)
    hush()
    if args.profile:
        return _profile(args)
    typed = sys.argv[1:] if arguments is None else arguments
    facts = environment.facts(environment.command_line("benchmarks.serving", typed))
    facts |= {"busy": warning() or ""}
    with Progress() as progress:
        call = Call(args, facts, progress.say)
        call.measure()
    wide_console().print(tables.of_rows(call.rows))
    return int(any(row["status"] in ("wrong", "failed") for row in call.rows))


class Call:
    """One call: its clock, the rows of earlier calls, and the file that is written after each case.

    Args:
        say: told what comes next.
        do: does a worker's task in a process of its own.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        facts: dict[str, str],
        say: Callable[[str], None],
        do: Do = processes.run,
    ) -> None:
        self.args, self.facts, self.say, self.do = args, facts, say, do
        self.deadline = time.monotonic() + args.seconds
        self.dtype = getattr(torch, args.dtype)
        self.rows: list[records.Row] = list(args.kept)
        self.common = {name: getattr(args, name) for name in SETTING}
        self.setting = {name: str(value) for name, value in self.common.items()}

    def measure(self) -> None:
        """Every case that has contestants without a row, as long as there is time."""
        wanted = [(case, self._missing(case)) for case in self.args.cases]
        wanted = [(case, who) for case, who in wanted if who]
        if not wanted:
            self._write()
            return
        self.say("how fast this device reads")
        found = self.do({"kind": "bandwidth", **self.common}, max(60.0, START_SECONDS[self._kind] * PATIENCE))
        if found["status"] != "ok":
            raise RuntimeError(f"the device could not be measured: {found['note']}")
        self.bytes_per_second = found["bytes_per_second"]
        self.facts |= {"device_name": found["device"]}
        for case, contestants in wanted:
            self.rows += self._measure_case(case, contestants)
            self.rows.sort(key=self._place)
            self._write()

    def _place(self, row: records.Row) -> tuple[int, int]:
        """Rows stand in the order of cases and contestants, whichever call measured them."""
        cases = [case.key for case in self.args.all_cases]
        return cases.index(row["key"]), list(CONTESTANTS).index(row["who"])

    def _missing(self, case: Case) -> list[str]:
        have = {row["who"] for row in self.rows if row["case"] == case.name}
        return [who for who in self.args.contestants if who not in have]

    def _measure_case(self, case: Case, contestants: list[str]) -> list[records.Row]:
        results = {who: self._serve(case, who) for who in contestants}
        for result in results.values():
            if result["status"] == "ok" and not figures.is_complete(case, result):
                result |= {"status": "wrong", "note": "a text is missing or not as long as asked"}
        right = {who: result for who, result in results.items() if result["status"] == "ok"}
        judged = agreement.sample(case.asked, self.args.judged)
        verdicts = self._judge(case, right, judged) if right else {}
        rows = []
        for who, result in results.items():
            row = self._row(case, who) | figures.columns(
                status=result["status"],
                note=result.get("note", ""),
                **figures.about(case),
                **self._terms(case),
            )
            rows.append(
                row | (self._columns(case, result, verdicts[who], len(judged)) if who in right else {})
            )
        return rows

    def _serve(self, case: Case, who: str) -> dict[str, Any]:
        rung = self._out_of_memory_below(case, who)
        if rung:
            return {"status": "out of memory", "note": f"out of memory at {rung} requests already"}
        left = self.deadline - time.monotonic() - self._expected(case)  # the judge's time is kept
        if left < self._expected(case):
            return {"status": figures.SKIPPED, "note": "no time left"}
        self.say(f"{case.name}: {who}")
        task = {"kind": "serve", "case": case.key, "who": who, "budget": self.budget(case), **self.common}
        patience = PATIENCE * self._expected(case)
        result = self.do(task, min(left, patience))
        if result["status"] == "failed" and result["note"].startswith("no result within") and left < patience:
            return {"status": figures.SKIPPED, "note": "cut off when the call's time was over"}
        if result["status"] == "out of memory":
            said = result["note"]
            result["note"] = f"out of memory at {len(case.asked)} requests: {said}"
        return result

    def _out_of_memory_below(self, case: Case, who: str) -> int:
        """On which lower rung of a ladder a contestant was out of memory; 0: on none."""
        rungs = {
            other.name: other for other in self.args.all_cases if case.ladder and other.ladder == case.ladder
        }
        counts = [
            len(rungs[row["case"]].asked)
            for row in self.rows
            if row["case"] in rungs and row["who"] == who and row["status"] == "out of memory"
        ]
        return min((count for count in counts if count < len(case.asked)), default=0)

    def _judge(
        self, case: Case, right: dict[str, dict[str, Any]], judged: list[int]
    ) -> dict[str, tuple[str, float, float, str]]:
        """Of each contestant the status, the worst regret, what was allowed, and a note."""
        prompts = case.prompts(self.args.seed)
        texts: list[agreement.Text] = []  # the same text of two contestants is judged once
        for result in right.values():
            texts += [text for i in judged if (text := (prompts[i], result["tokens"][i])) not in texts]
        self.say(f"{case.name}: judging {len(texts)} texts")
        task = {"kind": "judge", "case": case.key, "texts": texts, **self.common}
        result = self.do(task, max(self._expected(case), self.deadline - time.monotonic()))
        if result["status"] != "ok":
            late = result["note"].startswith("no result within")
            status = figures.SKIPPED if late else "failed"
            return dict.fromkeys(right, (status, 0.0, 0.0, f"texts were not judged: {result['note']}"))
        found = [tuple(verdict) for verdict in result["verdicts"]]
        verdicts = {}
        for who, served in right.items():
            own = [found[texts.index((prompts[i], served["tokens"][i]))] for i in judged]
            regret, allowed = max(each[0] for each in own), max(each[1] for each in own)
            verdicts[who] = ("ok" if regret <= allowed else "wrong", regret, allowed, "")
        return verdicts

    def _columns(
        self, case: Case, result: dict[str, Any], verdict: tuple[str, float, float, str], judged: int
    ) -> records.Row:
        status, regret, allowed, note = verdict
        columns = {"status": status, "note": note}
        if not note:
            columns |= {
                "regret": f"{regret:.3g}", "allowed": f"{allowed:.3g}", "judged": f"{judged} of {len(case.asked)}",
            }  # fmt: skip
        if status == "ok":
            columns |= figures.speeds(case, result, self.dtype.itemsize, self.bytes_per_second)
        return columns

    def budget(self, case: Case) -> int:
        """Bytes of weights, cache and activations together.

        Scaled down, a case keeps how many times the longest request's keys and values fit beside the weights. As
        activations do not shrink with the layers, nor a step's most tokens with the lengths, room for those is added.
        """
        whole = int(self.args.budget_gib * figures.GIB)
        if self.args.scale == 1:
            return whole
        # The full-sized model computes in 16 bits.
        full, own = LLAMA_2[case.shape.name.split("/")[0]], case.shape
        longest = {each.key: each for each in make_cases(1, self.args.seed)}[case.key].longest
        times = max(0.0, whole - 2 * full.parameters) / (2 * full.slot_values * longest)
        activations = 2 * max(case.longest, MAX_BATCH_TOKENS) * (3 * own.intermediate + 4 * own.hidden)
        values = own.parameters + times * own.slot_values * case.longest + activations
        return int(values * self.dtype.itemsize)

    def _terms(self, case: Case) -> dict[str, str]:
        return {
            "read_gb_per_s": f"{self.bytes_per_second / 1e9:.1f}",
            "budget_gib": f"{self.budget(case) / figures.GIB:.3f}",
        }

    def _row(self, case: Case, who: str) -> records.Row:
        return self.facts | self.setting | {"case": case.name, "key": case.key, "who": who}

    @property
    def _kind(self) -> str:
        return torch.device(self.args.device).type

    def _expected(self, case: Case) -> float:
        return case.seconds if self._kind == "cuda" else START_SECONDS["cpu"]

    def _write(self) -> None:
        if self.args.out:
            records.write(self.args.out, self.rows)


def _kept(parser: Parser, args: argparse.Namespace) -> list[records.Row]:
    """Rows of an earlier call with the same options, but for those that it had no time for."""
    rows = records.read(args.resume) if args.resume else []
    for name in SETTING:
        others = {row.get(name, "") for row in rows} - {str(getattr(args, name))}
        if others:
            parser.error(
                f"--resume must be a file of a call with the same --{name}, {getattr(args, name)}; got "
                f"{', '.join(sorted(others))}"
            )
    return [row for row in rows if row["status"] != figures.SKIPPED]


def _profile(args: argparse.Namespace) -> int:
    case = args.cases[0]
    task = {
        "kind": "profile", "case": case.key, "device": args.device, "dtype": args.dtype, "scale": args.scale,
        "seed": args.seed, "steps": args.steps,
    }  # fmt: skip
    result = processes.run(task, args.seconds)
    if result["status"] != "ok":
        print(f"quire: no profile of {case.name}: {result['note']}", file=sys.stderr)
        return 1
    wide_console().print(tables.of_profile(case, result, on_host=torch.device(args.device).type == "cpu"))
    return 0


def _plot(path: Path) -> int:
    from benchmarks.serving import plots

    for drawn in plots.draw(path):
        print(drawn)
    return 0


def parse_args(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line; cases put together, the device chosen."""
    parser = Parser(prog, __doc__)
    keys = ", ".join(case.key for case in make_cases())
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help=f"some of {keys}")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=BY_DEFAULT, metavar="WHO",
                        help=f"default: all but the last of {', '.join(map(repr, CONTESTANTS))}")  # fmt: skip
    parser.add_argument(
        "--scale", type=int, help="divide layers, width and lengths by so much; needed on a CPU"
    )
    parser.add_argument("--seconds", type=float, default=500, help="time for everything; default: 500")
    parser.add_argument(
        "--budget-gib", type=float, default=80, metavar="GIB", help="memory of the device; default: 80"
    )
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="default: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    parser.add_argument(
        "--judged", type=int, default=JUDGED, help=f"texts judged per contestant; default: {JUDGED}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and arrivals; default: 0")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="written after each case")
    parser.add_argument("--resume", type=Path, metavar="FILE.csv",
                        help="keep its rows, do what they lack, and write them all to it, or to --out")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="print a decode step by its parts instead")
    parser.add_argument("--steps", type=int, default=40, help="decode steps of --profile; default: 40")
    parser.add_argument("--markdown", type=Path, metavar="FILE.csv", help="only print the tables of a file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.csv", help="only draw the plots of a file, beside it"
    )
    args = parser.parse_args(arguments)
    _complete(parser, args)
    return args


def _complete(parser: Parser, args: argparse.Namespace) -> None:
    """Check what was typed, and fill in what was not."""
    for name in ("resume", "markdown", "plot"):
        path = getattr(args, name)
        if path and not path.is_file():
            parser.error(f"--{name} must be a file of an earlier call; got {path}, which is none")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        kind = ""
    if kind not in START_SECONDS:
        parser.error(f"--device must be cuda or cpu; got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device must be there; got {args.device}, and torch finds no GPU")
    if args.scale is None and kind == "cpu" and not (args.markdown or args.plot):
        parser.error("--scale must be given on a CPU, such as --scale 8; got none")
    args.scale = 1 if args.scale is None else args.scale
    args.dtype = args.dtype or ("bfloat16" if kind == "cuda" else "float32")
    args.out = args.out or args.resume
    for name, least in (("scale", 1), ("judged", 1), ("steps", 4)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}; got {getattr(args, name)}")
    args.kept = _kept(parser, args)
    args.all_cases = make_cases(args.scale, args.seed)
    try:
        args.cases = chosen(args.all_cases, args.only)
    except ValueError as error:
        parser.error(str(error))
