"""The plots beside the CSV files, as SVG. Needs matplotlib, which the extra `bench` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # after the choice of a backend that needs no screen

from benchmarks import records
from benchmarks.ceilings import GEMM, READ
from benchmarks.ceilings import NAMES as CEILINGS

INK, QUIET = "#333333", "#8a8a8a"
COLOURS = {
    "quire": "#d1495b", "quire, compiled": "#a32c40", "quire, batch-invariant": "#e08a95",
    "sdpa, contiguous": "#b8c4ce", "gather + sdpa": "#8fa3b3", "flex, paged": "#66829a",
    "vllm": "#e6c36a", "vllm, page 128": "#c99a2e",
    "model.generate": "#b8c4ce", "generate_batch": "#8fa3b3",
    "with prefix caching": "#d1495b", "without prefix caching": "#b8c4ce",
    "vllm, eager": "#e6c36a", "vllm, compiled": "#c99a2e", "openvino-genai": "#7fa98a",
}  # fmt: skip
TRACES = {  # of benchmarks/prefix.py, in words
    "turns": "conversations,\nturn by turn",
    "examples": "questions behind\nthe same examples",
    "again": "a long prompt,\nthe second time",
}
WHISKERS = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8}
STYLE = {
    "svg.fonttype": "none",  # words stay words: small files, and a reader can search them
    "svg.hashsalt": "quire",  # the same rows draw the same file
    "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def attention(path: Path) -> Path:
    """Decode steps by the rate they read keys and values at, other steps by that of their arithmetic.

    Args:
        path: the CSV file; the plot lies beside it.
    """
    rows = records.read(path)
    reading, multiplying = (
        [row for row in rows if row["bound_by"] == bound] for bound in ("reading", "multiplying")
    )
    with pyplot.rc_context(STYLE):
        shares = [len(_cases(part)) or 1 for part in (reading, multiplying)]
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(12, 4), width_ratios=shares, layout="constrained"
        )
        _bars(left, reading, "gb_per_s", READ)
        left.set_title("One query per sequence: GB/s of keys and values", loc="left", fontsize=10)
        _bars(right, multiplying, "gflop_per_s", GEMM)
        right.set_title("Steps with prompts: GFLOP/s", loc="left", fontsize=10)
        handles, labels = (left if reading else right).get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(_about(rows), x=0.005, ha="left", fontsize=8, color=QUIET)
        return _save(figure, path)


def generation(path: Path) -> Path:
    """Tokens per second of each engine.

    Args:
        path: the CSV file; the plot lies beside it.
    """
    rows = [row for row in records.read(path) if row["tokens_per_s"]]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.4 * len(rows)), layout="constrained")
        speeds = [float(row["tokens_per_s"]) for row in rows]
        slow, fast = ([float(row[f"{bound}_tokens_per_s"]) for row in rows] for bound in ("p20", "p80"))
        between = _whiskers(speeds, slow, fast)
        colours = [COLOURS.get(row["who"], QUIET) for row in rows]
        axes.barh(range(len(rows)), speeds, 0.7, color=colours, xerr=between, error_kw=WHISKERS)
        axes.set_yticks(range(len(rows)), [row["who"] for row in rows])
        axes.invert_yaxis()
        for at, (speed, row) in enumerate(zip(speeds, rows, strict=True)):
            axes.annotate(f"{speed:.0f}", (float(row["p80_tokens_per_s"]), at), (5, 0),
                          textcoords="offset points", va="center")  # fmt: skip
        axes.set_xlim(0, max(speeds, default=1) * 1.12)
        title = (
            f"Tokens per second: {rows[0]['case']}, {rows[0]['model']}, {rows[0]['dtype']}" if rows else ""
        )
        axes.set_title(title, loc="left", fontsize=10)
        figure.suptitle(_about(rows), x=0.005, ha="left", fontsize=8, color=QUIET)
        return _save(figure, path)


def prefix(path: Path) -> Path:
    """Time to the first token and of the whole trace, with prefix caching and without.

    Args:
        path: the CSV file; the plot lies beside it.
    """
    rows = [row for row in records.read(path) if row["status"] == "ok"]
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        titles = {
            "first_token": "Until the first token, milliseconds",
            "trace": "The whole trace, milliseconds",
        }
        for axes, (name, title) in zip(panels, titles.items(), strict=True):
            _pairs(axes, rows, name)
            axes.set_title(title, loc="left", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        labels = [f"Quire {label}" for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(_about(rows), x=0.005, ha="left", fontsize=8, color=QUIET)
        return _save(figure, path)


def _pairs(axes: Any, rows: Sequence[records.Row], name: str) -> None:
    """A bar per engine and trace, with its milliseconds behind it."""
    cases = _cases(rows)
    who = list(dict.fromkeys(row["who"] for row in rows))
    height = 0.8 / max(1, len(who))
    for number, engine in enumerate(who):
        own = [row for row in rows if row["who"] == engine]
        at = [cases.index(row["case"]) - 0.4 + height * (number + 0.5) for row in own]
        middles, lows, highs = (
            [float(row[f"{name}_{of}_ms"]) for row in own] for of in ("median", "p20", "p80")
        )
        axes.barh(at, middles, height * 0.92, label=engine, color=COLOURS.get(engine, QUIET),
                  xerr=_whiskers(middles, lows, highs), error_kw=WHISKERS)  # fmt: skip
        for place, middle, high in zip(at, middles, highs, strict=True):
            axes.annotate(f"{middle:,.0f}", (high, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(cases)), [TRACES.get(case, case) for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, max((float(row[f"{name}_p80_ms"]) for row in rows), default=1) * 1.15)


def _bars(axes: Any, rows: Sequence[records.Row], rate: str, ceiling: str) -> None:
    """Groups of bars by case, with the ceiling of each case as a line over its group."""
    cases = _cases(rows)
    who = [name for name in dict.fromkeys(row["who"] for row in rows) if name not in CEILINGS]
    width = 0.8 / max(1, len(who))
    for number, name in enumerate(who):
        own = {row["case"]: row for row in rows if row["who"] == name and row[rate]}
        at = [i - 0.4 + width * (number + 0.5) for i, case in enumerate(cases) if case in own]
        timed = [own[case] for case in cases if case in own]
        heights = [float(row[rate]) for row in timed]
        slow, fast = (
            [
                height * float(row["median_ms"]) / float(row[bound])
                for height, row in zip(heights, timed, strict=True)
            ]
            for bound in ("p80_ms", "p20_ms")
        )
        axes.bar(at, heights, width * 0.92, label=name, color=COLOURS.get(name, QUIET),
                 yerr=_whiskers(heights, slow, fast), error_kw=WHISKERS)  # fmt: skip
    for number, case in enumerate(cases):
        height = next(float(row[rate]) for row in rows if row["case"] == case and row["who"] == ceiling)
        label = ceiling.removeprefix("ceiling: ") if number == 0 else None
        label = {"read": "ceiling: reading, or a matrix product in the same dtype"}.get(label or "")
        axes.hlines(height, number - 0.45, number + 0.45, color=INK, linewidth=1.2, label=label)
    axes.set_xticks(range(len(cases)), [_label(case, rows) for case in cases])
    axes.tick_params(axis="x", length=0, labelsize=8)


def _label(case: str, rows: Sequence[records.Row]) -> str:
    lengths, _, _ = case.partition("@")
    row = next(row for row in rows if row["case"] == case)
    return "\n".join([lengths.replace("+", "+\n"), row["kv_dtype"] or row["dtype"], f"({row['fits_in']})"])


def _cases(rows: Sequence[records.Row]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def _whiskers(middles: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """How far down and up from each bar's height the middle 60 % of the rounds lie."""
    return [
        [middle - low for middle, low in zip(middles, lows, strict=True)],
        [high - middle for middle, high in zip(middles, highs, strict=True)],
    ]


def _about(rows: Sequence[records.Row]) -> str:
    if not rows:
        return "nothing was measured"
    row = rows[0]
    heads = f", heads {row['heads']}, page {row['page_size']}" if "heads" in row else ""
    return (
        f"{row['machine'].split(' avx')[0]}, {row['threads']} threads{heads}, {row['date']}, {row['commit']}"
    )


def _save(figure: Any, path: Path) -> Path:
    drawn = path.with_suffix(".svg")
    figure.savefig(drawn, metadata={"Date": None})
    pyplot.close(figure)
    return drawn
