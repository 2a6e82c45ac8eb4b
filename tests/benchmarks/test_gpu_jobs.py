"""A job that crashes, hangs or comes too late costs its own row and no other."""

from __future__ import annotations

import sys
import time

import pytest

from benchmarks.gpu.jobs import Job, Setting, run_jobs, worth_starting
from benchmarks.gpu.suite import SECTIONS, make_jobs

# Speaks a worker's protocol; a job's title says what becomes of it.
FAKE_WORKER = """
import json, os, sys, time
task = json.load(open(sys.argv[1]))
reports = open(sys.argv[2], "a")
def report(**fields):
    print(json.dumps(fields), file=reports, flush=True)
for index in range(task["begin"], len(task["jobs"])):
    title = task["jobs"][index]["title"]
    report(job=index)
    if title == "crash":
        print("illegal memory access", flush=True)
        os._exit(1)
    if title == "hang":
        time.sleep(600)
    report(job=index, rows=[{"section": "x", "case": title, "status": "ok"}])
    if title == "ruin":
        os._exit(3)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_WORKER)

    def run(titles, seconds=60.0, **options):
        jobs = [Job("x", title, timeout=0.5) for title in titles]
        command = (sys.executable, str(script))
        said = []
        rows = run_jobs(
            jobs, Setting(), deadline=time.time() + seconds, folder=tmp_path, say=said.append, command=command,
            **options,
        )  # fmt: skip
        assert len(said) == len(rows)
        return rows

    return run


def test_rows_come_in_the_order_of_the_jobs_whoever_ran_them(fake):
    titles = [f"job {i}" for i in range(7)]
    assert [row["case"] for row in fake(titles, workers=3)] == titles


def test_a_crash_costs_one_row_and_leaves_its_last_words(fake):
    rows = fake(["a", "crash", "b"])
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "process died" in rows[1]["note"]
    assert "illegal memory access" in rows[1]["note"]


def test_a_hang_costs_one_row(fake):
    rows = fake(["a", "hang", "b"])
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "no answer in time" in rows[1]["note"]


def test_a_ruined_device_costs_no_row_beyond_the_one_that_ruined_it(fake):
    assert [row["status"] for row in fake(["ruin", "ruin", "b"])] == ["ok", "ok", "ok"]


def test_when_the_time_is_over_what_runs_is_cut_off_and_no_failure(fake):
    rows = fake(["a", "hang", "b", "c"], seconds=-10.0)
    assert rows[-1]["status"] == "skipped"
    assert {row["status"] for row in rows} <= {"ok", "skipped"}


def test_the_least_important_jobs_give_way():
    jobs = [Job("x", "can wait", seconds=5, priority=2), Job("x", "must", seconds=5, priority=0)]
    assert worth_starting(jobs, 0, 10.0)
    assert not worth_starting(jobs, 0, 9.9), "the job that must run needs what is left"
    assert worth_starting(jobs, 1, 5.0)
    assert not worth_starting(jobs, 1, 4.9)


@pytest.mark.parametrize("quick", [False, True])
def test_the_important_half_of_the_suite_fits_its_time(quick):
    must = [job for section in SECTIONS[1:] for job in make_jobs(section, quick) if job.priority == 0]
    assert sum(job.seconds for job in must) < 240
