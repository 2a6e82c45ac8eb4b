"""Time by turns: whoever is compared takes part in every round, so that a noisy moment hits all of them.

A peer comes to its first round ready: it has computed the case once, and that output passed the gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Turn = Callable[[], float]  # computes the case once and returns the seconds it took
Name = TypeVar("Name", bound=Hashable)


class Absent(Exception):
    """A peer that cannot take part, or no longer. It is listed with the reason, never estimated.

    Args:
        note: why.
        status: `unavailable` for what is not there or not supported, `failed` for what broke.
    """

    def __init__(self, note: str, status: str = "unavailable") -> None:
        super().__init__(note)
        self.status = status

    @property
    def columns(self) -> dict[str, str]:
        """As columns of a row."""
        return {"status": self.status, "note": str(self)}


@dataclass(frozen=True)
class Ready:
    """A peer that has computed a case and can do it again by the clock.

    Attributes:
        output: what it computed, for the gate.
        turn: computes it again; returns seconds.
        versions: of the software that computed it, where that is not this process's own.
        close: gives back what it holds.
    """

    output: Any
    turn: Turn
    versions: str = ""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Spread:
    """Seconds of all rounds: the median, between which bounds the middle 60 % of them lie, and each round's."""

    median: float
    p20: float
    p80: float
    rounds: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Of at least one round."""
        p20, median, p80 = np.percentile(seconds, (20, 50, 80))
        return cls(float(median), float(p20), float(p80), tuple(seconds))


def stopwatch(call: Callable[[], Any], *, warm: bool = True) -> Turn:
    """A turn of a call in this process.

    Args:
        warm: call it once untimed just before, so that its data lie in the nearest cache they fit in and its
            threads are awake, whoever's turn it was before.
    """

    def turn() -> float:
        if warm:
            call()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return turn


def time_in_turns(
    turns: Mapping[Name, Turn], rounds: int, tick: Callable[[], Any] = lambda: None
) -> tuple[dict[Name, Spread], dict[Name, Absent]]:
    """Each name's seconds over so many rounds.

    Args:
        tick: called after each turn, to move a progress bar.
    Returns:
        The spreads, and why those without one dropped out.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in turns}
    gone: dict[Name, Absent] = {}
    for _ in range(rounds):
        for name, turn in turns.items():
            if name not in gone:
                try:
                    seconds[name].append(turn())
                except Absent as reason:
                    gone[name] = reason
            tick()
    return {name: Spread.of(times) for name, times in seconds.items() if name not in gone}, gone
