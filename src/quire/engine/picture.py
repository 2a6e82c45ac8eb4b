"""A snapshot as a picture, in SVG."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.engine.snapshot import Cell, RequestPages, Snapshot

WIDTH = 830
MARGIN, GAP = 20, 2
LARGEST, TALLEST = 20, 330  # units: of a cell, and of all cells together
NAMED = 8  # requests that the picture names
# Each is told from the ground of its card and from its neighbours by lightness too, for eyes that see fewer hues.
COLOURS = ("#e08a1e", "#3b93d1", "#2a9d6a", "#b8a010", "#8568d8", "#d9483b", "#c96a97", "#8a7f72")
SHARED, OTHERS, CACHED, FREE, UNUSED = "shared", "others", "cached", "free", "unused"
# The picture stands on a card of its own, so that it is legible wherever it is put.
STYLE = """
.quire-pages .card{fill:#fbfaf7;stroke:#d8d4cc}
.quire-pages text{font-family:system-ui,sans-serif;font-size:13px;fill:#2b2b2b}
.quire-pages .title{font-size:15px;font-weight:600}
.quire-pages .quiet{fill:#5f5f5f}
.quire-pages .free{fill:#e6e3dc}
.quire-pages .cached{fill:#a9b4be}
.quire-pages .shared{fill:#2b2b2b}
.quire-pages .others{fill:#8a5a2b}
.quire-pages .unused{fill:#fbfaf7;fill-opacity:.72}
@media (prefers-color-scheme:dark){
.quire-pages .card{fill:#1b1d20;stroke:#3a3d42}
.quire-pages text{fill:#e8e6e3}
.quire-pages .quiet{fill:#a8a8a8}
.quire-pages .free{fill:#2d3035}
.quire-pages .cached{fill:#66717c}
.quire-pages .shared{fill:#f2f2f2}
.quire-pages .others{fill:#c08a50}
.quire-pages .unused{fill:#1b1d20;fill-opacity:.72}
}
"""


def colour_of(request_id: int) -> str:
    """The colour of a request's own pages."""
    return COLOURS[request_id % len(COLOURS)]


def draw(snapshot: Snapshot) -> str:
    """A snapshot as SVG, 830 units wide: the pool cell by cell, a legend, figures and requests; at most 300 KB."""
    columns, side = layout(len(snapshot.cells))
    rows = -(-len(snapshot.cells) // columns)
    top = 46
    bottom = top + rows * (side + GAP)
    lines = [_figures(snapshot), _speeds(snapshot)]
    named = snapshot.requests[:NAMED]
    height = (
        bottom + 62 + 20 * (len(lines) + len(named) + (snapshot.num_running + snapshot.num_waiting > NAMED))
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="quire-pages" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="The pages of the pool and who owns them">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        _text(MARGIN, 28, _title(snapshot), "title"),
        *_cells(snapshot, columns, side, top),
    ]
    y = bottom + 22
    parts += _legend(y)
    for line in lines:
        y += 22
        parts.append(_text(MARGIN, y, line))
    y += 6
    for request in named:
        y += 20
        parts.append(
            f'<rect x="{MARGIN}" y="{y - 10}" width="11" height="11" fill="{colour_of(request.request_id)}"/>'
        )
        parts.append(_text(MARGIN + 18, y, _request(request)))
    left = snapshot.num_running + snapshot.num_waiting - len(named)
    if left:
        parts.append(_text(MARGIN + 18, y + 20, f"and {left} more requests", "quiet"))
    return "\n".join([*parts, "</svg>"])


def layout(num_cells: int) -> tuple[int, float]:
    """Columns, and the side of a square cell, so that all cells fit the card."""
    width = WIDTH - 2 * MARGIN
    side = min(LARGEST, math.sqrt(width * TALLEST / num_cells) - GAP)
    columns = int((width + GAP) // (side + GAP))
    return columns, math.floor(((width + GAP) / columns - GAP) * 100) / 100


def _cells(snapshot: Snapshot, columns: int, side: float, top: int) -> list[str]:
    """One path for all cells of a colour; a cell of several pages is a stack of their kinds."""
    paths: dict[str, list[str]] = defaultdict(list)
    last = len(snapshot.cells) - 1
    for place, cell in enumerate(snapshot.cells):
        row, column = divmod(place, columns)
        x, y = MARGIN + column * (side + GAP), top + row * (side + GAP)
        pages = (
            snapshot.pages_per_cell if place < last else snapshot.num_pages - last * snapshot.pages_per_cell
        )
        for kind, share in _kinds(cell, pages):
            paths[kind].append(f"M{x:.4g} {y:.5g}h{side:g}v{side * share:.4g}h-{side:g}z")
            y += side * share
        held = cell.owned + cell.shared
        if held and cell.unused:  # slots without a token: paler, from the top of the engine's own pages down
            share = cell.unused / (pages * snapshot.page_size)
            y = top + row * (side + GAP)
            paths[UNUSED].append(f"M{x:.4g} {y:.5g}h{side:g}v{side * share:.4g}h-{side:g}z")
    order = sorted(paths, key=lambda kind: kind == UNUSED)
    return [
        f'<path {"fill" if kind.startswith("#") else "class"}="{kind}" d="{"".join(paths[kind])}"/>'
        for kind in order
    ]


def _kinds(cell: Cell, pages: int) -> list[tuple[str, float]]:
    """What fills a cell, from the top down, with its share of the cell."""
    counts = [
        (colour_of(cell.owner) if cell.owner >= 0 else OTHERS, cell.owned),
        (SHARED, cell.shared),
        (OTHERS, cell.others),
        (CACHED, cell.cached),
        (FREE, pages - cell.owned - cell.shared - cell.others - cell.cached),
    ]
    return [(kind, count / pages) for kind, count in counts if count > 0]


def _legend(y: float) -> list[str]:
    parts, x = [], MARGIN
    for kind, name, width in (
        (COLOURS[0], "owned, a colour per request", 212), (SHARED, "shared", 78), (CACHED, "cached", 80),
        (FREE, "free", 60), (OTHERS, "owned by others", 138), (UNUSED, "pale: slots without a token", 0),
    ):  # fmt: skip
        attribute = "fill" if kind.startswith("#") else "class"
        if kind == UNUSED:
            parts.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{COLOURS[0]}"/>')
        parts.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" {attribute}="{kind}"/>')
        parts.append(_text(x + 16, y, name, "quiet"))
        x += width
    return parts


def _title(snapshot: Snapshot) -> str:
    several = f", {snapshot.pages_per_cell} in a cell" if snapshot.pages_per_cell > 1 else ""
    return f"{snapshot.num_pages:,} pages of {snapshot.page_size} tokens{several}"


def _figures(snapshot: Snapshot) -> str:
    waste = f"{100 * snapshot.unused_slots / snapshot.held_slots:.1f} %" if snapshot.held_slots else "none"
    parts = [
        f"{snapshot.num_owned:,} owned ({snapshot.num_shared:,} shared)",
        f"{snapshot.num_cached:,} cached",
        f"{snapshot.num_free:,} free",
        f"unused slots {waste}",
    ]
    if snapshot.num_host_pages:
        parts.append(f"{snapshot.num_swapped:,} with a copy on the host")
    if len(snapshot.group_pages) > 1:
        parts.append("by group " + " + ".join(f"{count:,}" for count in snapshot.group_pages))
    return " · ".join(parts)


def _speeds(snapshot: Snapshot) -> str:
    parts = [
        f"{snapshot.num_running:,} running, {snapshot.num_waiting:,} waiting",
        f"{snapshot.tokens_per_second:,.0f} tokens/s",
        f"{100 * snapshot.hit_rate:.0f} % of tokens found in pages",
    ]
    if snapshot.first_token_seconds is not None:
        parts.append(f"first token {_ms(snapshot.first_token_seconds)}")
    if snapshot.between_tokens_seconds is not None:
        parts.append(f"then one each {_ms(snapshot.between_tokens_seconds)}")
    return " · ".join(parts)


def _request(request: RequestPages) -> str:
    return (
        f"request {request.request_id}: {request.state}, {request.prompt_tokens:,} prompt tokens "
        f"({request.cached_tokens:,} found), {request.generated_tokens:,} new, {request.pages:,} pages"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{text}</text>'
