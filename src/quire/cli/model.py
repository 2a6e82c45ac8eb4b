"""Options of the command line → an LLM."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.console import spinner

if TYPE_CHECKING:
    from quire.engine import LLM


def demo_model() -> Path:
    """The folder of the embedded model."""
    return Path(str(files("quire"))) / "assets" / "demo_model"


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
        from transformers.utils import logging

        from quire.engine import LLM

        logging.disable_progress_bar()
        return LLM(model or demo_model(), dtype=getattr(torch, dtype), **options)
