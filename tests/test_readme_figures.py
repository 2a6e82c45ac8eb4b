"""The figures in the README and the docs are the committed measurements, to the letter."""

from __future__ import annotations

import pytest

from benchmarks import report


@pytest.mark.parametrize("page", report.tables(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_made_from_the_committed_csv(page):
    text = page.read_text(encoding="utf-8")
    for mark, table in report.tables()[page].items():
        assert f"<!-- {mark} -->\n\n{table}\n\n<!-- end -->" in text, (
            f"python -m benchmarks.report puts {mark}"
        )
