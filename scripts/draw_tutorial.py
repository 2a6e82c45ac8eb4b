"""Draw the pictures of docs/tutorial.md: texts in a contiguous cache, on pages, and on shared pages.

Example:
    python scripts/draw_tutorial.py        # writes docs/images/contiguous.svg, paged.svg and shared.svg

The page tables are those that a PageTable gives for the tutorial's own calls. The pictures stand on a light card
of their own, so that they are legible on light and dark pages.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import quire

IMAGES = Path(__file__).parents[1] / "docs/images"
WIDTH, CELL, PAGE_SIZE = 830, 18, 4
CARD, INK, QUIET, LINE, EMPTY = "#fbfaf7", "#2b2b2b", "#6b6b6b", "#8a8a8a", "#ffffff"
FILL = {"a": "#d9737f", "b": "#e3b85a", "c": "#7fa3c4"}
GROWTH = (("a", 5), ("b", 3), ("a", 3), ("c", 6), ("a", 2), ("b", 2))  # as in the tutorial


def text(x: float, y: float, words: str, *, size: int = 12, colour: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


def cells(x: float, y: float, fills: list[str]) -> list[str]:
    """Slots side by side."""
    return [
        f'<rect x="{x + CELL * i:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="{LINE}" '
        f'stroke-width="0.6"/>'
        for i, fill in enumerate(fills)
    ]


def page(x: float, y: float, number: int, fills: list[str]) -> list[str]:
    """A page: its slots in a frame, its number above."""
    frame = (
        f'<rect x="{x:g}" y="{y:g}" width="{CELL * PAGE_SIZE}" height="{CELL}" fill="none" stroke="{INK}" '
        f'stroke-width="1.6"/>'
    )
    return [*cells(x, y, fills), frame, text(x, y - 4, f"page {number}", size=11, colour=QUIET)]


def grown() -> quire.PageTable:
    """The tutorial's three texts."""
    table = quire.PageTable(quire.PageAllocator(12), PAGE_SIZE)
    for name, tokens in GROWTH:
        if name not in table.seq_ids:
            table.add(name)
        table.append(name, tokens)
    return table


def contiguous() -> tuple[int, list[str]]:
    """A tensor per text, as long as the longest that may come."""
    table, reserved = grown(), 32
    parts = [
        text(
            20, 30, f"A tensor of {reserved} slots for each text; nobody else may use what is empty.", size=14
        )
    ]
    for row, name in enumerate("abc"):
        y, length = 48 + 34 * row, table.length(name)
        parts += [text(20, y + 14, name, size=14)]
        parts += cells(44, y, [FILL[name]] * length + [EMPTY] * (reserved - length))
        parts += [
            text(
                44 + CELL * reserved + 12,
                y + 14,
                f"{length} tokens, {reserved - length} slots empty",
                colour=QUIET,
            )
        ]
    return 160, parts


def paged() -> tuple[int, list[str]]:
    """Page tables on the left, the pool on the right."""
    table = grown()
    parts = [text(20, 30, "page tables", size=14), text(300, 30, "the pool: 12 pages of 4 slots", size=14)]
    owner: dict[int, tuple[str, int]] = {}
    for row, name in enumerate("abc"):
        pages, length = table.pages(name), table.length(name)
        y = 52 + 40 * row
        parts += [text(20, y + 19, f"{name}, {length} tokens", size=13)]
        for i, number in enumerate(pages):
            owner[number] = (name, min(PAGE_SIZE, length - PAGE_SIZE * i))
            parts += [
                f'<rect x="{120 + 40 * i}" y="{y}" width="34" height="28" rx="4" fill="{FILL[name]}" stroke="{LINE}"/>',
                text(137 + 40 * i, y + 19, str(number), size=14, anchor="middle"),
            ]
    for number in range(12):
        name, used = owner.get(number, ("", 0))
        fills = [FILL[name]] * used + [EMPTY] * (PAGE_SIZE - used) if name else [EMPTY] * PAGE_SIZE
        parts += page(300 + 130 * (number % 4), 60 + 44 * (number // 4), number, fills)
    parts += [
        text(
            300,
            196,
            "White slots of a coloured page are the only ones that are reserved and empty.",
            colour=QUIET,
        )
    ]
    return 212, parts


def shared() -> tuple[int, list[str]]:
    """A fork before and after its first own token."""
    table = quire.PageTable(quire.PageAllocator(12), PAGE_SIZE)
    table.add("a")
    table.append("a", 10)
    table.fork("a", "b")
    before = {name: table.pages(name) for name in "ab"}
    ((source, copy),) = table.append("b", 1).copies
    after = {name: table.pages(name) for name in "ab"}
    parts: list[str] = []
    for left, title, tables in (
        (20, "forked: both own the same pages", before),
        (430, f"b writes: page {source} is copied to {copy}", after),
    ):
        parts += [text(left, 30, title, size=14)]
        numbers = sorted({number for pages in tables.values() for number in pages})
        for i, number in enumerate(numbers):
            owners = [name for name in "ab" if number in tables[name]]
            used = PAGE_SIZE if number < source else 3 if owners == ["b"] else 2
            fills = [FILL[owners[0]]] * used + [EMPTY] * (PAGE_SIZE - used)
            if len(owners) == 2:
                fills = [FILL["c"] if fill != EMPTY else fill for fill in fills]
            x = left + 92 * i
            parts += page(x, 62, number, fills)
            parts += [text(x, 98, " and ".join(owners), colour=QUIET)]
    parts += [
        text(20, 126, "Blue: owned twice, stored once. Red is a's alone, yellow b's alone.", colour=QUIET)
    ]
    return 142, parts


PICTURES = {
    "contiguous": (contiguous, "Three texts in a contiguous cache: most of the reserved slots are empty"),
    "paged": (paged, "The same three texts on pages: their page tables, and the pool that they share"),
    "shared": (shared, "A fork shares all pages; the first write into a shared page copies that page"),
}


def svg(height: int, parts: list[str], title: str) -> str:
    """The picture as a file's text."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'font-family="sans-serif" role="img" aria-label="{escape(title)}">',
            f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{CARD}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def main() -> int:
    """Write all three; the exit code is 0."""
    for name, (picture, title) in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(svg(*picture(), title), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
