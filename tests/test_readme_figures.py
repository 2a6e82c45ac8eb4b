"""The README's figures are the committed measurements, to the letter."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import markdown_table

ROOT = Path(__file__).parent.parent


def test_the_table_in_the_readme_is_made_from_the_committed_csv():
    assert markdown_table(ROOT / "benchmarks/results/cpu.csv") in (ROOT / "README.md").read_text()
