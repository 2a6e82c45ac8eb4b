"""Draw the pictures of docs/engine.md: the life of a request, and of a page.

Example:
    python scripts/draw_engine.py        # writes docs/images/request.svg and page.svg

They stand on a light card of their own, so that they are legible on light and dark pages.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs/images"
WIDTH = 830
CARD, INK, QUIET, LINE = "#fbfaf7", "#2b2b2b", "#6b6b6b", "#8a8a8a"
PLAIN, BUSY, KEPT, GONE = "#ffffff", "#f6d5d9", "#fbe9b8", "#e6e9ec"  # how a box is filled
SIZE, SMALL = 14, 12
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A state: its name, and what is true of it."""

    x: float
    y: float
    width: float
    height: float
    name: str
    lines: tuple[str, ...] = ()
    fill: str = PLAIN

    def at(self, side: str, share: float = 0.5) -> Point:
        """A point on an edge: left, right, top or bottom, so far along it."""
        x = {"left": self.x, "right": self.x + self.width}.get(side, self.x + share * self.width)
        y = {"top": self.y, "bottom": self.y + self.height}.get(side, self.y + share * self.height)
        return x, y


@dataclass(frozen=True)
class Arrow:
    """A change from one state to another, along points, and the words beside it."""

    points: tuple[Point, ...]
    lines: tuple[str, ...] = ()
    label: Point = (0, 0)
    anchor: str = "middle"


def request() -> tuple[int, list[Box], list[Arrow]]:
    """From the call to the output; height, boxes and arrows."""
    call = Box(20, 60, 120, 78, "a call", ("a prompt and its", "SamplingParams"))
    waiting = Box(212, 60, 120, 78, "waiting", ("in the order", "of arrival"))
    prompt = Box(400, 60, 152, 78, "running", ("its prompt, in chunks", "of a step's budget"), BUSY)
    tokens = Box(
        616, 60, 194, 78, "running", ("one token a step for each", "of its n samples, all forks"), BUSY
    )
    output = Box(616, 206, 194, 62, "finished", ("output: stop or length",), GONE)
    ended = Box(212, 206, 332, 62, "ended", ("by abort, as its caller left, or by a failure",), GONE)
    step = Box(20, 312, 790, 62, "a step of the engine", (
        "choose chunks and pages  →  check a page  →  one forward, packed  →  choose tokens  →  "
        "hand out, wake who has news",))  # fmt: skip
    arrows = [
        Arrow((call.at("right"), waiting.at("left")), ("checked,", "encoded"), (176, 76)),
        Arrow((waiting.at("right"), prompt.at("left")), ("finds its", "prefix"), (366, 76)),
        Arrow((prompt.at("right"), tokens.at("left")), ("first", "token"), (584, 76)),
        Arrow((tokens.at("top"), (713, 30), (272, 30), waiting.at("top")),
              ("preempted: the pages go to an older request, the tokens are computed again later",), (492, 22)),
        Arrow((tokens.at("bottom"), output.at("top"))),
        Arrow((waiting.at("bottom"), (272, 206))),
        Arrow((prompt.at("bottom"), (476, 206))),
        Arrow((tokens.at("bottom", 0.2), (654.8, 172), (520, 172), (520, 206)),
              ("its pages go back",), (590, 190)),
    ]  # fmt: skip
    return 392, [call, waiting, prompt, tokens, output, ended, step], arrows


def page() -> tuple[int, list[Box], list[Arrow]]:
    """From free to free; height, boxes and arrows."""
    free = Box(20, 96, 120, 78, "free", ("its content is", "forgotten"))
    filling = Box(236, 96, 140, 78, "owned", ("not all of its slots", "are written"), BUSY)
    named = Box(
        600, 96, 200, 78, "owned and named", ("full; found by its tokens,", "never written again"), BUSY
    )
    cached = Box(600, 262, 200, 78, "cached", ("no owner;", "still found by its tokens"), KEPT)
    host = Box(236, 372, 310, 62, "free, with a copy on the host", ("still found by its tokens",), GONE)
    arrows = [
        Arrow((free.at("right"), filling.at("left")), ("a token", "needs a slot"), (188, 112)),
        Arrow((filling.at("right"), named.at("left")), ("full: its name is all tokens", "from the first to its last"),
              (488, 112)),
        Arrow((filling.at("bottom"), (306, 214), (80, 214), free.at("bottom")),
              ("its last owner ends or is preempted",), (193, 232)),
        Arrow((named.at("bottom", 0.4), cached.at("top", 0.4)), ("its last owner", "ends or is preempted"), (672, 214),
              "end"),
        Arrow((cached.at("top", 0.6), named.at("bottom", 0.6)), ("a hit: a prompt", "begins with it"), (728, 214),
              "start"),
        Arrow((cached.at("left"), (40, 301), free.at("bottom", 1 / 6)),
              ("evicted when its memory is needed:",
               "the longest unused first, the ends of texts before their beginnings"), (320, 276)),
        Arrow((cached.at("bottom", 0.4), (680, 391), (546, 391)), ("evicted,", "with swap_bytes"), (610, 366)),
        Arrow(((546, 415), (720, 415), cached.at("bottom", 0.6)),
              ("a hit: a page is taken,", "the copy comes back"), (728, 380), "start"),
        Arrow((named.at("top", 0.7), (740, 62), (660, 62), named.at("top", 0.3)),
              ("a hit or a fork: one more owner",), (700, 52)),
        Arrow((filling.at("top", 0.75), (341, 62), (271, 62), filling.at("top", 0.25)),
              ("a fork shares it: whoever writes", "first gets a copy of its own"), (306, 36)),
    ]  # fmt: skip
    return 452, [free, filling, named, cached, host], arrows


def svg(height: int, boxes: list[Box], arrows: list[Arrow], title: str) -> str:
    """The picture as a file's text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{CARD}"/>',
        f'<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker>',
    ]
    for arrow in arrows:
        points = " ".join(f"{x:g},{y:g}" for x, y in arrow.points)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
        parts += _text(arrow.label, arrow.lines, QUIET, anchor=arrow.anchor)
    for box in boxes:
        parts.append(
            f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="6" '
            f'fill="{box.fill}" stroke="{LINE}"/>'
        )
        middle = box.x + box.width / 2
        parts += _text((middle, box.y + 24), (box.name,), INK, size=SIZE, weight="bold")
        parts += _text((middle, box.y + 45), box.lines, INK)
    return "\n".join([*parts, "</svg>", ""])


def _text(
    at: Point,
    lines: tuple[str, ...],
    colour: str,
    *,
    size: int = SMALL,
    weight: str = "normal",
    anchor: str = "middle",
) -> list[str]:
    x, y = at
    return [
        f'<text x="{x:g}" y="{y + 16 * number:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]


PICTURES = {
    "request": (request, "The life of a request: waiting, running, finished"),
    "page": (page, "The life of a page: free, owned, named, cached"),
}


def main() -> int:
    """Write both; the exit code is 0."""
    for name, (picture, title) in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(svg(*picture(), title), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
