"""Kernels compiled before their first use, side by side in processes of their own.

A kernel takes seconds to compile, and Python compiles one at a time in a process. Where several are missing on disk and
there are two cores or more, as many processes are started. Each runs ``serve``: it reads one job after the other, and
leaves the machine code where every process finds it (``compile``). They are fresh interpreters that see this one's
import path and nothing of the program that runs in it, so that a script needs no guard around its main part.

Nothing fails because a process does: what it leaves undone is compiled in this one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

LONGEST = 600.0  # seconds for one kernel; a process that takes longer is ended
DONE = b"done\n"

# Called with how many of how many kernels are ready, first with 0 and last with all of them.
Report = Callable[[int, int], None]


class Job(NamedTuple):
    """A compiled function, and arguments of the types that it will be called with."""

    module: str
    function: str
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, function: Any, *arguments: Any) -> Job:
        """The job of a compiled function that is a name of its module."""
        return cls(function.__module__, function.__name__, arguments)

    def compile(self) -> None:
        """Compile it in this process, or load it from disk."""
        from quire.kernels.compile import machine_code

        machine_code(self._load(), *self.arguments)

    def is_ready(self) -> bool:
        """Whether that would take no time: the machine code is in this process or on disk."""
        from quire.kernels.compile import is_ready

        return is_ready(self._load(), *self.arguments)

    def key(self) -> Hashable:
        """Equal for jobs that compile the same."""
        from quire.kernels.compile import signature_of

        return self.module, self.function, signature_of(*self.arguments)

    def _load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.function)


def compile_ahead(jobs: Sequence[Job]) -> None:
    """Compile what is not on disk yet; those jobs that take longest had best come first.

    A line on stderr counts them, unless ``reporting`` has put something in its place.

    Cost: milliseconds where nothing is missing; else 2 to 6 s a kernel, shared by the cores, and two seconds for each
        process to begin.
    """
    missing = list({job.key(): job for job in jobs if not job.is_ready()}.values())
    if not missing:
        return
    progress = _Progress(len(missing))
    for job in _side_by_side(missing, progress.advance):
        job.compile()
        progress.advance()


def _side_by_side(jobs: Sequence[Job], advance: Callable[[], None]) -> list[Job]:
    """Compile jobs in processes; those that are left."""
    count = min(_cores(), len(jobs))
    if count < 2 or not _can_share():
        return list(jobs)
    waiting, failed = deque(jobs), deque[Job]()
    processes: list[_Process] = []

    def work(process: _Process) -> None:
        while True:
            try:
                job = waiting.popleft()
            except IndexError:  # none is left
                return
            if not process.compile(job):
                failed.append(job)
                return
            advance()

    try:
        for _ in range(count):
            processes.append(_Process())
        threads = [threading.Thread(target=work, args=(process,), daemon=True) for process in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except OSError:  # no further process may be started
        pass
    finally:
        for process in processes:
            process.end()
    return [job for job in (*failed, *waiting) if not job.is_ready()]


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _can_share() -> bool:
    """Whether another process can be started and its machine code be found here.

    A frozen program is its own interpreter: started again, it would do its work again.
    """
    from quire.kernels.compile import can_keep

    return bool(sys.executable) and not getattr(sys, "frozen", False) and can_keep()


class _Process:
    """A Python that compiles one job after the other."""

    def __init__(self) -> None:
        path = [entry for entry in sys.path if isinstance(entry, str)]
        program = f"import sys; sys.path[:] = {path!r}; from quire.kernels.ahead import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a core is what it has
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )

    def compile(self, job: Job) -> bool:
        """Whether the process has compiled a job."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(LONGEST, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(_to_json(job)).encode() + b"\n")
            process.stdin.flush()
            return process.stdout.readline() == DONE
        except (OSError, ValueError):  # it has ended
            return False
        finally:
            timer.cancel()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Compile the jobs that come on stdin, and say so of each on stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything else prints is no answer
    for line in sys.stdin.buffer:
        _from_json(json.loads(line)).compile()
        answers.write(DONE)
        answers.flush()


def _to_json(value: Any) -> Any:
    """A job, or an argument of one: numbers, text, arrays, and tuples of these; of a NamedTuple also its class."""
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "values": value.tolist()}
    if not isinstance(value, tuple):
        return value
    kind = type(value)
    name = "" if kind is tuple else f"{kind.__module__}:{kind.__name__}"
    return [name, *map(_to_json, value)]


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return np.array(value["values"], np.dtype(value["dtype"]))
    if not isinstance(value, list):
        return value
    name, *fields = value
    if not name:
        return tuple(map(_from_json, fields))
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(module), kind)._make(map(_from_json, fields))


# --- progress --------------------------------------------------------------------------------------------

_report: ContextVar[Report | None] = ContextVar("quire_compile_report", default=None)


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Let a function show the progress, in place of the line on stderr."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


class _Progress:
    """How many kernels are ready, told by any thread."""

    def __init__(self, total: int) -> None:
        self._ready, self._total, self._lock = 0, total, threading.Lock()
        self._report = _report.get() or _on_stderr
        self._report(0, total)

    def advance(self) -> None:
        """One more."""
        with self._lock:
            self._ready += 1
            self._report(self._ready, self._total)


def counted(ready: int, total: int) -> str:
    """The progress as a line."""
    return f"compiling kernels (once): {ready} of {total}"


def _on_stderr(ready: int, total: int) -> None:
    """A line that counts, and leaves a terminal clean; elsewhere one plain line."""
    stream = sys.stderr
    if stream is None:
        return
    if stream.isatty():
        text = counted(ready, total)
        stream.write(f"\r{text}" if ready < total else "\r" + " " * len(text) + "\r")
        stream.flush()
    elif ready == 0:
        stream.write(f"compiling {total} kernels (once)\n")
