"""docs/features.md says what each backend serves as the backends' own checks say it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the GPU's checks need Triton")
def test_the_table_in_the_docs_is_what_the_checks_say():
    spec = importlib.util.spec_from_file_location("served_table", ROOT / "scripts/served_table.py")
    served_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served_table)
    assert served_table.BEGIN + served_table.table() + served_table.END in (
        ROOT / "docs/features.md"
    ).read_text(encoding="utf-8")
