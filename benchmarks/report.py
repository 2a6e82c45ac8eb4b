"""The README's table, from a CSV file of measurements.

Example:
    python -m benchmarks.report benchmarks/results/cpu.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

CEILINGS = ("ceiling: read", "ceiling: sgemm")


def markdown_table(path: Path) -> str:
    """One line per case: each peer's median, and Quire's share of the ceiling that binds it.

    Decode is bound by reading keys and values, steps with prompts by multiplying.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    peers = [name for name in dict.fromkeys(row["peer"] for row in rows) if name not in CEILINGS]
    lines = ["| case | " + " | ".join(peers) + " | Quire's rate | beside |"]
    lines.append("| --- |" + " ---: |" * (len(peers) + 2))
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["peer"]: row for row in rows if row["case"] == case}
        medians = [f"{float(of_case[peer]['median_ms']):.2f} ms" for peer in peers]
        ours = of_case["quire"]
        if case.endswith(":1") and "+" not in case:
            rate, share = f"{float(ours['gb_per_s']):.1f} GB/s", f"{float(ours['of_read']):.0%} of reading"
        else:
            rate, share = (
                f"{float(ours['gflop_per_s']):.0f} GFLOP/s",
                f"{float(ours['of_sgemm']):.0%} of sgemm",
            )
        lines.append(f"| `{case}` | " + " | ".join([*medians, rate, share]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(markdown_table(Path(sys.argv[1])))
