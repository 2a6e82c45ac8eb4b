"""Plots of a CSV file: decode as a share of the memory's rate, prefill as a rate of arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Row
from benchmarks.gpu.report import read_csv

INK = "#333333"
COLORS = {  # ours in colour, peers in greys
    "bf16, page 16": "#1f5fa8",
    "bf16, page 128": "#8fb8e0",
    "int8, page 16": "#d9822b",
    "fp8_e4m3, page 16": "#3a923a",
    "sdpa flash": "#6b6b6b",
    "sdpa cudnn": "#9c9c9c",
    "gather + sdpa": "#c9c9c9",
}
Series = dict[str, dict[str, float]]  # name → case → height


def plot(path: Path, folder: Path) -> list[Path]:
    """Draw what the file holds, as SVG and PNG; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots. Later: python -m benchmarks.gpu --plot CSV")
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "quire", "font.size": 9, "axes.edgecolor": INK, "text.color": INK}
    )
    from matplotlib import pyplot

    rows = [row for row in read_csv(path) if row.get("median_us")]
    if not rows:
        return []
    written = []
    for name, peers, rate, unit, ceilings in (
        (
            "decode",
            ("sdpa flash", "gather + sdpa"),
            "tb_per_s",
            "TB/s of keys, values and scales",
            ("read", "copy"),
        ),
        ("prefill", ("sdpa flash", "sdpa cudnn"), "tflop_per_s", "TFLOP/s, causal pairs once", ("gemm",)),
    ):
        cases, series = heights(rows, name, peers, rate)
        if not cases:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
        draw_bars(axes, cases, series)
        draw_ceilings(axes, {row["case"]: row[rate] for row in rows if row["case"] in ceilings})
        axes.set_ylabel(unit)
        axes.set_title(f"{name} on {rows[0]['gpu']}", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=len(series))
        for suffix in ("svg", "png"):
            written.append(folder / f"{path.stem}-{name}.{suffix}")
            figure.savefig(written[-1], dpi=140, metadata={"Date": None} if suffix == "svg" else None)
        pyplot.close(figure)
    return written


def heights(rows: Sequence[Row], section: str, peers: tuple[str, ...], rate: str) -> tuple[list[str], Series]:
    """Cases of a section at its first row's heads, and what stands above each."""
    heads = next((row["heads"] for row in rows if row["section"] == section), None)
    ours = [row for row in rows if row["section"] == section and row["heads"] == heads]
    cases = list(dict.fromkeys(row["case"] for row in ours))
    series: Series = {}
    for row in ours:
        name = f"{row.get('kv_dtype') or 'bf16'}, page {row['page_size']}"
        if name in COLORS:
            series.setdefault(name, {})[row["case"]] = row[rate]
    for row in rows:
        if row["section"] == "peer" and row["who"] in peers and row["case"] in cases:
            series.setdefault(row["who"], {})[row["case"]] = row[rate]
    return cases, series


def draw_bars(axes: Any, cases: Sequence[str], series: Series) -> None:
    """One group of bars per case, closed up where a series does not have it."""
    width = 0.84 / max(1, len(series))
    for name, values in series.items():
        at = []
        for i, case in enumerate(cases):
            present = [other for other in series if case in series[other]]
            if name in present:
                at.append(i + width * (present.index(name) - (len(present) - 1) / 2))
        found = [values[case] for case in cases if case in values]
        axes.bar(at, found, width * 0.92, label=name, color=COLORS[name])
    axes.set_xticks(range(len(cases)), cases)
    axes.set_xlim(-0.6, len(cases) - 0.1)


def draw_ceilings(axes: Any, rates: dict[str, float]) -> None:
    """A line each, its name at the right end; names keep apart where the lines do not."""
    for number, (name, rate) in enumerate(sorted(rates.items(), key=lambda pair: pair[1])):
        axes.axhline(rate, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.annotate(
            name, (1, rate), xycoords=("axes fraction", "data"), ha="right", va="bottom" if number else "top"
        )
