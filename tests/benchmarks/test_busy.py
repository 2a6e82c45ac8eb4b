"""Little work beside a busy process: a row per call, number of threads and neighbour, and no neighbour left behind."""

from __future__ import annotations

import contextlib
import json
import os

import pytest

from benchmarks import busy, records

ATTENTION, DECODE = ("plan.run", busy.LITTLE), ("decode step", "8 prompts")


@pytest.fixture
def canned(monkeypatch):
    """Processes that answer at once: calls take longer on two threads."""
    asked = []

    def answer(threads, rounds):
        asked.append(threads)
        return [(ATTENTION, [threads * 1e-6] * rounds), (DECODE, [threads * 1e-3])]

    monkeypatch.setattr(busy, "in_a_process", answer)
    monkeypatch.setattr(busy, "busy_processes", lambda number: contextlib.nullcontext())
    monkeypatch.setattr(busy.torch, "get_num_threads", lambda: 2)
    return asked


def test_threads_take_turns_and_each_has_a_row_at_rest_and_beside_a_busy_process(canned, tmp_path, capsys):
    assert busy.main(["--rounds", "3", "--turns", "2", "--out", str(tmp_path / "busy.csv")]) == 0
    rows = records.read(tmp_path / "busy.csv")
    assert canned == [1, 2] * 4
    assert [(row["who"], row["threads"], row["beside"]) for row in rows] == [
        (who, threads, beside)
        for beside in ("at rest", "one busy process")
        for threads in "12"
        for who in ("plan.run", "decode step")
    ]
    assert {row["median_us"] for row in rows} == {"1.00", "2.00", "1000.00", "2000.00"}
    assert [row["rounds"] for row in rows[:2]] == ["6", "2"]
    assert all(row[name] for row in rows for name in ("date", "machine", "versions", "mean_us", "p99_us"))
    assert "one busy process" in capsys.readouterr().out


def test_first_use_has_rows_of_its_own(canned, monkeypatch, tmp_path):
    folders = []

    def generate(command, *, env, **options):
        folders.append(env["NUMBA_CACHE_DIR"])
        assert os.listdir(folders[-1]) == []

    monkeypatch.setattr(busy.subprocess, "run", generate)
    rows = busy.first_use()
    assert [(row["who"], row["case"]) for row in rows] == [
        ("quire generate", "first"), ("quire generate", "second"),
    ]  # fmt: skip
    assert folders[0] == folders[1]  # what the first leaves is there for the second


def test_a_wrong_result_is_not_timed_and_the_command_fails(canned, monkeypatch, capsys):
    monkeypatch.setattr(busy, "in_a_process", lambda threads, rounds: [(ATTENTION, []), (DECODE, [1e-3])])
    assert busy.main(["--turns", "1"]) == 1
    assert "wrong" in capsys.readouterr().out


def test_a_process_reports_the_seconds_of_every_call_and_none_of_wrong_ones(monkeypatch, capsys):
    monkeypatch.setattr(busy, "attention_call", lambda: None)
    monkeypatch.setattr(busy, "decode_steps", lambda: lambda: None)
    busy.report(50)
    (attention, none), (decode, seconds) = json.loads(capsys.readouterr().out)
    assert (tuple(attention), none) == (ATTENTION, [])
    assert (tuple(decode), len(seconds)) == (DECODE, 5)


def test_no_neighbour_is_left_behind(monkeypatch):
    started = []

    class Process:
        def __init__(self, command):
            started.append("started")

        def kill(self):
            started.append("killed")

        def wait(self):
            started.append("gone")

    monkeypatch.setattr(busy.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt), busy.busy_processes(1):
        raise KeyboardInterrupt
    assert started == ["started", "killed", "gone"]
