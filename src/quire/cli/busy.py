"""Whether other programs are at work on this machine, and what that does to what is measured meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

LOOKED_FOR = 0.3  # seconds
BUSY = 0.15  # of a core: an idle desktop takes less


def warning() -> str | None:
    """A sentence if other programs keep cores busy; None if not, or where nothing says so.

    Cost: LOOKED_FOR seconds, in which this process must not compute.
    """
    cores = os.cpu_count() or 1
    used = cores_used()
    if used is None or used < BUSY:
        return None
    return (
        f"this machine is busy: other programs use {used:.1f} of {cores} cores (load average {_load()}). Times are "
        "longer and vary, on several threads most: all wait for the one that waits for a core"
    )


def cores_used() -> float | None:
    """Cores that are at work, on average over a moment; the load average of a minute where that is all there is.

    On Linux the whole machine counts, also from inside a container.
    """
    before = _ticks()
    if before is None:
        return _minute()
    time.sleep(LOOKED_FOR)
    after = _ticks() or before
    busy, total = after[0] - before[0], after[1] - before[1]
    return (os.cpu_count() or 1) * busy / total if total > 0 else None


def _ticks() -> tuple[int, int] | None:
    """Clock ticks of all cores so far: those at work, and all; None where the kernel does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields)
    except (OSError, ValueError):
        return None
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def _minute() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows has none
        return None


def _load() -> str:
    minute = _minute()
    return "unknown" if minute is None else f"{minute:.1f}"
