"""A busy machine is named wherever something is measured, and one at rest is not."""

import os

import pytest

from quire import cli
from quire.cli import busy

# user nice system idle iowait irq softirq steal guest guest_nice
AT_REST = "cpu  100 0 50 1000 10 0 0 0 0 0\ncpu0 0"


def stat(*, user=0, idle=0, iowait=0, steal=0):
    return f"cpu  {100 + user} 0 50 {1000 + idle} {10 + iowait} 0 0 {steal} 0 0\ncpu0 0"


@pytest.fixture
def machine(monkeypatch):
    """Four cores whose /proc/stat reads as given, one text after the other."""

    def read(*texts, minute=2.5):
        left = list(texts)

        def read_text(path):
            if not left:
                raise OSError("no /proc here")
            return left.pop(0)

        monkeypatch.setattr(busy.Path, "read_text", read_text)
        monkeypatch.setattr(busy.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        if minute is None:
            monkeypatch.delattr(os, "getloadavg")
        else:
            monkeypatch.setattr(os, "getloadavg", lambda: (minute, 9.0, 9.0))

    return read


@pytest.mark.parametrize(
    ("change", "cores"),
    [
        ({"user": 30, "idle": 90}, 1.0),
        ({"steal": 30, "idle": 90}, 1.0),
        ({"iowait": 60, "idle": 60}, 0.0),
        ({"user": 120}, 4.0),
        ({}, None),
    ],
    ids=["one busy core", "another virtual machine", "a slow disk", "all busy", "a clock that stands still"],
)
def test_cores_at_work_are_those_of_a_moment(machine, change, cores):
    machine(AT_REST, stat(**change))
    assert busy.cores_used() == cores


def test_where_only_a_load_average_is_told_it_counts(machine):
    machine(minute=1.5)
    assert busy.cores_used() == 1.5


def test_where_nothing_is_told_nothing_is_said(machine):
    machine(minute=None)
    assert busy.cores_used() is None
    assert busy.warning() is None


def test_the_sentence_names_cores_and_load(machine):
    machine(AT_REST, stat(user=45, idle=75))
    text = busy.warning()
    assert "other programs use 1.5 of 4 cores (load average 2.5)" in text
    machine(AT_REST, stat(idle=120))
    assert busy.warning() is None


@pytest.mark.parametrize("text", ["this machine is busy: very", None])
def test_doctor_says_so(capsys, monkeypatch, text):
    monkeypatch.setattr("quire.cli.doctor.warning", lambda: text)
    monkeypatch.setattr("quire.cli.doctor.attention_error", lambda backend, spec: 0.0)
    assert cli.run(["doctor"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if " load " in line]
    assert (text or "no other program keeps a core busy") in line
    assert line.startswith("○" if text else "●")


def test_bench_says_so_beside_its_figures_and_of_none_where_there_are_none(capsys, monkeypatch):
    monkeypatch.setattr("quire.cli.bench.warning", lambda: "this machine is busy: very")
    with pytest.raises(SystemExit):
        cli.run(["bench", "attention", "--help"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("benchmarks.attention.main", lambda arguments, prog: 0)
    assert cli.run(["bench", "attention", "8x2k:1"]) == 0
    assert capsys.readouterr().err == "quire: this machine is busy: very\n"
