"""`quire bench`: the checkout's benchmarks behind the command line's own manners."""

from __future__ import annotations

import pytest

import quire
from benchmarks import records
from quire import cli


def test_a_tiny_case_runs_and_writes_its_rows(capsys, tmp_path):
    arguments = ["2x9:1", "--heads", "4/2x16", "--rounds", "2", "--peers", "quire", "sdpa, contiguous"]
    assert cli.run(["bench", "attention", *arguments, "--out", str(tmp_path / "mine.csv")]) == 0
    out = capsys.readouterr().out
    assert "2x9:1" in out
    assert "sdpa, contiguous" in out
    assert [row["who"] for row in records.read(tmp_path / "mine.csv")][:2] == ["quire", "sdpa, contiguous"]


@pytest.mark.parametrize("command", ["attention", "generation"])
def test_help_has_examples_under_the_name_that_was_typed(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.run(["bench", command, "--help"])
    assert ended.value.code == 0
    assert f"quire bench {command} " in capsys.readouterr().out


def test_help_of_the_whole_names_both(capsys):
    assert cli.run(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "quire bench attention 8x2k:1" in out
    assert "quire bench generation 8x16-256:64" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attention", "8x2k"], "case must look like 8x2048:1"),
        (["attention", "--wings"], "unrecognized arguments: --wings"),
        (["generation", "8x2k"], "requests must look like"),
    ],
)
def test_bad_input_is_one_sentence_with_its_fix(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        cli.run(["bench", *arguments])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in err
    assert f"Fix: see quire bench {arguments[0]} --help" in err
    assert err.count("\n") == 1


def test_a_package_without_its_repository_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(quire, "__file__", str(tmp_path / "site/a/quire/__init__.py"))
    assert cli.run(["bench", "attention"]) == 2
    assert "must run in a checkout of Quire" in capsys.readouterr().err
