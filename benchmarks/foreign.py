"""Peers that need an environment of their own: another Python computes, by a script of workers/.

It is asked in lines of JSON and sleeps between its turns, stopped by signal: a library whose threads
wait for work by spinning would otherwise take its neighbours' cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.turns import Absent

WORKERS = Path(__file__).parent / "workers"
LOAD_SECONDS, TURN_SECONDS = 900, 300


class Worker:
    """A script of workers/ under another Python, loaded and ready for turns.

    Args:
        python: the interpreter of the environment; None: the user gave none.
        script: name of a file of workers/.
        request: what to load; anything JSON holds.
        environment: variables to set for it.
    Attributes:
        answer: what it said after loading.
    Raises:
        Absent: there is no such interpreter, or the script could not load, with its last words.
    """

    def __init__(
        self,
        python: Path | None,
        script: str,
        request: dict[str, Any],
        environment: dict[str, str] | None = None,
    ) -> None:
        package, _, _ = script.partition("_")
        if python is None:
            raise Absent(f"not installed: give the Python of its environment, --{package}-python PATH")
        if not os.access(python, os.X_OK):
            raise Absent(f"not installed: --{package}-python {python} is no program")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._process = subprocess.Popen(
            [str(python), str(WORKERS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=inherited | (environment or {}),
            # A group of its own can be stopped whole. It stays in our session: should we die, the system wakes
            # and ends it (a stopped group that lost its parent gets SIGHUP and SIGCONT).
            preexec_fn=os.setpgrp,
        )
        self.answer = self._ask(request, LOAD_SECONDS)
        self._signal(signal.SIGSTOP)

    def run(self) -> dict[str, Any]:
        """One turn: wake, compute once, stop again; the answer holds "seconds"."""
        self._signal(signal.SIGCONT)
        answer = self._ask({}, TURN_SECONDS)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it and all it started."""
        for number in (signal.SIGKILL, signal.SIGCONT):
            self._signal(number)
        self._process.wait()
        self._log.close()

    def _ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        alarm = threading.Timer(limit, lambda: self._signal(signal.SIGKILL))
        alarm.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            alarm.cancel()
        answer = json.loads(line) if line else {"error": f"ended without an answer; {self._last_words()}"}
        if "error" in answer:
            self.close()
            raise Absent(answer["error"])
        return dict(answer)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
