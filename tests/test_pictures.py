"""The pictures of the docs are those that the scripts draw, and their words fit."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/draw_engine.py")))
TUTORIAL = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/draw_tutorial.py")))


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


@pytest.mark.parametrize("name", TUTORIAL.PICTURES)
def test_a_committed_picture_of_the_tutorial_is_what_the_script_draws(name):
    picture, title = TUTORIAL.PICTURES[name]
    assert (TUTORIAL.IMAGES / f"{name}.svg").read_text(encoding="utf-8") == TUTORIAL.svg(*picture(), title)


@pytest.mark.parametrize("name", TUTORIAL.PICTURES)
def test_everything_in_a_picture_of_the_tutorial_is_on_its_card(name):
    height, parts = TUTORIAL.PICTURES[name][0]()
    drawn = "".join(parts)
    for x, y, size, words in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" font-size="(\d+)"[^>]*>([^<]*)<', drawn
    ):
        assert float(x) + 0.56 * float(size) * len(words) <= TUTORIAL.WIDTH
        assert float(y) <= height
    for x, y, width, tall in re.findall(
        r'x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn
    ):
        assert float(x) + float(width) <= TUTORIAL.WIDTH
        assert float(y) + float(tall) <= height
