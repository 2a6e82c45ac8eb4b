"""The figures in the README and in docs/benchmarks.md are the committed measurements, to the letter."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks.environment import ROOT
from benchmarks.gpu.markdown import short_table


@pytest.mark.parametrize("page", report.tables(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_made_from_the_committed_csv(page):
    text = page.read_text()
    for name, table in report.tables()[page].items():
        assert f"<!-- bench: {name} -->\n\n{table}\n\n<!-- end -->" in text


def test_the_gpu_tables_are_those_of_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    for name, title in (("h100", "H100"), ("h200", "H200")):
        assert short_table(ROOT / f"benchmarks/results/gpu-{name}.csv", title) in readme
