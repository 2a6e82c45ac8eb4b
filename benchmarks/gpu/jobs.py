"""Jobs in processes of their own: one that crashes, hangs or ruins its CUDA context costs its own row and no other.

A worker (``worker.py``) runs a list of jobs and writes one line of JSON as each begins and ends. The parent reads
those lines, kills a worker whose job outlasts its time, and starts another one behind the job that was lost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GRACE = 10.0  # seconds a running job may overstay the run's deadline
START_TIMEOUT = 90.0  # seconds until a new process must have begun its first job
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")


@dataclass(frozen=True)
class Setting:
    """What all jobs of a run share."""

    device: str = "cuda"
    backend: str = "triton"
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class Job:
    """One thing to do, named by a kind that ``worker.HANDLERS`` knows, with arguments that JSON can carry."""

    kind: str
    title: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 3.0  # what it is expected to take, compilation included
    priority: int = 1  # 0 is the most important; others are skipped first when time runs out
    timeout: float = 60.0

    def row(self, status: str, note: str) -> Row:
        """A row that says why there is no other."""
        return {"section": self.kind, "case": self.title, "status": status, "note": note}


def worth_starting(jobs: Sequence[Job], index: int, seconds_left: float) -> bool:
    """Whether a job fits beside all more important ones that come after it."""
    job = jobs[index]
    reserved = sum(later.seconds for later in jobs[index + 1 :] if later.priority < job.priority)
    return job.seconds + reserved <= seconds_left


def run_jobs(
    jobs: Sequence[Job],
    setting: Setting,
    *,
    deadline: float,
    folder: Path,
    workers: int = 1,
    say: Callable[[str], None] = print,
    command: Sequence[str] = WORKER,
) -> list[Row]:
    """Run all jobs, dealt out to workers in turn; rows come in the order of the jobs.

    Args:
        deadline: as ``time.time()`` counts; what has not begun in time becomes a row with status "skipped".
        folder: where workers leave their logs.
        command: a worker; it is given the names of a file of tasks and of one for its reports.
    """
    workers = max(1, min(workers, len(jobs)))
    crew = [
        _Worker(list(jobs[i::workers]), setting, deadline, folder / f"{i}", say, command)
        for i in range(workers)
    ]
    try:
        while any([not worker.finished() for worker in crew]):  # noqa: C419  each one must be looked at
            time.sleep(0.05)
    finally:
        for worker in crew:
            worker.kill()
    rows: list[Row] = []
    for number in range(len(jobs)):
        rows += crew[number % workers].rows[number // workers]
    return rows


class _Worker:
    """A process, and what is known of its jobs."""

    def __init__(
        self,
        jobs: list[Job],
        setting: Setting,
        deadline: float,
        stem: Path,
        say: Callable[[str], None],
        command: Sequence[str],
    ) -> None:
        self.jobs, self.setting, self.deadline, self.say, self.command = jobs, setting, deadline, say, command
        self.stem = stem.with_name(f"{time.monotonic_ns()}-{stem.name}")  # one folder serves several calls
        self.rows: dict[int, list[Row]] = {}
        self.running: int | None = None
        self.since = time.time()
        self._start(0)

    def finished(self) -> bool:
        """Take in what has been reported; replace the process if it died or hangs."""
        ended = self.process.poll() is not None
        self._read()
        if len(self.rows) == len(self.jobs):
            return True
        patience = START_TIMEOUT if self.running is None else self.jobs[self.running].timeout
        overdue = time.time() - self.since > patience
        late = time.time() > self.deadline + GRACE
        if ended or overdue or late:
            self.kill()
            self._read()
            if late and not ended:  # cut off by the others' time, which says nothing of the job
                self._bury("skipped", "cut off when the run's time was over")
            else:
                self._bury("failed", "no answer in time" if overdue else "process died")
            if late:
                for index in range(len(self.rows), len(self.jobs)):
                    self._finish(index, [self.jobs[index].row("skipped", "no time left")])
            elif len(self.rows) < len(self.jobs):
                self._start(len(self.rows))
        return len(self.rows) == len(self.jobs)

    def _bury(self, status: str, why: str) -> None:
        """The job that was under way is lost; so is the next one if the process never got to any."""
        never_began = len(self.rows) == self.begin and self.begin < len(self.jobs)
        lost = self.begin if self.running is None and never_began else self.running
        if lost is not None:
            last_words = self.log.read_text(errors="replace")[-600:].strip()
            self._finish(lost, [self.jobs[lost].row(status, f"{why}: {last_words}")])

    def kill(self) -> None:
        """End the process and what it started, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _start(self, begin: int) -> None:
        self.begin = begin
        task = {
            "setting": asdict(self.setting),
            "jobs": [asdict(job) for job in self.jobs],
            "begin": begin,
            "deadline": self.deadline,
        }
        task_file = self.stem.with_suffix(".task.json")
        task_file.write_text(json.dumps(task))
        self.reports = self.stem.with_suffix(f".{begin}.jsonl")
        self.reports.touch()
        self.read_bytes = 0
        self.log = self.stem.with_suffix(f".{begin}.log")
        with self.log.open("wb") as log:
            command = [*self.command, str(task_file), str(self.reports)]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.since = time.time()

    def _read(self) -> None:
        with self.reports.open("rb") as file:
            file.seek(self.read_bytes)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):  # still being written
                break
            self.read_bytes += len(line)
            report = json.loads(line)
            if "rows" in report:
                self._finish(report["job"], report["rows"])
            else:
                self.running, self.since = report["job"], time.time()

    def _finish(self, index: int, rows: list[Row]) -> None:
        self.rows[index] = rows
        self.running, self.since = None, time.time()
        for row in rows:
            self.say(" ".join(f"{key}={value}" for key, value in row.items() if value not in ("", None)))
