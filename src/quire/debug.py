"""QUIRE_DEBUG=1: unwritten and freed pages are NaN, and page ids and slots that lie on a device are checked too."""

from __future__ import annotations

import os


def debug_enabled() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get("QUIRE_DEBUG", "0") not in ("", "0")
