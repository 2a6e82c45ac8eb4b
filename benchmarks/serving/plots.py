"""The plots beside a file of the serving table, as SVG. Needs matplotlib, which the extra `bench` brings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.drawing import QUIET, STYLE, WIDTH, pyplot, save
from benchmarks.serving import figures, tables

COLOURS = {
    "quire": "#d1495b", "quire, compiled": "#a32c40", "generate, dynamic cache": "#66829a",
    "generate, static cache, compiled": "#b8c4ce", "generate_batch": "#c99a2e",
}  # fmt: skip
MIXED = "7b-mixed-8"


def draw(path: Path) -> list[Path]:
    """Draw what a file has rows for; the plots lie beside it."""
    rows = records.read(path)
    return [_under_load(rows, path), _three_lines(rows, path)]


def _under_load(rows: Sequence[records.Row], path: Path) -> Path:
    """Requests that arrive at random: memory over time, and how long the next token takes."""
    mixed = [row for row in rows if row["key"] == MIXED and row["status"] == "ok"]
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, 3.3), layout="constrained")
        for row in mixed:
            style = _style(row["who"])
            memory = figures.pairs(row["memory"])
            left.step([at for at, _ in memory], [held for _, held in memory], where="post", **style)
            waits = figures.pairs(row["between_ms"])
            right.plot([at for at, _ in waits], [ms for _, ms in waits], marker="o", markersize=3, **style)
        left.set_title("Memory over time, GiB", loc="left", fontsize=10)
        left.set_xlabel("seconds after the first request")
        left.set_ylim(bottom=0)
        right.set_title("Time between tokens, milliseconds", loc="left", fontsize=10)
        right.set_xlabel("so many per cent of the tokens take no longer")
        right.set_yscale("log")
        for axis in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
            axis(_plain)
        if mixed:
            figure.legend(
                *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
            )
        figure.suptitle(_about(mixed or rows, named=True), x=0.005, ha="left", fontsize=8, color=QUIET)
        return save(figure, path.with_name(f"{path.stem}-load.svg"))


def _three_lines(rows: Sequence[records.Row], path: Path) -> Path:
    """The three lines of the original comparison: rate at 8k, requests of 32k that fit, steadiness of eight."""
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 3, figsize=(WIDTH, 3.1), layout="constrained")
        _bars(panels[0], [row for row in rows if row["key"] == "7b-8k-4"], "decode_tokens_per_s")
        panels[0].set_title("7B, 4 requests of 8k:\ntokens decoded per second", loc="left", fontsize=10)
        _most_served(panels[1], rows)
        panels[1].set_title("13B, up to 32k: most\nrequests served", loc="left", fontsize=10)
        _bars(panels[2], [row for row in rows if row["key"] == MIXED], "between_p99_ms")
        panels[2].set_title("8 requests arriving: ms\nbetween tokens, p99", loc="left", fontsize=10)
        figure.suptitle(_about(rows), x=0.005, ha="left", fontsize=8, color=QUIET)
        return save(figure, path.with_name(f"{path.stem}-comparison.svg"))


def _bars(axes: Any, rows: Sequence[records.Row], column: str) -> None:
    """A bar per contestant, or why there is none."""
    _labelled(
        axes,
        [
            (
                row["who"],
                float(row[column] or 0),
                f"{float(row[column]):,.0f}" if row[column] else row["status"],
            )
            for row in rows
            if row["status"] not in ("unavailable", figures.SKIPPED)
        ],
    )


def _most_served(axes: Any, rows: Sequence[records.Row]) -> None:
    """The largest number of requests that each contestant served, and where it was out of memory."""
    found = []
    ladder = [row for row in rows if row["key"].startswith("13b-32k-")]
    for who in dict.fromkeys(row["who"] for row in ladder):
        own = [row for row in ladder if row["who"] == who and row["status"] in ("ok", "out of memory")]
        if own:
            served = max((int(row["requests"]) for row in own if row["status"] == "ok"), default=0)
            full = any(row["status"] == "out of memory" for row in own)
            found.append((who, float(served), f"{served}, then out of memory" if full else f"{served}"))
    _labelled(axes, found)


def _labelled(axes: Any, bars: Sequence[tuple[str, float, str]]) -> None:
    for place, (who, height, text) in enumerate(bars):
        axes.barh(place, height, 0.7, color=COLOURS[who])
        axes.annotate(text, (height, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    names = [tables.NAMES[who].replace(", ", ",\n").replace("' ", "'\n") for who, _, _ in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, max((height for _, height, _ in bars), default=1) * 1.9 or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _plain(value: float, _: int) -> str:
    """Milliseconds as people write them, at 1, 2 and 5 of each power of ten."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _style(who: str) -> dict[str, Any]:
    return {"label": tables.NAMES[who], "color": COLOURS[who], "linewidth": 2 if who == "quire" else 1.4}


def _about(rows: Sequence[records.Row], *, named: bool = False) -> str:
    if not rows:
        return "nothing was measured"
    said = re.sub(r"( avx\w+| amx\w+)+", "", tables.origin(rows).strip("*")).replace("; ", "\n", 1)
    return f"{rows[0]['case']}\n{said}" if named else said
