"""A page as headless Chromium makes it, where one is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HANGS = 120


def dom(url: str, folder: Path, *, seconds: int = 3) -> str:
    """The document after its script has run for so many seconds of its own clock, which waits for answers."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium is installed: none of {', '.join(NAMES)}")
    options = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={1000 * seconds}", "--dump-dom",
    )  # fmt: skip
    result = subprocess.run([found, *options, url], capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    return result.stdout
