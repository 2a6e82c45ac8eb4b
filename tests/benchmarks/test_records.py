"""Rows survive the file; a long table can be measured in pieces."""

from __future__ import annotations

import pytest

from benchmarks import environment, records


def row(case: str, value: str) -> records.Row:
    return {"case": case, "who": "quire, paged", "status": 'said "no"\nand ended', "value": value}


def test_rows_come_back_as_they_went(tmp_path):
    rows = [row("8x2k:1", "1.5"), row("1x8k:1", "")]
    records.write(tmp_path / "new" / "cpu.csv", rows)
    assert records.read(tmp_path / "new" / "cpu.csv") == rows


def test_pieces_replace_their_own_cases_only(tmp_path):
    path = tmp_path / "cpu.csv"
    records.write(path, [row("a", "1"), row("a", "2"), row("b", "3")])
    records.write(path, [row("a", "4")], replace=False)
    assert [(r["case"], r["value"]) for r in records.read(path)] == [("b", "3"), ("a", "4")]
    records.write(path, [row("c", "5")])
    assert [r["case"] for r in records.read(path)] == ["c"]


def test_pieces_with_other_columns_are_refused(tmp_path):
    path = tmp_path / "cpu.csv"
    records.write(path, [row("a", "1")])
    with pytest.raises(ValueError, match="fields"):
        records.write(path, [{"case": "b", "value": "1"}], replace=False)


def test_facts_name_machine_versions_commit_and_command():
    facts = environment.facts(
        environment.command_line("benchmarks.attention", ["8x2k:1", "--out", "/home/me/x.csv"])
    )
    assert facts["command"] == "python -m benchmarks.attention 8x2k:1 --out PATH"
    assert "-core" in facts["machine"]
    assert all(name in facts["versions"] for name in ("python", "torch", "numba", "quire"))
    assert facts["commit"]
    assert facts["threads"].isdigit()


def test_a_working_set_lies_in_the_nearest_cache_it_fits(monkeypatch):
    monkeypatch.setattr(environment, "cache_bytes", lambda: {"L1": 100, "L2": 1000, "L3": 50_000})
    assert [environment.level_of(n) for n in (100, 101, 50_000, 50_001)] == ["L1", "L2", "L3", "memory"]
    monkeypatch.setattr(environment, "cache_bytes", dict)
    assert environment.level_of(1) == "unknown"
