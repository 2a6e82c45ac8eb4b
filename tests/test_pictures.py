"""The pictures of docs/engine.md are those that the script draws, and their words fit."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/draw_engine.py")))


@pytest.mark.parametrize("name", SCRIPT.PICTURES)
def test_the_committed_picture_is_what_the_script_draws(name):
    picture, title = SCRIPT.PICTURES[name]
    assert (SCRIPT.IMAGES / f"{name}.svg").read_text(encoding="utf-8") == SCRIPT.svg(*picture(), title)


@pytest.mark.parametrize("name", SCRIPT.PICTURES)
def test_words_fit_into_their_boxes_and_everything_onto_the_card(name):
    height, boxes, arrows = SCRIPT.PICTURES[name][0]()
    for box in boxes:
        assert box.x >= 0
        assert box.x + box.width <= SCRIPT.WIDTH
        assert box.y + box.height <= height
        assert len(box.name) * 0.66 * SCRIPT.SIZE <= box.width
        assert all(len(line) * 0.56 * SCRIPT.SMALL <= box.width for line in box.lines)
        assert box.y + 45 + 16 * (len(box.lines) - 1) < box.y + box.height
    for arrow in arrows:
        assert all(0 <= x <= SCRIPT.WIDTH and 0 <= y <= height for x, y in arrow.points)
        half = max((len(line) for line in arrow.lines), default=0) * 0.28 * SCRIPT.SMALL
        if arrow.anchor == "middle":
            assert not arrow.lines or half <= arrow.label[0] <= SCRIPT.WIDTH - half
