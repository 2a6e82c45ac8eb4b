"""The cases of other shapes change one thing at a time, and are comparable with one another where they say so."""

from __future__ import annotations

import sys

import pytest
import torch

import quire
from benchmarks import attention, records, report, shapes
from benchmarks.cases import parse_case
from quire.spec import COMPUTE_DTYPES, QUANTIZED_DTYPES

USUAL = quire.AttentionSpec(32, 8, 128, 16, torch.bfloat16)


NAMES = [name for text in shapes.CASES for name in text.split(",")]


def tokens(case: str) -> int:
    return sum(parse_case(case, USUAL).seq_lens)


def test_every_case_changes_heads_or_head_dim_or_page_size_or_dtype_and_nothing_else():
    specs = [parse_case(case, USUAL).spec for case in NAMES if case.startswith("8x2k:1@")]
    for spec in specs:
        heads = (spec.num_qo_heads, spec.num_kv_heads) != (32, 8)
        dtype = spec.dtype != torch.bfloat16
        assert heads + dtype + (spec.head_dim != 128) + (spec.page_size != 16) == 1
    assert {spec.group_size for spec in specs} == {1, 4, 8, 32}
    assert {spec.head_dim for spec in specs} == {64, 96, 128, 256}
    assert {spec.page_size for spec in specs} == {1, 8, 16, 64, 256}


def test_pages_of_every_dtype_are_measured_here_or_by_the_readmes_cases():
    specs = [parse_case(case, USUAL).spec for case in [*NAMES, *attention.DEFAULT_CASES]]
    assert {spec.kv_dtype for spec in specs} == {None, *QUANTIZED_DTYPES}
    assert {spec.dtype for spec in specs} == set(COMPUTE_DTYPES)


def test_what_is_compared_takes_turns():
    for case, others in shapes.COMPARISONS.items():
        assert any({case, *others} <= set(text.split(",")) for text in shapes.CASES)


def test_a_mixed_step_has_its_parts_beside_it_and_a_skewed_one_as_many_tokens():
    mixed = next(case for case in NAMES if ":512+" in case)
    assert shapes.COMPARISONS[mixed] == mixed.split("+")
    skewed = next(case for case in NAMES if case.startswith("1x16k"))
    [even] = shapes.COMPARISONS[skewed]
    assert tokens(skewed) == tokens(even)
    assert len(parse_case(skewed, USUAL).seq_lens) == len(parse_case(even, USUAL).seq_lens)


def test_the_committed_rows_are_of_those_cases():
    assert {row["case"] for row in records.read(report.SHAPES)} == set(NAMES)


def test_options_given_override_its_own(monkeypatch, tmp_path):
    out = tmp_path / "shapes.csv"
    monkeypatch.setattr(shapes, "CASES", ["2x9:1@4/2x16", "2x9:1@4/2x16@page4"])
    monkeypatch.setattr(sys, "argv", ["shapes", "--rounds", "2", "--out", str(out)])
    assert shapes.main() == 0
    ours = [row for row in records.read(out) if row["who"] == "quire"]
    assert [(row["heads"], row["page_size"], row["rounds"]) for row in ours] == [
        ("4/2x16", "16", "2"),
        ("4/2x16", "4", "2"),
    ]
    assert {row["who"] for row in records.read(out)} >= set(shapes.PEERS)


def test_its_rows_name_its_own_command_which_measures_as_many_rounds_again(monkeypatch, tmp_path):
    out = tmp_path / "shapes.csv"
    monkeypatch.setattr(shapes, "CASES", ["2x9:1@4/2x16"])
    monkeypatch.setattr(sys, "argv", ["shapes", "--out", str(out)])
    assert shapes.main() == 0
    rows = records.read(out)
    assert {row["command"] for row in rows} == {"python -m benchmarks.shapes --out PATH"}
    assert {row["rounds"] for row in rows} == {str(attention.parse_args([], "").rounds)}


def test_its_help_is_the_runners(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shapes", "--help"])
    with pytest.raises(SystemExit):
        shapes.main()
    assert "python -m benchmarks.shapes" in capsys.readouterr().out
    assert attention.DEFAULT_CASES[0] == NAMES[0]
