"""Terminals: where text goes, spinners while one waits, and silence from libraries."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

# Control characters, shown as pictures: what a model writes must not steer the terminal.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def hush() -> None:
    """Keep the model libraries quiet; what matters is raised as an error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def visible(text: str) -> str:
    """Text that is safe to write to a terminal."""
    return text.translate(_CONTROLS)


@contextmanager
def spinner(message: str) -> Iterator[None]:
    """Show that something goes on, on stderr and only to a person; kernels that are compiled meanwhile are counted."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(message) as status:
        # Torch comes with it: the reader waits for that, too.
        from quire.kernels.ahead import counted, reporting

        def show(ready: int, total: int) -> None:
            status.update(message if ready == total else counted(ready, total))

        with reporting(show):
            yield
