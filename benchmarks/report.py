"""Put the committed measurements into the README: its tables, and the plots beside the CSV files.

Example:
    python -m benchmarks.report          # after python -m benchmarks.attention --out …, or in `make bench`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from benchmarks import records
from benchmarks.ceilings import NAMES as CEILINGS
from benchmarks.environment import ROOT

RESULTS = ROOT / "benchmarks/results"
ATTENTION, GENERATION = RESULTS / "cpu.csv", RESULTS / "cpu-generation.csv"
BASELINE = "model.generate"


def main() -> int:
    """Rewrite the README's tables and draw the plots; the exit code is 0."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in tables().items():
        text = put(text, name, table)
    readme.write_text(text)
    try:
        from benchmarks import plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed. Fix: pip install -e '.[bench]'", file=sys.stderr)
        return 0
    for path in (plots.attention(ATTENTION), plots.generation(GENERATION)):
        print(path.relative_to(ROOT))
    return 0


def tables() -> dict[str, str]:
    """The README's tables by their marks."""
    return {
        "attention": attention_table(records.read(ATTENTION)),
        "generation": generation_table(records.read(GENERATION)),
    }


def put(text: str, name: str, table: str) -> str:
    """The text with a table between `<!-- bench: name -->` and the next `<!-- end -->`.

    Raises:
        ValueError: the text has no such mark.
    """
    mark = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not mark.search(text):
        raise ValueError(f"text must hold <!-- bench: {name} --> and <!-- end -->; got neither")
    return mark.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def attention_table(rows: Sequence[records.Row]) -> str:
    """One line per case: each peer's median in milliseconds, and Quire's rate beside the ceiling that binds it."""
    peers = [name for name in dict.fromkeys(row["who"] for row in rows) if name not in CEILINGS]
    lines = ["| case | fits in | " + " | ".join(peers) + " | Quire's rate | ceiling |"]
    lines.append("| --- | --- |" + " ---: |" * (len(peers) + 2))
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["who"]: row for row in rows if row["case"] == case}
        ours = of_case["quire"]
        cells = [f"`{case}`", ours["fits_in"]]
        cells += [_milliseconds(of_case.get(peer)) for peer in peers]
        lines.append("| " + " | ".join([*cells, *_rate(ours)]) + " |")
    return "\n".join(lines)


def generation_table(rows: Sequence[records.Row]) -> str:
    """One line per engine: tokens per second, and how many times the padded batch's."""
    base = next((float(row["tokens_per_s"] or 0) for row in rows if row["who"] == BASELINE), 0.0)
    lines = [f"| engine | tokens/s | p20 – p80 | × {BASELINE} |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        if row["tokens_per_s"]:
            speed = float(row["tokens_per_s"])
            between = f"{float(row['p20_tokens_per_s']):.0f} – {float(row['p80_tokens_per_s']):.0f}"
            lines.append(
                f"| {row['who']} | {speed:.0f} | {between} | {f'{speed / base:.2f}' if base else ''} |"
            )
        else:
            lines.append(f"| {row['who']} | {row['status']} | | |")
    return "\n".join(lines)


def _milliseconds(row: records.Row | None) -> str:
    if row is None or not row["median_ms"]:
        return "–" if row is None or row["status"] == "unavailable" else row["status"]
    return f"{float(row['median_ms']):.2f}"


def _rate(row: records.Row) -> tuple[str, str]:
    if not row["median_ms"]:
        return row["status"], ""
    if row["bound_by"] == "reading":
        return f"{float(row['gb_per_s']):.1f} GB/s", f"{float(row['of_read']):.0%} of reading"
    return f"{float(row['gflop_per_s']):.0f} GFLOP/s", f"{float(row['of_gemm']):.0%} of {row['dtype']} gemm"


if __name__ == "__main__":
    sys.exit(main())
