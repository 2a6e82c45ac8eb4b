"""Numba's compiler as Quire uses it. Importing this imports Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function on first use, keep it on disk, and run it without the GIL."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # nowhere to write a cache: an installation without a writable home
        return numba.njit(**OPTIONS)(function)
