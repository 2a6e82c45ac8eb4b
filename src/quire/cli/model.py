"""Options of the command line → an LLM, and how it chooses tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.assets import DEMO_MODEL
from quire.cli.console import spinner
from quire.errors import ArgumentError

if TYPE_CHECKING:
    from quire.engine import LLM, SamplingParams


def load(model: str | None, *, revision: str | None = None, **options: Any) -> LLM:
    """Load a model by its folder or its id on the Hugging Face hub, or the embedded model for None.

    Args:
        options: as for LLM; None stands for LLM's own default.
    Raises:
        ModelError, UnsupportedError, ArgumentError: as LLM.
    """
    with spinner("loading the libraries"):
        from quire.engine import LLM
        from quire.hf.checkpoint import find_checkpoint
    if model is not None:
        find_checkpoint(
            model, revision
        )  # a download has a progress bar of its own, which a spinner would draw over
    with spinner("loading the model"):
        return LLM(DEMO_MODEL if model is None else model, revision=revision, **options)


def sampling(**options: Any) -> SamplingParams:
    """SamplingParams of the options that were typed; the others stay unset."""
    from quire.engine import SamplingParams

    return SamplingParams(**{name: value for name, value in options.items() if value is not None})


def check_trace(path: Path | None) -> None:
    """Say what is wrong with a trace's place before a model is loaded, which may take long.

    Raises:
        ArgumentError: its folder does not exist, or it is a folder.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ArgumentError(
            f"--trace must name a file in a folder that exists; got {str(path)!r}. Fix: --trace trace.json"
        )


def tracing(llm: LLM, path: Path | None) -> AbstractContextManager[None]:
    """Write a trace while a block runs; None: none."""
    return nullcontext() if path is None else llm.tracing(path)
