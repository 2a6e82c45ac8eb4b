"""QUIRE_DEBUG=1: page ids and slots are checked against the pool, unwritten and freed pages are NaN."""

from __future__ import annotations

import os


def debug_enabled() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get("QUIRE_DEBUG", "0") not in ("", "0")
