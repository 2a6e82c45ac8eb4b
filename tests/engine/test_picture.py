"""The picture of a snapshot: its areas are the pages that the snapshot counts, at every size of pool."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

import pytest

from quire.engine import Engine, SamplingParams
from quire.engine.picture import COLOURS, LARGEST, MARGIN, TALLEST, WIDTH, colour_of, layout
from quire.engine.snapshot import MAX_CELLS, take

from .fakes import FakeModel
from .test_snapshot import busy_engine

SVG = "{http://www.w3.org/2000/svg}"


def areas(svg: str) -> dict[str, float]:
    """The area of each path, by its class or colour."""
    found = defaultdict(float)
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        for width, height in re.findall(r"h([\d.]+)v([\d.]+)h-", path.get("d")):
            found[path.get("class") or path.get("fill")] += float(width) * float(height)
    return found


@pytest.mark.parametrize("max_cells", [4096, 8])
def test_areas_are_the_numbers_of_pages(max_cells):
    engine = busy_engine()
    for _ in range(7):
        engine.step()
    found = take(engine, max_cells=max_cells)
    drawn = areas(found.svg())
    pages = {kind: drawn[kind] for kind in ("free", "cached", "shared", "others")}
    pages["owned"] = sum(area for kind, area in drawn.items() if kind in COLOURS)
    _, side = layout(len(found.cells))
    last = found.num_pages - found.pages_per_cell * (len(found.cells) - 1)
    if last == found.pages_per_cell:
        unit = side * side / found.pages_per_cell
        expected = {
            "free": found.num_free, "cached": found.num_cached, "shared": found.num_shared,
            "others": found.num_others,
            "owned": found.num_owned - found.num_shared - found.num_others,
        }  # fmt: skip
        assert {kind: area / unit for kind, area in pages.items()} == pytest.approx(expected, rel=0.01)
        assert drawn["unused"] / unit == pytest.approx(found.unused_slots / found.page_size, rel=0.02)
    assert sum(pages.values()) == pytest.approx(side * side * len(found.cells), rel=0.01)


def test_pages_of_a_request_have_its_colour_and_figures_are_in_words():
    engine = Engine(FakeModel(num_pages=30))
    for i in range(3):
        engine.add_request([i] * (4 * i + 1), SamplingParams(max_tokens=5))
    engine.step()
    svg = engine.snapshot().svg()
    drawn, (_, side) = areas(svg), layout(30)
    for i in range(3):
        assert drawn[colour_of(i)] / side**2 == pytest.approx(i + 1, rel=0.01)
    words = " ".join(text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text"))
    assert "30 pages of 4 tokens" in words
    assert "6 owned (0 shared) · 0 cached · 24 free" in words
    assert "request 2: running, 9 prompt tokens (0 found), 1 new, 3 pages" in words
    assert "3 running, 0 waiting" in words


def test_requests_beyond_those_named_are_counted_and_dark_pages_have_colours_of_their_own():
    engine = Engine(FakeModel())
    for i in range(11):
        engine.add_request([i])
    engine.step()
    snapshot = engine.snapshot()
    assert snapshot._repr_svg_() == snapshot.svg()
    assert "and 3 more requests" in snapshot.svg()
    assert "prefers-color-scheme:dark" in snapshot.svg()


@pytest.mark.parametrize("num_cells", [1, 2, 39, 200, 1000, MAX_CELLS])
def test_all_cells_fit_the_card(num_cells):
    columns, side = layout(num_cells)
    rows = -(-num_cells // columns)
    assert 2 < side <= LARGEST
    assert columns * (side + 2) - 2 <= WIDTH - 2 * MARGIN + 0.5
    assert rows * (side + 2) <= TALLEST * 1.15


def test_a_pool_of_a_million_pages_is_a_picture_of_bounded_size():
    engine = Engine(FakeModel(num_pages=1_000_001, page_size=1))
    engine.add_request([1] * 1000)
    engine.step()
    found = engine.snapshot()
    assert (
        found.pages_per_cell * (len(found.cells) - 1) < 1_000_001 <= found.pages_per_cell * len(found.cells)
    )
    assert sum(cell.owned for cell in found.cells) == 1000
    svg = found.svg()
    ElementTree.fromstring(svg)
    assert len(svg) < 300_000
