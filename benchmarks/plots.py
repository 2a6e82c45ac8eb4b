"""The plots beside the CSV files, as SVG. Needs matplotlib, which the extra `bench` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.ceilings import GEMM, READ
from benchmarks.ceilings import NAMES as CEILINGS
from benchmarks.drawing import (
    OURS,
    OURS_DARKER,
    OURS_LIGHTER,
    PEERS,
    QUIET,
    STYLE,
    WHISKERS,
    WIDTH,
    Bar,
    Panel,
    panels,
    pyplot,
    save,
)
from benchmarks.words import case_in_words, name_of

COLOURS = {
    "Quire": OURS, "Quire, compiled": OURS_DARKER, "Quire, batch-invariant": OURS_LIGHTER,
    "SDPA, contiguous": PEERS[0], "gather + SDPA": PEERS[1], "FlexAttention, paged": PEERS[2],
    "vLLM": PEERS[3], "vLLM, page 128": PEERS[4],
    "transformers' generate": PEERS[0], "transformers' generate_batch": PEERS[1],
    "Quire with prefix caching": OURS, "Quire without prefix caching": PEERS[1],
    "vLLM, eager": PEERS[3], "vLLM, compiled": PEERS[4], "OpenVINO GenAI": PEERS[5],
}  # fmt: skip
TRACES = {  # of benchmarks/prefix.py, in words
    "turns": "conversations,\nturn by turn",
    "examples": "questions behind\nthe same examples",
    "again": "a long prompt,\nthe second time",
}


def attention(path: Path) -> Path:
    """The time of a call, case by case, beside the time that the machine's own ceiling would take.

    Args:
        path: the CSV file; the plot lies beside it.
    """
    rows = records.read(path)
    found = [_panel(case, [row for row in rows if row["case"] == case]) for case in _cases(rows)]
    with pyplot.rc_context(STYLE):
        about = f"{_about(rows)}\ndashed: reading as many bytes, or as large a matrix product, by PyTorch"
        figure = panels(found, COLOURS, title="Quire's attention on pages: milliseconds a call", about=about)
        return save(figure, path.with_suffix(".svg"))


def generation(path: Path) -> Path:
    """Tokens per second of each engine.

    Args:
        path: the CSV file; the plot lies beside it.
    """
    rows = [row for row in records.read(path) if row["tokens_per_s"]]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 0.9 + 0.34 * len(rows)), layout="constrained")
        speeds = [float(row["tokens_per_s"]) for row in rows]
        slow, fast = ([float(row[f"{bound}_tokens_per_s"]) for row in rows] for bound in ("p20", "p80"))
        between = _whiskers(speeds, slow, fast)
        colours = [COLOURS.get(name_of(row["who"]), QUIET) for row in rows]
        axes.barh(range(len(rows)), speeds, 0.7, color=colours, xerr=between, error_kw=WHISKERS)
        axes.set_yticks(range(len(rows)), [name_of(row["who"]) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        for at, (speed, row) in enumerate(zip(speeds, rows, strict=True)):
            axes.annotate(f"{speed:.0f}", (float(row["p80_tokens_per_s"]), at), (5, 0),
                          textcoords="offset points", va="center")  # fmt: skip
        axes.set_xlim(0, max(speeds, default=1) * 1.12)
        title = "Quire as an engine: tokens per second"
        if rows:
            title += f"\n{_requests_in_words(rows[0]['case'])}, {rows[0]['model']}, {rows[0]['dtype']}"
        axes.set_title(title, loc="left", fontsize=10)
        figure.suptitle(_about(rows), x=0.005, ha="left", fontsize=8, color=QUIET)
        return save(figure, path.with_suffix(".svg"))


def prefix(path: Path) -> Path:
    """Time to the first token and of the whole trace, with prefix caching and without.

    Args:
        path: the CSV file; the plot lies beside it.
    """
    rows = [row for row in records.read(path) if row["status"] == "ok"]
    with pyplot.rc_context(STYLE):
        figure, sides = pyplot.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True, layout="constrained")
        titles = {
            "first_token": "Until the first token, milliseconds",
            "trace": "The whole trace, milliseconds",
        }
        for axes, (name, title) in zip(sides, titles.items(), strict=True):
            _pairs(axes, rows, name)
            axes.set_title(title, loc="left", fontsize=10)
        handles, labels = sides[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
        figure.suptitle(_about(rows), x=0.005, ha="left", fontsize=8, color=QUIET)
        return save(figure, path.with_suffix(".svg"))


def _panel(case: str, rows: Sequence[records.Row]) -> Panel:
    timed = [row for row in rows if row["median_ms"] and row["who"] not in CEILINGS]
    bars = tuple(
        Bar(
            name_of(row["who"]),
            *(float(row[f"{name}_ms"]) for name in ("median", "p20", "p80")),
            f"{float(row['median_ms']):.2f}"
            if float(row["median_ms"]) < 10
            else f"{float(row['median_ms']):.0f}",
        )
        for row in timed
    )
    ours = next((row for row in timed if row["who"] == "quire"), None)
    title = case_in_words(case).replace(" beside ", "\nbeside ")
    return Panel(title, bars, _ceiling(ours, rows) if ours else None)


def _ceiling(ours: records.Row, rows: Sequence[records.Row]) -> float | None:
    """Milliseconds that the ceiling which binds the case takes for as many bytes or FLOPs."""
    who, rate = (READ, "gb_per_s") if ours["bound_by"] == "reading" else (GEMM, "gflop_per_s")
    found = next((row[rate] for row in rows if row["who"] == who), "")
    return float(ours["median_ms"]) * float(ours[rate]) / float(found) if found and ours[rate] else None


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
        label = name_of(engine)
        axes.barh(at, middles, height * 0.92, label=label, color=COLOURS.get(label, QUIET),
                  xerr=_whiskers(middles, lows, highs), error_kw=WHISKERS)  # fmt: skip
        for place, middle, high in zip(at, middles, highs, strict=True):
            axes.annotate(f"{middle:,.0f}", (high, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(cases)), [TRACES.get(case, case) for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, max((float(row[f"{name}_p80_ms"]) for row in rows), default=1) * 1.15)


def _requests_in_words(case: str) -> str:
    prompts, _, new_tokens = case.partition(":")
    return f"prompts {prompts.replace('x', ' × ')} tokens long, {new_tokens} new tokens each"


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
    machine = f"{row['machine'].split(' avx')[0]}, {row['threads']} threads"
    if "heads" in row:
        heads, _, width = row["heads"].partition("x")
        machine += f", {heads} heads of {width}, page {row['page_size']}, {row['dtype']} unless said"
    return f"{machine}; {row['date']}, commit {row['commit']}"
