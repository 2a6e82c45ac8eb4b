"""Each task in a process of its own: its peak memory is its own, and what it breaks is lost with it alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

WORKER = (sys.executable, "-m", "benchmarks.serving.worker")


def run(task: dict[str, Any], seconds: float, command: tuple[str, ...] = WORKER) -> dict[str, Any]:
    """Do a task of worker.py, for so many seconds at most.

    Returns:
        The worker's result; one with the status "failed" and a note where it died or ran out of time.
    """
    with tempfile.TemporaryDirectory() as folder:
        task_file, result_file = Path(folder, "task.json"), Path(folder, "result.json")
        log = Path(folder, "log.txt")
        task_file.write_text(json.dumps(task))
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*command, str(task_file), str(result_file)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(),
                start_new_session=True,  # to be ended whole, with what it started
            )
            try:
                process.wait(max(1.0, seconds))
                late = False
            except subprocess.TimeoutExpired:
                late = True
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if result_file.exists():
            return dict(json.loads(result_file.read_text()))
        if late:
            return {"status": "failed", "note": f"no result within {seconds:.0f} s"}
        lines = log.read_text(errors="replace").strip().splitlines()
        last_words = lines[-1][:200] if lines else "it said nothing"
        return {"status": "failed", "note": f"the process died ({process.returncode}): {last_words}"}


def _environment() -> dict[str, str]:
    """Our own, in which the worker finds the same packages."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
