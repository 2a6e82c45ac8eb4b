"""The README's figures are the committed measurements, to the letter."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks.environment import ROOT
from benchmarks.gpu.markdown import short_table


@pytest.mark.parametrize("name", ["attention", "generation"])
def test_the_tables_in_the_readme_are_made_from_the_committed_csv(name):
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- bench: {name} -->\n\n{report.tables()[name]}\n\n<!-- end -->" in readme


def test_the_gpu_tables_are_those_of_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    for name, title in (("h100", "H100"), ("h200", "H200, older code")):
        assert short_table(ROOT / f"benchmarks/results/gpu-{name}.csv", title) in readme
