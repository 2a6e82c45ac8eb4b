"""Peers that need an environment of their own: another Python computes, by a script of workers/.

It is asked in lines of JSON and sleeps between its turns, stopped by signal: a library whose threads
wait for work by spinning would otherwise take its neighbours' cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.turns import Absent

ROOT = Path(__file__).parent.parent
WORKERS = ROOT / "benchmarks/workers"
LOAD_SECONDS, TURN_SECONDS = 900, 300


def without_absent_environments(names: Iterable[str], pythons: Mapping[str, Path | None]) -> list[str]:
    """The peers that can take part: those whose environment nobody gave are left out, and said on stderr.

    Args:
        pythons: by the package that its peers' names begin with.
    """
    kept = list(names)
    for package, python in pythons.items():
        absent = [name for name in kept if name.startswith(package)]
        if absent and python is None:
            hint = f"--{package}-python PATH, or {package.upper()}_PYTHON=PATH for make bench"
            print(f"left out: {'; '.join(absent)}. To measure: {hint}", file=sys.stderr)
            kept = [name for name in kept if name not in absent]
    return kept


class Worker:
    """A script of workers/ under another Python, which loads things and takes turns at them.

    Args:
        python: the interpreter of the environment; None: the user gave none.
        script: name of a file of workers/.
        environment: variables to set for it.
    Raises:
        Absent: there is no such interpreter; from `load` and `turn`: what kept the script from it.
    """

    def __init__(self, python: Path | None, script: str, environment: dict[str, str] | None = None) -> None:
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

    def load(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """Make something ready under a name, in place of what had that name; what the script says of it."""
        return self._ask({"load": name, "request": request}, LOAD_SECONDS)

    def turn(self, name: str) -> dict[str, Any]:
        """Compute it once; the answer holds "seconds"."""
        return self._ask({"turn": name}, TURN_SECONDS)

    @property
    def alive(self) -> bool:
        """It has not ended, of itself or by us."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it and all it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):  # what was still to be sent to it
                if pipe is not None:
                    pipe.close()

    def _ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        alarm = threading.Timer(limit, lambda: self._signal(signal.SIGKILL))
        alarm.start()
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            alarm.cancel()
            self._signal(signal.SIGSTOP)
        answer = json.loads(line) if line else self._epitaph()
        if "error" in answer:
            raise Absent(answer["error"], answer["status"])
        return dict(answer)

    def _epitaph(self) -> dict[str, str]:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        last_words = lines[-1][:200] if lines else "it said nothing"
        return {"status": "failed", "error": f"ended without an answer; {last_words}"}

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
