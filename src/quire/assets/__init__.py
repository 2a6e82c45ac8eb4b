"""What Quire ships beside its code."""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo_model"  # a Hugging Face folder; docs/demo-model.md is its card
PAGES_PAGE = Path(__file__).parent / "pages.html"  # the live picture of the pool, whole in one file
