"""The serving table: what pages are for, beside contiguous caches and transformers' continuous batching.

command.py      the command line, one call of it           cases.py         requests and their arrivals
processes.py    each contestant in a process of its own    worker.py        what runs there
contestants.py  who serves                                 shapes.py        Llama-2's shapes, random weights
memory.py       budget, peak and course                    agreement.py     are the texts right
floor.py        what a decode step takes at least          figures.py       a row's columns
profile.py      a decode step by its parts                 tables.py, plots.py   what people read
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.serving") -> int:
    """Run the command; returns its exit code."""
    from benchmarks.serving import command  # workers need it not

    return command.main(arguments, prog)
