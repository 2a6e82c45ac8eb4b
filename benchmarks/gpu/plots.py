"""Plots of a CSV file: decode as a share of the memory's rate, prefill as a rate of arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Row
from benchmarks.gpu.report import read_csv

INK, PALETTE = "#333333", ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860"]


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
    for name, draw in (("decode", draw_decode), ("prefill", draw_prefill)):
        figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
        if draw(axes, rows):
            axes.set_title(
                f"{name}, {rows[0]['gpu']}, {rows[0].get('heads') or '32/8x128'}, bf16 queries", loc="left"
            )
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8, ncols=2)
            for suffix in ("svg", "png"):
                written.append(folder / f"{path.stem}-{name}.{suffix}")
                figure.savefig(written[-1], dpi=140, metadata={"Date": None} if suffix == "svg" else None)
        pyplot.close(figure)
    return written


def draw_decode(axes: Any, rows: Sequence[Row]) -> bool:
    """Bars of TB/s per case: page dtypes and page sizes side by side, peers, the ceilings as lines."""
    ours = [row for row in rows if row["section"] == "decode" and row["heads"] == _main_heads(rows)]
    series = {
        f"{row.get('kv_dtype') or 'bf16'}, page {row['page_size']}": {}
        for row in ours
        if row["page_size"] != 64
    }
    for row in ours:
        name = f"{row.get('kv_dtype') or 'bf16'}, page {row['page_size']}"
        if name in series:
            series[name][row["case"]] = row["tb_per_s"]
    for row in rows:
        if row["section"] == "peer" and row["case"].endswith(":1") and row["who"] == "sdpa flash":
            series.setdefault("sdpa flash, contiguous", {})[row["case"]] = row["tb_per_s"]
    cases = list(dict.fromkeys(row["case"] for row in ours))
    _bars(axes, cases, series)
    _ceilings(axes, rows, ("copy", "read"), "tb_per_s")
    axes.set_ylabel("TB/s of keys and values")
    return bool(cases)


def draw_prefill(axes: Any, rows: Sequence[Row]) -> bool:
    """Bars of TFLOP/s per case, causal pairs counted once."""
    ours = [row for row in rows if row["section"] == "prefill"]
    series: dict[str, dict[str, float]] = {}
    for row in ours:
        name = f"{row.get('kv_dtype') or 'bf16'}, page {row['page_size']}"
        series.setdefault(name, {})[row["case"]] = row["tflop_per_s"]
    for row in rows:
        if (
            row["section"] == "peer"
            and not row["case"].endswith(":1")
            and row["who"] in ("sdpa flash", "sdpa cudnn")
        ):
            series.setdefault(f"{row['who']}, contiguous", {})[row["case"]] = row["tflop_per_s"]
    cases = list(dict.fromkeys(row["case"] for row in ours))
    _bars(axes, cases, series)
    _ceilings(axes, rows, ("gemm",), "tflop_per_s")
    axes.set_ylabel("TFLOP/s")
    return bool(cases)


def _main_heads(rows: Sequence[Row]) -> str:
    return next((str(row["heads"]) for row in rows if row["section"] == "decode"), "")


def _bars(axes: Any, cases: list[str], series: dict[str, dict[str, float]]) -> None:
    width = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        at = [i - 0.4 + width * (number + 0.5) for i, case in enumerate(cases) if case in values]
        heights = [values[case] for case in cases if case in values]
        axes.bar(at, heights, width * 0.9, label=name, color=PALETTE[number % len(PALETTE)])
    axes.set_xticks(range(len(cases)), cases)


def _ceilings(axes: Any, rows: Sequence[Row], names: tuple[str, ...], rate: str) -> None:
    for name in names:
        for row in rows:
            if row["section"] == "ceiling" and row["case"] == name:
                axes.axhline(row[rate], color=INK, linewidth=0.8, linestyle={"read": ":"}.get(name, "--"))
                axes.annotate(
                    name, (0.995, row[rate]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
                )
