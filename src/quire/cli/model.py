"""Options of the command line → an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.assets import DEMO_MODEL
from quire.cli.console import spinner
from quire.errors import ArgumentError

if TYPE_CHECKING:
    from quire.engine import LLM


def load(model: Path | None, *, dtype: str = "float32", **options: Any) -> LLM:
    """Load a model folder, or the embedded model for None.

    Args:
        dtype: of the weights, by name.
        options: as for LLM.
    Raises:
        ModelError, UnsupportedError, ArgumentError: as LLM; ArgumentError also where memory does not suffice.
    """
    with spinner("loading the model"):
        import torch
        from transformers.utils import logging

        from quire.engine import LLM

        logging.disable_progress_bar()
        try:
            return LLM(model or DEMO_MODEL, dtype=getattr(torch, dtype), **options)
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise ArgumentError(
                f"the model and its pages must fit this machine's memory; got {_what(options)}, which does not. "
                "Fix: a smaller --num-pages or --page-size"
            ) from error


def _what(options: dict[str, Any]) -> str:
    return f"{options.get('num_pages') or 'the default number of'} pages of {options.get('page_size', 16)} tokens"
