"""What a person at a terminal is told: the progress bar of `LLM.generate`, and which model was loaded how."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from quire.engine.request import Delta

_terminal = threading.Lock()  # held while a bar is shown: two would draw over each other


logger = logging.getLogger("quire")


def say(line: str) -> None:
    """Log a line as INFO; where nobody listens to that, write it to stderr if a person reads it."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif sys.stderr is not None and sys.stderr.isatty():
        print(line, file=sys.stderr)


@contextmanager
def progress_bar(
    num_requests: int, *, shown: bool | None
) -> Iterator[Callable[[Sequence[Delta]], None] | None]:
    """Show how many requests have finished and how fast tokens come, on stderr.

    Args:
        shown: None: when stderr is a terminal.
    Yields:
        A function to call with the deltas of each step; None where nothing is shown, as while another bar is.
    """
    if not (sys.stderr.isatty() if shown is None else shown) or not _terminal.acquire(blocking=False):
        yield None
        return
    try:
        with _bar(num_requests) as advance:
            yield advance
    finally:
        _terminal.release()


@contextmanager
def _bar(num_requests: int) -> Iterator[Callable[[Sequence[Delta]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests · {task.fields[tokens]} tokens · {task.fields[rate]:.1f} tokens/s"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    # A terminal is left clean; elsewhere the last state is all there is to see.
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task_id = progress.add_task("Generating", total=num_requests, tokens=0, rate=0.0)
        task = progress.tasks[0]

        def advance(deltas: Sequence[Delta]) -> None:
            tokens = task.fields["tokens"] + sum(len(delta.token_ids) for delta in deltas)
            progress.update(
                task_id,
                advance=sum(delta.output is not None for delta in deltas),
                tokens=tokens,
                rate=tokens / (task.elapsed or float("inf")),
            )

        yield advance
