"""`quire bench`: the benchmarks of a checkout. They are no part of the package, nor are their peers and results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import quire
from quire.cli.busy import warning
from quire.errors import ArgumentError


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one of the benchmarks as `python -m benchmarks.<name>` would.

    Returns:
        Its exit code.
    Raises:
        ArgumentError: this package was installed without the repository around it.
    """
    root = Path(quire.__file__).resolve().parents[2]
    places = (root / "benchmarks" / f"{name}.py", root / "benchmarks" / name / "__init__.py")
    if not any(place.is_file() for place in places):
        raise ArgumentError(
            f"quire bench must run in a checkout of Quire; got a package in {Path(quire.__file__).parent} "
            "without one. Fix: clone the repository, then `make bench`, or `pip install -e '.[bench]'` there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module(f"benchmarks.{name}")
    busy = warning()  # of the time before: a benchmark is at work itself
    code: int = module.main(list(arguments), prog=f"quire bench {name}")
    if busy:  # said beside the figures, and of none where there are none
        print(f"quire: {busy}", file=sys.stderr)
    return code
