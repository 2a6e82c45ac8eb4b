"""Kernels compiled before their first use: each once, side by side, counted, and whatever happens to a process."""

import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import quire
from quire.kernels import ahead
from quire.kernels.ahead import Job, compile_ahead
from quire.ops.warm_up import compile_jobs
from quire.planning.split import part_end, visible_range
from quire.planning.work_list import TileShape, Tiling

needs_a_shell = pytest.mark.skipif(os.name != "posix", reason="an interpreter that fails is written in sh")


class Workshop:
    """Jobs that take no time, in processes that are none."""

    def __init__(self, cores=3, lost=(), refused=0):
        self.cores, self.lost, self.refused = cores, lost, refused
        self.ready, self.here, self.elsewhere, self.ended = set(), [], [], 0

    def start(self):
        if self.refused and len(self.elsewhere) + 1 >= self.refused:
            raise OSError("no more processes")
        self.elsewhere.append([])
        process = Process()
        process.workshop, process.jobs = self, self.elsewhere[-1]
        return process


class Process:
    def compile(self, job):
        if job.function in self.workshop.lost:
            return False
        self.jobs.append(job.function)
        self.workshop.ready.add(job)
        return True

    def end(self):
        self.workshop.ended += 1


@pytest.fixture
def workshop(monkeypatch):
    def open_one(**options):
        shop = Workshop(**options)

        def compile_here(job):
            shop.here.append(job.function)
            shop.ready.add(job)

        monkeypatch.setattr(ahead, "_Process", shop.start)
        monkeypatch.setattr(ahead, "_cores", lambda: shop.cores)
        monkeypatch.setattr(ahead, "_can_share", lambda: True)
        monkeypatch.setattr(Job, "is_ready", lambda job: job in shop.ready)
        monkeypatch.setattr(Job, "key", lambda job: job)
        monkeypatch.setattr(Job, "compile", compile_here)
        return shop

    return open_one


def jobs(*names):
    return [Job("a.module", name, (1,)) for name in names]


def compiled(shop):
    return sorted(name for names in shop.elsewhere for name in names)


def test_a_job_is_the_same_after_its_way_to_a_process():
    shape = TileShape(8, 128, part_cost=3)
    job = Job("a.module", "name", (1, -2.5, True, (), (3, (4,)), shape, Tiling(2, shape, TileShape(1, 1))))
    line = json.dumps(ahead._to_json(job))
    again = ahead._from_json(json.loads(line))
    assert again == job
    assert [type(argument) for argument in again.arguments] == [
        int,
        float,
        bool,
        tuple,
        tuple,
        TileShape,
        Tiling,
    ]
    assert type(again.arguments[-1].decode) is TileShape


def test_arrays_keep_their_values_and_types_on_the_way():
    job = Job("a.module", "name", (np.array([[1 << 23]], np.int32), np.array([1 << 46])))
    again = ahead._from_json(json.loads(json.dumps(ahead._to_json(job))))
    for array, before in zip(again.arguments, job.arguments, strict=True):
        assert array.dtype == before.dtype
        assert array.tolist() == before.tolist()


def test_every_job_of_an_operator_can_be_sent():
    spec = quire.AttentionSpec(num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, dtype=torch.float32)
    jobs = compile_jobs([spec], "cpu", torch.device("cpu"))
    assert len(jobs) > 5
    for job in jobs:
        again = ahead._from_json(json.loads(json.dumps(ahead._to_json(job))))
        assert (again.module, again.function) == (job.module, job.function)


# --- which, and where ------------------------------------------------------------------------------------


def test_what_is_missing_is_compiled_once_each_in_as_many_processes_as_there_are_cores(workshop):
    shop = workshop(cores=3)
    shop.ready.update(jobs("c"))
    compile_ahead(jobs("a", "b", "c", "d", "a", "e"))
    assert compiled(shop) == ["a", "b", "d", "e"]
    assert len(shop.elsewhere) == shop.ended == 3
    assert shop.here == []


def test_no_more_processes_are_started_than_there_are_kernels_to_compile(workshop):
    shop = workshop(cores=64)
    compile_ahead(jobs("a", "b"))
    assert len(shop.elsewhere) == shop.ended == 2


@pytest.mark.parametrize(("cores", "names"), [(1, "abc"), (8, "a")], ids=["one core", "one kernel"])
def test_no_process_is_started_where_there_is_nothing_to_share(workshop, cores, names):
    shop = workshop(cores=cores)
    compile_ahead(jobs(*names))
    assert shop.elsewhere == []
    assert shop.here == list(names)


def test_nothing_is_started_where_nothing_is_missing(workshop, capsys):
    shop = workshop()
    shop.ready.update(jobs("a", "b"))
    compile_ahead(jobs("a", "b"))
    assert (shop.elsewhere, shop.here) == ([], [])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("trouble", ["frozen", "no interpreter", "nowhere to keep it"])
def test_a_program_that_cannot_be_shared_compiles_here(workshop, monkeypatch, trouble):
    can_share = ahead._can_share
    shop = workshop()
    monkeypatch.setattr(ahead, "_can_share", can_share)
    if trouble == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    elif trouble == "no interpreter":
        monkeypatch.setattr(sys, "executable", None)
    else:
        monkeypatch.setattr("quire.kernels.compile.cache_folder", lambda: None)
    compile_ahead(jobs("a", "b"))
    assert (shop.elsewhere, shop.here) == ([], ["a", "b"])


# --- processes that fail ---------------------------------------------------------------------------------


def test_what_a_process_is_lost_with_is_compiled_here_and_the_rest_by_the_others(workshop):
    shop = workshop(cores=2, lost={"b"})
    compile_ahead(jobs("a", "b", "c", "d"))
    assert compiled(shop) == ["a", "c", "d"]
    assert shop.here == ["b"]
    assert shop.ended == 2


def test_when_all_processes_are_lost_everything_is_compiled_here(workshop):
    shop = workshop(cores=2, lost={"a", "b", "c"})
    compile_ahead(jobs("a", "b", "c"))
    assert sorted(shop.here) == ["a", "b", "c"]


def test_where_no_further_process_may_be_started_everything_is_compiled_here(workshop):
    shop = workshop(cores=4, refused=3)
    compile_ahead(jobs("a", "b", "c", "d"))
    assert sorted(shop.here + compiled(shop)) == ["a", "b", "c", "d"]
    assert shop.ended == len(shop.elsewhere)


def test_processes_are_ended_when_the_reader_gives_up(workshop, monkeypatch):
    shop = workshop(cores=2)

    def interrupted(thread):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(jobs("a", "b", "c"))
    assert shop.ended == 2


@needs_a_shell
@pytest.mark.parametrize("program", ["exit 3", "exec sleep 100", "echo noise; exec cat > /dev/null"])
def test_an_interpreter_that_ends_hangs_or_says_something_else_costs_no_kernel(
    workshop, monkeypatch, tmp_path, program
):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    interpreter.chmod(0o755)
    real = ahead._Process
    shop = workshop(cores=2)
    monkeypatch.setattr(ahead, "_Process", real)
    monkeypatch.setattr(ahead, "LONGEST", 0.5)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    compile_ahead(jobs("a", "b", "c"))
    assert sorted(shop.here) == ["a", "b", "c"]


SCRIPT = """
import json
from quire.kernels import ahead
from quire.planning.split import part_end, visible_range
from quire.planning.work_list import TileShape, Tiling

print("began")
ahead._cores = lambda: 2
jobs = [ahead.Job.of(part_end, 1, 2, 3), ahead.Job.of(visible_range, 1, 2, 3, True, 5)]
before = [job.is_ready() for job in jobs]
ahead.compile_ahead(jobs)
here = len(part_end.overloads) + len(visible_range.overloads)
print(json.dumps([before, [job.is_ready() for job in jobs], here]))
"""


def test_a_script_without_a_guard_around_its_main_part_runs_once_and_finds_all_on_disk(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    work = tmp_path / "work"
    work.mkdir()
    (work / "base64.py").write_text("raise RuntimeError('a file of the user is in the way')")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    began, found = done.stdout.splitlines()
    assert began == "began"
    assert json.loads(found) == [[False, False], [True, True], 0]
    assert done.stderr == "compiling 2 kernels (once)\n"


# --- jobs ------------------------------------------------------------------------------------------------


def test_a_job_is_known_by_its_function_and_the_types_of_its_arguments():
    assert Job.of(part_end, 1, 2, 3).key() == Job.of(part_end, 4, 5, 6).key()
    assert Job.of(part_end, 1, 2, 3).key() != Job.of(part_end, 1.0, 2, 3).key()
    assert Job.of(part_end, 1, 2, 3).key() != Job.of(visible_range, 1, 2, 3).key()


def test_a_job_is_ready_once_it_is_compiled():
    job = Job.of(part_end, 1, 2, 3)
    job.compile()
    assert job.is_ready()


# --- progress --------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_counts_and_is_left_clean(workshop, monkeypatch):
    workshop(cores=1)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    compile_ahead(jobs("a", "b"))
    lines = terminal.getvalue().split("\r")
    assert lines[1:3] == [f"compiling kernels (once): {ready} of 2" for ready in (0, 1)]
    assert lines[3].isspace()
    assert len(lines[3]) == len(lines[2])
    assert lines[4:] == [""]


def test_a_file_gets_one_plain_line(workshop, capsys):
    workshop()
    compile_ahead(jobs("a", "b", "c"))
    assert capsys.readouterr() == ("", "compiling 3 kernels (once)\n")


def test_a_program_without_stderr_is_told_nothing(workshop, monkeypatch):
    shop = workshop(cores=1)
    monkeypatch.setattr(sys, "stderr", None)
    compile_ahead(jobs("a"))
    assert shop.here == ["a"]


def test_another_report_takes_the_place_of_the_line(workshop, capsys):
    shop = workshop(cores=2, lost={"b"})
    seen = []
    with ahead.reporting(lambda ready, total: seen.append((ready, total))):
        compile_ahead(jobs("a", "b", "c"))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert shop.here == ["b"]
    assert capsys.readouterr().err == ""
