"""Options of the command line → an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.assets import DEMO_MODEL
from quire.cli.console import spinner

if TYPE_CHECKING:
    from quire.engine import LLM


def load(model: Path | None, *, dtype: str = "float32", **options: Any) -> LLM:
    """Load a model folder, or the embedded model for None.

    Args:
        dtype: of the weights, by name.
        options: as for LLM.
    Raises:
        ModelError, UnsupportedError, ArgumentError: as LLM.
    """
    with spinner("loading the model"):
        import torch

        from quire.engine import LLM

        return LLM(model or DEMO_MODEL, dtype=getattr(torch, dtype), **options)
