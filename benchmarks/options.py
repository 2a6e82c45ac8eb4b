"""A command line as `quire` has it: what is wrong is one sentence with its fix."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is the module's own text.

    Args:
        prog: how it was called; stands for {prog} in the text.
        text: the module's docstring.
    """

    def __init__(self, prog: str, text: str | None) -> None:
        super().__init__(
            prog=prog,
            description=(text or "").format(prog=prog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Say it on stderr and exit with 2."""
        self.exit(2, f"quire: {message}. Fix: see {self.prog} --help\n")
