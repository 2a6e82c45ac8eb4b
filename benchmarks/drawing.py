"""How plots look: panels of bars as wide as a page on GitHub, legible on light and dark. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # after the choice of a backend that needs no screen

WIDTH = 8.6  # inches of 72 points: 826 pixels, where a point of type is a third larger than a pixel
PAPER, INK, QUIET = "#ffffff", "#333333", "#6b6b6b"
_AT_NIGHT = {PAPER: "#0d1117", INK: "#e6e6e6", QUIET: "#a3abb3"}
OURS, OURS_DARKER, OURS_LIGHTER, OURS_LIGHTEST = "#d1495b", "#a83248", "#e07a86", "#e9a3ab"
PEERS = ("#7f93a6", "#a3b1bd", "#5f7c96", "#c2a24f", "#a98526", "#6f9f7c")
WHISKERS = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8}
STYLE = {
    "svg.fonttype": "none",  # words stay words: small files, and a reader can search them
    "svg.hashsalt": "quire",  # the same rows draw the same file
    "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET,
    "figure.facecolor": PAPER, "axes.facecolor": "none", "savefig.facecolor": PAPER,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """What one contestant needs for a case: a length, the bounds of its middle rounds, and the words behind it."""

    who: str
    length: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One case: a bar per contestant that has it, and the time that a ceiling of the machine would take."""

    title: str
    bars: tuple[Bar, ...]
    ceiling: float | None = None


def panels(
    found: Sequence[Panel], colours: dict[str, str], *, title: str, about: str, columns: int = 3
) -> Any:
    """A figure of panels, each with its own scale: a shorter bar is a shorter time.

    A bar of more than four times the panel's shortest ends there, marked as cut; its words hold the whole figure.

    Args:
        found: the panels, row by row. Contestants lie at the same height in all of them.
        colours: of every contestant by name, in the order in which they lie.
    """
    who = [name for name in colours if any(bar.who == name for panel in found for bar in panel.bars)]
    rows = max(1, -(-len(found) // columns))
    size = (WIDTH, 0.8 + rows * (0.45 + 0.19 * max(1, len(who))))
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number < len(found):
            _panel(axes, found[number], who, colours, named=number % columns == 0)
        else:
            axes.axis("off")
    room = "\n" * (1 + about.count("\n"))  # for the smaller words below the title
    figure.suptitle(f"{title}{room}", x=0.005, ha="left", fontsize=11, weight="bold")
    figure.text(0.005, 1 - 0.3 / size[1], about, ha="left", va="top", fontsize=8, color=QUIET)
    return figure


def _panel(axes: Any, panel: Panel, who: Sequence[str], colours: dict[str, str], *, named: bool) -> None:
    limit = min(
        max((bar.high for bar in panel.bars), default=1),
        4 * min((bar.length for bar in panel.bars), default=1),
    )
    for bar in panel.bars:
        place, length = who.index(bar.who), min(bar.length, limit)
        cut = bar.length > limit
        between = None if cut else [[bar.length - bar.low], [bar.high - bar.length]]
        axes.barh(place, length, 0.78, color=colours[bar.who], xerr=between, error_kw=WHISKERS)
        if cut:
            axes.annotate("//", (0.9 * limit, place), va="center", ha="center", color=PAPER, weight="bold")
        end = length if cut else min(bar.high, 1.25 * limit)
        axes.annotate(bar.text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
                      bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},  # over the dashed line
                      weight="bold" if bar.who.startswith("Quire") else "normal")  # fmt: skip
    if panel.ceiling is not None:
        axes.axvline(panel.ceiling, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_title(panel.title, loc="left", fontsize=9)
    axes.set_yticks(range(len(who)), who if named else [""] * len(who), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(who) - 0.5, -0.5)
    axes.set_xlim(0, 1.5 * limit)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def save(figure: Any, path: Path) -> Path:
    """Write the figure as one SVG, whose paper and ink follow the reader's choice of light or dark."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    path.write_text(_with_night(text.getvalue()), encoding="utf-8")
    return path


def _with_night(svg: str) -> str:
    """Matplotlib writes each colour beside its shape; at night a rule by that colour puts another in its place."""
    rules = "".join(
        f'[style*="{what}: {day}"]{{{what}:{night} !important}}'
        for day, night in _AT_NIGHT.items()
        for what in ("fill", "stroke")
    )
    return svg.replace("</style>", f"@media (prefers-color-scheme:dark){{{rules}}}</style>", 1)
