"""The figures of docs/quantization.md are the committed measurements, to the letter."""

from pathlib import Path

from benchmarks.quantization_report import tables

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_are_made_from_the_committed_csv():
    page = (ROOT / "docs/quantization.md").read_text(encoding="utf-8")
    assert tables(ROOT / "benchmarks/results/quantization.csv") in page
