"""Kernels compiled for other CPUs than this one, each in a process of its own: Numba asks once which one it has."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "kernels/cpu"
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def on_target(cpu, folder, *command):
    """A command in a Python that compiles for that CPU, however this one was asked to."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *command],
        env={**kept, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=1800,  # to end one that hangs, not to hurry one that works
        check=False,
    )


def found_on(cpu, folder, *arguments):
    """The JSON that on_target.py prints last."""
    result = on_target(cpu, folder, str(HERE / "on_target.py"), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def pytest_on(cpu, folder, chosen, *names):
    """Tests of this folder's files, chosen by a pytest expression, in such a process."""
    plain = ["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    files = [str(HERE / Path(name).with_name(f"test_{Path(name).name}.py")) for name in names]
    return on_target(cpu, folder, "-m", "pytest", "-k", chosen, *plain, *files)
