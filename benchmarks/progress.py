"""Progress on stderr, for whoever waits; a pipe gets a line per step instead of a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich import progress
from rich.console import Console


def wide_console() -> Console:
    """Standard output; as wide as tables need where no terminal limits it."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


class Progress:
    """One line that says what is going on, with a bar while rounds are counted."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            # A bar that redraws itself in a thread of its own would do so inside the turns it measures.
            auto_refresh=False,
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """What comes next, and may take a while."""
        self._console.print(text, style="dim", highlight=False)

    def wait(self) -> None:
        """Until someone presses Enter."""
        self.say("all is loaded; Enter starts the measurement")
        sys.stdin.readline()

    @contextmanager
    def bar(self, text: str, steps: int) -> Iterator[Callable[[], None]]:
        """A bar of so many steps; yields the function that moves it by one."""
        task = self._bars.add_task(text, total=steps)

        def tick() -> None:
            self._bars.advance(task)
            self._bars.refresh()

        yield tick
        self._bars.remove_task(task)
