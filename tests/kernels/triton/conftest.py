"""Tests marked ``interpreted`` run in a process of their own, where TRITON_INTERPRET was set before Triton's import.

Triton decides at import whether a kernel is interpreted or compiled, so one process cannot do both. Each pytest
process (each xdist worker) starts one interpreting pytest when it meets its first such test, hands it the tests one
by one, and reports what comes back as if it had run them: names, tracebacks and -x are what they always are.
With TRITON_INTERPRET=1 in the environment they run right here, under a debugger too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_CONNECTION = "QUIRE_TESTS_CONNECTION"  # the interpreting pytest's end of the pipe

if importlib.util.find_spec("triton") is None:  # it exists for Linux only
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETING:
    import interpreter

    interpreter.install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter, on CPU tensors")


class InterpretingPytest:
    """A pytest in a process with TRITON_INTERPRET=1 that runs tests on request."""

    def __init__(self, config: pytest.Config) -> None:
        self.connection, theirs = Pipe()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process, read if it dies
        environment = os.environ | {"TRITON_INTERPRET": "1", _CONNECTION: str(theirs.fileno())}
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # tiles are too small to share
        environment.pop("PYTEST_XDIST_WORKER", None)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n0",
            "-m",
            "",  # the asking process has chosen
            "-p",
            "no:cacheprovider",
            f"--rootdir={config.rootpath}",
        ]
        self.process = subprocess.Popen(
            [*command, str(Path(__file__).parent)],
            cwd=config.rootpath,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def run(self, nodeid: str) -> list[dict[str, Any]]:
        """The serialised reports of one test.

        Raises:
            EOFError, OSError: the process has died.
        """
        self.connection.send(nodeid)
        return self.connection.recv()

    def last_words(self) -> str:
        status = self.process.wait()
        self.output.seek(0)
        return f"The interpreting process ended with status {status}:\n{self.output.read().decode()[-8000:]}"

    def close(self) -> None:
        self.connection.close()
        self.process.wait()


_interpreting: list[InterpretingPytest] = []


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """In the asking process: have a marked test run over there."""
    if INTERPRETING or item.get_closest_marker("interpreted") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What stands since the test before, which counted on this one, is not needed by the next.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def _reports(item: pytest.Item) -> list[pytest.TestReport]:
    if not _interpreting:
        _interpreting.append(InterpretingPytest(item.config))
    try:
        serialised = _interpreting[0].run(item.nodeid)
    except (EOFError, OSError):
        died = _interpreting.pop()
        return [
            pytest.TestReport(
                item.nodeid,
                item.location,
                dict.fromkeys(item.keywords, 1),
                "failed",
                died.last_words(),
                "call",
            )
        ]
    from_serialised = item.config.hook.pytest_report_from_serializable
    return [from_serialised(config=item.config, data=data) for data in serialised]


def pytest_unconfigure(config: pytest.Config) -> None:
    while _interpreting:
        _interpreting.pop().close()


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """In the interpreting process: run what is asked for until nobody asks."""
    if _CONNECTION not in os.environ:
        return None
    connection = Connection(int(os.environ.pop(_CONNECTION)))
    items = {item.nodeid: item for item in session.items}
    to_serialised = session.config.hook.pytest_report_to_serializable
    while True:
        try:
            nodeid = connection.recv()
        except EOFError:
            return True
        reports = runtestprotocol(items[nodeid], log=False, nextitem=None)
        connection.send([to_serialised(config=session.config, report=report) for report in reports])
